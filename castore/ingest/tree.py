"""The rules of the ingest tree: what may be made, renamed, linked and removed where. No bytes and no FUSE here.

Every method runs to its end without a checkpoint, so each is atomic for the tasks of the daemon; what it changes is
committed (and so survives a kill) when it returns. Rights are the kernel's business (`default_permissions`).
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from castore.catalog.reader import CatalogReader
from castore.catalog.records import Kind
from castore.catalog.workspace import Node, WorkspaceStore
from castore.digest import BlobSummary
from castore.errors import (
    AlreadyExists,
    AttributeTooLarge,
    CrossesVersions,
    DirectoryNotEmpty,
    Frozen,
    InvalidName,
    IsADirectory,
    NameTooLong,
    NoAttribute,
    NotADirectory,
    NotASymlink,
    NotFound,
    NotPermitted,
    NotSupported,
    ReadOnly,
)
from castore.ingest.files import StagedFiles
from castore.ingest.inode_numbers import InodeNumbers
from castore.registry.names import is_valid_name, is_valid_version

INGEST_ROOT: Final = 3
"""The inode of `ingest/` itself: fixed, without a node."""

NAME_MAX: Final = 255
TARGET_MAX: Final = 4095
ATTRIBUTE_VALUE_MAX: Final = 64 * 1024
"""Linux's own limits, in bytes: NAME_MAX, PATH_MAX without its end, XATTR_SIZE_MAX."""
ATTRIBUTES_TOTAL_MAX: Final = 64 * 1024
"""Bytes of all names and values of one entry, XATTR_LIST_MAX: they become rows of the catalog."""

_TIME_MAX_NS: Final = 2**63 - 1
"""The largest integer of a column of the workspace and the catalog."""

PRODUCER: Final = b"user.castore.producer"
RETENTION_CLASS: Final = b"user.castore.retention_class"
LABEL_MAX: Final = 128


class IngestTree:
    """The tree of names over a workspace."""

    def __init__(
        self,
        store: WorkspaceStore,
        *,
        catalog: CatalogReader,
        numbers: InodeNumbers,
        files: StagedFiles,
        on_routing_change: Callable[[int], None] = lambda version_inode: None,
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._numbers = numbers
        self._files = files
        self._on_routing_change = on_routing_change
        self._frozen: set[int] = set()
        self._published: set[int] = set()

    # looking

    def find(self, inode: int) -> Node | None:
        """The node of an inode, with the size and time of an open file as they are now; None when it is not ours."""
        node = self._store.node(inode)
        return None if node is None or node.version_inode in self._published else self._live(node)

    def get(self, inode: int) -> Node:
        """As `find`; raises NotFound."""
        node = self.find(inode)
        if node is None:
            raise NotFound("no such entry in ingest/")
        return node

    def lookup(self, parent: int, name: bytes) -> Node | None:
        """The node of that name, or None."""
        self._check_length(name)
        node = self._store.child(parent, name)
        return None if node is None else self._live(node)

    def children(self, parent: int, after: int, limit: int) -> list[tuple[int, bytes, Node]]:
        """Up to `limit` (cookie, name, node) with a cookie above `after`."""
        return [(cookie, name, self._live(node)) for cookie, name, node in self._store.children(parent, after, limit)]

    def parent(self, inode: int) -> int:
        """The inode of the directory that a directory lies in."""
        link = self._store.parent_of(inode)
        return INGEST_ROOT if link is None else link[0]

    def version_path(self, version_inode: int) -> tuple[str, str]:
        """(NAME, VERSION) of a version directory. Raises NotFound."""
        link = self._store.parent_of(version_inode)
        above = None if link is None else self._store.parent_of(link[0])
        if link is None or above is None:
            raise NotFound("no such version in ingest/")
        return above[1].decode(), link[1].decode()

    def version(self, name: str, version: str) -> Node:
        """The version directory ingest/NAME/VERSION. Raises NotFound."""
        top = self._store.child(INGEST_ROOT, name.encode())
        node = None if top is None else self._store.child(top.inode, version.encode())
        if node is None:
            raise NotFound(f"there is no ingest/{name}/{version}")
        return node

    def _live(self, node: Node) -> Node:
        open_file = self._files.open_file(node.inode)
        if open_file is None or not open_file.is_dirty:
            return node
        return replace(
            node,
            size_bytes=open_file.size_bytes,
            mtime_ns=open_file.mtime_ns,
            ctime_ns=max(node.ctime_ns, open_file.changed_ns),
        )

    # freezing

    def freeze(self, version_inode: int) -> None:
        """Refuse changes below a version with Frozen until `thaw`."""
        self._frozen.add(version_inode)

    def thaw(self, version_inode: int) -> None:
        """Allow changes again."""
        self._frozen.discard(version_inode)

    def hand_over(self, version_inode: int) -> None:
        """The version is in the catalog now: from here on its inodes are not ours, though rows remain for a while."""
        self._published.add(version_inode)

    def forget(self, version_inode: int) -> None:
        """No row of the version remains."""
        self._published.discard(version_inode)
        self._frozen.discard(version_inode)

    def check_writable(self, node: Node) -> None:
        """Raise Frozen when the node's version is being published."""
        if node.version_inode in self._frozen:
            raise Frozen("the package is being published")

    # making

    def mkdir(self, parent: int, name: bytes, *, mode: int, uid: int, gid: int) -> Node:
        """Make a directory: a NAME, a VERSION, or one inside a version."""
        if parent == INGEST_ROOT and not is_valid_name(name):
            raise InvalidName(f"not a package NAME: {name!r}")
        above = self._directory(parent)
        if above is not None and above.version_inode == 0 and not is_valid_version(name):
            raise InvalidName(f"not a package VERSION: {name!r}")
        inode = self._numbers.take()
        if above is None:
            version_inode = 0
        else:
            version_inode = above.version_inode or inode
            self._files.expect()
        with self._store.transaction():
            if above is None:
                self._name_inodes(name.decode())
            return self._insert(above, parent, name, inode, version_inode, Kind.DIRECTORY, mode=mode, uid=uid, gid=gid)

    def create(self, parent: int, name: bytes, *, mode: int, uid: int, gid: int) -> Node:
        """Make an empty file in a version; its state is `receiving`."""
        above = self._inside_version(parent)
        inode = self._numbers.take()
        return self._insert(above, parent, name, inode, above.version_inode, Kind.FILE, mode=mode, uid=uid, gid=gid)

    def new_inode(self) -> int:
        """A number for `add_staged`. Raises CatalogBusy when none is left."""
        return self._numbers.take()

    def add_staged(
        self,
        parent: int,
        name: bytes,
        inode: int,
        *,
        mode: int,
        uid: int,
        gid: int,
        mtime_ns: int,
        summary: BlobSummary,
    ) -> Node:
        """Name a file whose bytes lie in staging already, under a number of `new_inode`: it is `staged` at once."""
        above = self._inside_version(parent)
        with self._store.transaction():
            self._insert(above, parent, name, inode, above.version_inode, Kind.FILE, mode=mode, uid=uid, gid=gid)
            self._store.set_summary(inode, summary, mtime_ns=mtime_ns)
        return self.get(inode)

    def symlink(self, parent: int, name: bytes, target: bytes, *, uid: int, gid: int) -> Node:
        """Make a symbolic link in a version."""
        above = self._inside_version(parent)
        if len(target) > TARGET_MAX:
            raise NameTooLong(f"a link's target has at most {TARGET_MAX} bytes")
        inode = self._numbers.take()
        return self._insert(
            above, parent, name, inode, above.version_inode, Kind.SYMLINK, mode=0o777, uid=uid, gid=gid, target=target
        )

    def link(self, inode: int, parent: int, name: bytes) -> Node:
        """Give a file another name in its own version."""
        node = self.get(inode)
        above = self._inside_version(parent)
        if node.kind is Kind.DIRECTORY or node.version_inode != above.version_inode:
            raise NotPermitted("hard links work inside one version only")
        self._check_free(parent, name)
        now = time.time_ns()
        with self._store.transaction():
            self._store.insert_link(self._numbers.take(), parent, name, inode)
            self._store.update_node(inode, nlink=node.nlink + 1, ctime_ns=now)
            self._store.touch(parent, now)
        return self.get(inode)

    def _insert(
        self,
        above: Node | None,
        parent: int,
        name: bytes,
        inode: int,
        version_inode: int,
        kind: Kind,
        *,
        mode: int,
        uid: int,
        gid: int,
        target: bytes = b"",
    ) -> Node:
        self._check_length(name)
        now = time.time_ns()
        if above is not None and above.mode & stat.S_ISGID:
            gid = above.gid
            mode |= stat.S_ISGID if kind is Kind.DIRECTORY else 0
        node = Node(
            inode=inode,
            version_inode=version_inode,
            kind=kind,
            mode=_kept_mode(mode, kind),
            uid=uid,
            gid=gid,
            creator_uid=uid,
            mtime_ns=now,
            ctime_ns=now,
            size_bytes=len(target),
            nlink=1,
            target=target,
            state="receiving" if kind is Kind.FILE else "",
        )
        with self._store.transaction():
            self._store.insert_node(node)
            if not self._store.insert_link(inode, parent, name, inode):
                raise AlreadyExists("the name is taken")
            if above is not None:
                self._store.touch(parent, now)
        return node

    def _name_inodes(self, name: str) -> None:
        published = self._catalog.package_name(name)
        if published is None:
            self._store.add_names(name, self._numbers.take(), self._numbers.take())
        else:
            self._store.add_names(name, published.inode, published.latest_inode)

    # removing and renaming

    def unlink(self, parent: int, name: bytes) -> None:
        """Remove a name of a file or symbolic link; its bytes go with the last name and the last handle."""
        node = self._entry(parent, name)
        if node.kind is Kind.DIRECTORY:
            raise IsADirectory("use rmdir")
        self.check_writable(node)
        with self._store.transaction():
            unneeded = self._remove(node, parent, name)
        self._remove_bytes(unneeded)

    def rmdir(self, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        node = self._entry(parent, name)
        if node.kind is not Kind.DIRECTORY:
            raise NotADirectory("use unlink")
        self.check_writable(node)
        if not self._store.is_empty(node.inode):
            raise DirectoryNotEmpty("the directory is not empty")
        with self._store.transaction():
            self._remove(node, parent, name)

    def _remove(self, node: Node, parent: int, name: bytes) -> Node | None:
        """Remove a name. Returns the file whose bytes nobody needs any more: they go after the commit, never before."""
        now = time.time_ns()
        self._store.delete_link(parent, name)
        if parent != INGEST_ROOT:
            self._store.touch(parent, now)
        else:
            self._drop_unpublished(name.decode())
        if node.kind is not Kind.DIRECTORY and node.nlink > 1:
            self._store.update_node(node.inode, nlink=node.nlink - 1, ctime_ns=now)
        elif self._files.open_file(node.inode) is not None:
            self._store.update_node(node.inode, nlink=0, ctime_ns=now)
        else:
            self._store.delete_node(node.inode)
            return node if node.kind is Kind.FILE else None
        return None

    def _drop_unpublished(self, name: str) -> None:
        """A NAME is gone from ingest/: what was never published under it has no inodes in packages/ any more."""
        if self._catalog.package_name(name) is None:
            self._store.drop_names(name)

    def _remove_bytes(self, file: Node | None) -> None:
        if file is not None:
            self._files.remove(file.inode, file.uid, file.size_bytes)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, replace_existing: bool = True
    ) -> None:
        """Move a name within ingest/, replacing what is there unless told not to. Atomic."""
        node = self._entry(parent, name)
        self.check_writable(node)
        above = self._check_place(node, new_parent, new_name)
        there = self._store.child(new_parent, new_name)
        if there is not None:
            if not replace_existing:
                raise AlreadyExists("the name is taken")
            if there.inode == node.inode:
                return
            self._check_replace(node, there)
        version_inode = self._version_after(node, above)
        crosses = node.version_inode != version_inode
        if crosses and not self._store.subtree_is_closed(node.inode):
            raise CrossesVersions("a hard link would lead into another version")
        now = time.time_ns()
        unneeded = None
        with self._store.transaction():
            if there is not None:
                unneeded = self._remove(self._live(there), new_parent, new_name)
            if above is None:
                self._name_inodes(new_name.decode())
            self._store.move_link(parent, name, new_parent, new_name)
            if parent == INGEST_ROOT:
                self._drop_unpublished(name.decode())
            for directory in {parent, new_parent} - {INGEST_ROOT}:
                self._store.touch(directory, now)
            self._store.update_node(node.inode, ctime_ns=now)
            if crosses:
                self._store.move_subtree(node.inode, version_inode)
                if node.is_version:
                    for label in (PRODUCER, RETENTION_CLASS):
                        self._store.remove_attribute(node.inode, label)  # it is a version no longer
        self._remove_bytes(unneeded)
        if crosses:
            self._files.follow(node.version_inode)
            self._on_routing_change(version_inode)

    def _check_place(self, node: Node, new_parent: int, new_name: bytes) -> Node | None:
        above = self._directory(new_parent)
        if above is None:
            if node.kind is not Kind.DIRECTORY or node.version_inode != 0:
                raise NotPermitted("only a NAME directory lies directly in ingest/")
            if not is_valid_name(new_name):
                raise InvalidName(f"not a package NAME: {new_name!r}")
            return None
        self.check_writable(above)
        if node.version_inode == 0:
            raise NotPermitted("a NAME directory lies directly in ingest/")
        if above.version_inode == 0:
            if node.kind is not Kind.DIRECTORY:
                raise NotPermitted("only a VERSION directory lies directly in ingest/NAME/")
            if not is_valid_version(new_name):
                raise InvalidName(f"not a package VERSION: {new_name!r}")
        return above

    @staticmethod
    def _version_after(node: Node, above: Node | None) -> int:
        if above is None:
            return 0
        return above.version_inode or node.inode

    def _check_replace(self, node: Node, there: Node) -> None:
        self.check_writable(there)
        if there.kind is Kind.DIRECTORY:
            if node.kind is not Kind.DIRECTORY:
                raise IsADirectory("a directory has that name")
            if not self._store.is_empty(there.inode):
                raise DirectoryNotEmpty("a directory that is not empty has that name")
        elif node.kind is Kind.DIRECTORY:
            raise NotADirectory("a file has that name")

    # attributes

    def set_attributes(
        self,
        inode: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        mtime_ns: int | None = None,
    ) -> Node:
        """chmod, chown, utimens. Set-uid bits are dropped, set-gid is kept on directories only.

        A time outside 1677 to 2262 becomes the nearest inside, as file systems do with what they cannot hold.
        """
        node = self.get(inode)
        self.check_writable(node)
        columns: dict[str, int] = {"ctime_ns": time.time_ns()}
        if mode is not None:
            columns["mode"] = _kept_mode(mode, node.kind)
        if uid is not None:
            columns["uid"] = uid
        if gid is not None:
            columns["gid"] = gid
        if mtime_ns is not None:
            mtime_ns = columns["mtime_ns"] = max(-_TIME_MAX_NS, min(mtime_ns, _TIME_MAX_NS))
        self._store.update_node(inode, **columns)
        # What is known in memory follows the commit, and never goes ahead of it.
        if uid is not None and node.kind is Kind.FILE:
            self._files.change_owner(node.inode, node.uid, uid, node.size_bytes)
        open_file = self._files.open_file(inode)
        if mtime_ns is not None and open_file is not None:
            open_file.set_mtime(mtime_ns)
        return self.get(inode)

    def readlink(self, inode: int) -> bytes:
        """The target of a symbolic link."""
        node = self.get(inode)
        if node.kind is not Kind.SYMLINK:
            raise NotASymlink("not a symbolic link")
        return node.target

    def attribute(self, inode: int, name: bytes) -> bytes:
        """An extended attribute that a user set. Raises NoAttribute, InvalidName."""
        _check_has_name(name)
        value = self._store.attributes(inode).get(name)
        if value is None:
            raise NoAttribute("no such attribute")
        return value

    def attribute_names(self, inode: int) -> list[bytes]:
        """The extended attributes that users set."""
        return sorted(self._store.attributes(inode))

    def set_attribute(self, inode: int, name: bytes, value: bytes) -> None:
        """Set `user.*`; of `user.castore.*` only producer and retention_class, on a VERSION directory.

        Raises NotSupported, NotPermitted, InvalidName, AttributeTooLarge.
        """
        node = self.get(inode)
        self.check_writable(node)
        if not name.startswith(b"user."):
            raise NotSupported("only attributes in user.* are kept")
        _check_has_name(name)
        if name in (PRODUCER, RETENTION_CLASS):
            if not node.is_version:
                raise NotPermitted(f"{name.decode()} is set on ingest/NAME/VERSION")
            check_label(name, value)
        elif name.startswith((b"user.castore.", b"user.hash.")):
            raise NotPermitted("this attribute is computed")
        present = self._store.attributes(inode)
        total = sum(len(key) + len(text) for key, text in present.items() if key != name) + len(name) + len(value)
        if len(value) > ATTRIBUTE_VALUE_MAX or total > ATTRIBUTES_TOTAL_MAX:
            raise AttributeTooLarge(f"the attributes of one entry have at most {ATTRIBUTES_TOTAL_MAX} bytes together")
        with self._store.transaction():
            self._store.set_attribute(inode, name, value)
            self._attribute_changed(node, name)

    def remove_attribute(self, inode: int, name: bytes) -> None:
        """Remove an attribute that a user set. Raises NoAttribute, InvalidName."""
        _check_has_name(name)
        node = self.get(inode)
        self.check_writable(node)
        with self._store.transaction():
            if not self._store.remove_attribute(inode, name):
                raise NoAttribute("no such attribute")
            self._attribute_changed(node, name)

    def _attribute_changed(self, node: Node, name: bytes) -> None:
        self._store.update_node(node.inode, ctime_ns=time.time_ns())
        if name in (PRODUCER, RETENTION_CLASS):
            # What is stored may belong in another backend now: let the uploader decide anew.
            self._store.restage(version_inode=node.inode, state="stored")
            self._on_routing_change(node.inode)

    # checks

    def _directory(self, inode: int) -> Node | None:
        """The directory's node, or None for ingest/ itself."""
        if inode == INGEST_ROOT:
            return None
        node = self.find(inode)
        if node is None:
            raise ReadOnly("published trees do not change")
        if node.kind is not Kind.DIRECTORY:
            raise NotADirectory("not a directory")
        if node.nlink == 0:
            raise NotFound("the directory is removed")
        self.check_writable(node)
        return node

    def _inside_version(self, parent: int) -> Node:
        above = self._directory(parent)
        if above is None or above.version_inode == 0:
            raise NotPermitted("files lie below ingest/NAME/VERSION; make those directories first")
        return above

    @staticmethod
    def _check_length(name: bytes) -> None:
        if len(name) > NAME_MAX:
            raise NameTooLong(f"a name has at most {NAME_MAX} bytes")

    def _check_free(self, parent: int, name: bytes) -> None:
        self._check_length(name)
        if self._store.child(parent, name) is not None:
            raise AlreadyExists("the name is taken")

    def _entry(self, parent: int, name: bytes) -> Node:
        node = self.lookup(parent, name)
        if node is None:
            raise NotFound("no such entry")
        return node


def _kept_mode(mode: int, kind: Kind) -> int:
    """The permission bits that are kept: never set-uid, set-gid and sticky on directories only."""
    kept = 0o777
    if kind is Kind.DIRECTORY:
        kept |= stat.S_ISGID | stat.S_ISVTX
    return mode & kept


def _check_has_name(attribute: bytes) -> None:
    """Raise InvalidName where nothing follows `user.`, as other file systems do."""
    if attribute == b"user.":
        raise InvalidName("an attribute needs a name behind `user.`")


def check_label(name: bytes, value: bytes) -> None:
    """A producer or retention class: 1 to 128 printable characters of UTF-8. Raises InvalidName."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or not 0 < len(text) <= LABEL_MAX:
        raise InvalidName(f"{name.decode()}: {value!r} is not 1 to {LABEL_MAX} printable characters")
