"""The tree packages/: names, versions and published entries, read from the catalog. Nothing here writes."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from heapq import merge
from operator import attrgetter, itemgetter

import pyfuse3

from castore.blobs.reader import BlobReader
from castore.blobs.siblings import Place
from castore.catalog.reader import CatalogReader
from castore.catalog.records import Blob, Entry, Kind, Package, PackageName, Tag
from castore.errors import IsADirectory, NoAttribute, NotASymlink, NotFound
from castore.ingest.service import Ingest
from castore.ingest.tree import INGEST_ROOT
from mount.attributes import (
    ABSENT_SECONDS,
    CHANGING_SECONDS,
    IMMUTABLE_SECONDS,
    LINK_SECONDS,
    absent,
    make,
    of_entry,
)
from mount.handles import BlobHandle
from mount.inodes import PACKAGES
from mount.recent import Child, Recent

LATEST = b"latest"
PAGE = 256
"""Entries fetched for a readdir at a time: what fits the kernel's 32 KiB buffer, and a little more."""


class PackagesTree:
    """What is published. `ingest` is None on a read-only mount."""

    def __init__(self, catalog: CatalogReader, blobs: BlobReader, ingest: Ingest | None) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._ingest = ingest
        self._started_ns = time.time_ns()
        self._recent = Recent()

    def forget(self) -> None:
        """Another catalog has taken the place of the one that was read."""
        self._recent.clear()

    def knows(self, inode: int) -> bool:
        """Whether the inode was found below a published version lately. It is so for good."""
        return inode in self._recent

    # attributes

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Attributes of anything in the tree. Raises NotFound."""
        if inode == PACKAGES:
            return make(
                PACKAGES,
                stat.S_IFDIR | 0o755,
                uid=os.getuid(),
                gid=os.getgid(),
                mtime_ns=self._started_ns,
                seconds=CHANGING_SECONDS,
            )
        entry = self._catalog.entry(inode)
        if entry is not None:
            return self._of_entry(entry, inode)
        name = self.name_of(inode)
        if name is None:
            return self._of_tag(self._tag(inode))
        return self._of_latest(name) if inode == name.latest_inode else self._of_name(name)

    def _of_entry(self, entry: Entry, inode: int = 0) -> pyfuse3.EntryAttributes:
        attributes = of_entry(entry, inode)
        self._recent.add(attributes.st_ino)
        if entry.kind is Kind.DIRECTORY and self._is_root(entry):
            attributes.entry_timeout = attributes.attr_timeout = CHANGING_SECONDS
        return attributes

    def _is_root(self, entry: Entry) -> bool:
        return self._catalog.package_name_by_inode(entry.parent_id) is not None

    @staticmethod
    def _of_name(name: PackageName) -> pyfuse3.EntryAttributes:
        return make(
            name.inode,
            stat.S_IFDIR | name.mode,
            uid=name.uid,
            gid=name.gid,
            mtime_ns=name.mtime_ns,
            seconds=CHANGING_SECONDS,
        )

    @staticmethod
    def _of_latest(name: PackageName) -> pyfuse3.EntryAttributes:
        return make(
            name.latest_inode,
            stat.S_IFLNK | 0o777,
            uid=name.uid,
            gid=name.gid,
            mtime_ns=name.mtime_ns,
            size_bytes=len(name.latest_version),
            seconds=LINK_SECONDS,
        )

    def _tag(self, inode: int) -> Tag:
        tag = self._catalog.tag_by_inode(inode)
        if tag is None:
            raise NotFound("no such entry in packages/")
        return tag

    def _of_tag(self, tag: Tag) -> pyfuse3.EntryAttributes:
        name = self._catalog.package_name(tag.name)
        return make(
            tag.inode,
            stat.S_IFLNK | 0o777,
            uid=name.uid if name else 0,
            gid=name.gid if name else 0,
            mtime_ns=tag.set_at_ns,
            size_bytes=len(tag.version),
            seconds=LINK_SECONDS,
        )

    # names

    def name_of(self, inode: int) -> PackageName | None:
        """The NAME of a packages/NAME directory or of its `latest`."""
        name = self._catalog.package_name_by_inode(inode)
        if name is None and self._ingest is not None:
            text = self._ingest.store.name_of(inode)
            name = None if text is None else self._unpublished(text)
        return name

    def _name(self, text: str) -> PackageName | None:
        known = self._catalog.package_name(text)
        if known is not None and known.latest_version:
            return known
        unpublished = self._unpublished(text)
        # Of a NAME whose versions are all deleted, owner and mode stay for those to come.
        return unpublished and (known or unpublished)

    def _unpublished(self, text: str) -> PackageName | None:
        """packages/NAME answers as soon as ingest/NAME exists, with the owner and mode it will keep."""
        if self._ingest is None:
            return None
        node = self._ingest.tree.lookup(INGEST_ROOT, text.encode())
        inodes = self._ingest.store.names(text)
        if node is None or inodes is None:
            return None
        return PackageName(text, inodes[0], inodes[1], node.uid, node.gid, node.mode & 0o777, node.mtime_ns, "")

    def lookup(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        """Attributes of a name, or the answer that it is absent."""
        if parent == PACKAGES:
            found = self._name(name.decode("ascii", "replace"))
            return absent(ABSENT_SECONDS) if found is None else self._of_name(found)
        entry = self._catalog.lookup(parent, name)
        if entry is not None:
            return self._of_entry(entry)
        if self._catalog.entry(parent) is not None:
            return absent(IMMUTABLE_SECONDS)  # below a published VERSION
        above = self.name_of(parent)
        if above is not None and name == LATEST and above.latest_version:
            return self._of_latest(above)
        if above is not None:
            tag = self._catalog.tag(above.name, name.decode("ascii", "replace"))
            if tag is not None and tag.inode:
                return self._of_tag(tag)
        return absent(ABSENT_SECONDS)

    def parent(self, inode: int) -> int:
        """The directory above a directory."""
        entry = self._catalog.entry(inode)
        # The root of a deleted package hangs below nothing.
        return PACKAGES if entry is None or entry.parent_id < 0 else entry.parent_id

    def children(self, inode: int, after: int) -> Iterator[Child]:
        """The entries of a directory with a cookie above `after`."""
        if inode == PACKAGES:
            while names := self._catalog.package_names(after, PAGE):
                for name in names:
                    yield name.inode, name.name.encode(), self._of_name(name)
                after = names[-1].inode
            return
        above = None if inode in self._recent else self.name_of(inode)
        if above is not None and above.latest_version and after < 1:
            yield 1, LATEST, self._of_latest(above)
        if above is not None:
            yield from merge(self._versions(inode, after), self._tags(above.name, after), key=itemgetter(0))
            return
        while page := self._page(inode, after):
            yield from page
            after = page[-1][0]
            if len(page) < PAGE:
                return

    def _page(self, inode: int, after: int) -> list[Child]:
        """The next entries of a directory below a published version."""
        page = self._recent.page(inode, after)
        if page is None:
            entries = self._catalog.children(inode, after, PAGE)
            page = [(entry.entry_id, entry.name, of_entry(entry)) for entry in entries]
            for entry in entries:
                self._recent.add(entry.shown_inode)
            if inode in self._recent:
                self._recent.keep(inode, after, page)
        return page

    def _versions(self, inode: int, after: int) -> Iterator[Child]:
        while entries := self._catalog.children(inode, after, PAGE):
            for entry in entries:
                attributes = of_entry(entry)
                attributes.entry_timeout = attributes.attr_timeout = CHANGING_SECONDS
                yield entry.entry_id, entry.name, attributes
            after = entries[-1].entry_id

    def _tags(self, name: str, after: int) -> Iterator[Child]:
        """In order of their cookies, which are inode numbers as those of the versions are."""
        for tag in sorted(self._catalog.tags(name), key=attrgetter("inode")):
            if tag.inode > after:
                yield tag.inode, tag.tag.encode(), self._of_tag(tag)

    # contents

    def readlink(self, inode: int) -> bytes:
        """The target of a symbolic link, `latest` among them."""
        entry = self._catalog.entry(inode)
        if entry is not None:
            if entry.kind is not Kind.SYMLINK:
                raise NotASymlink("not a symbolic link")
            return entry.target
        name = self.name_of(inode)
        if name is None:
            return self._tag(inode).version.encode()
        if inode != name.latest_inode or not name.latest_version:
            raise NotFound("no such symbolic link")
        return name.latest_version.encode()

    def open(self, inode: int) -> BlobHandle:
        """Open a published file."""
        found = self._catalog.file(inode)
        if found is None or found[0].kind is not Kind.FILE:
            raise NotFound("no such file") if found is None else IsADirectory("not a file")
        entry, blob = found
        return self._open(blob, Place(entry.parent_id, entry.entry_id, entry.name))

    def open_blob(self, blob_id: int) -> BlobHandle:
        """Open a blob by its number."""
        return self._open(self._catalog.blob(blob_id))

    def _open(self, blob: Blob | None, place: Place | None = None) -> BlobHandle:
        if blob is None:
            raise NotFound("no such blob")
        return BlobHandle(self._blobs.open(blob, place))

    def attribute(self, inode: int, name: bytes) -> bytes:
        """An extended attribute: a computed one, or one that the publisher set. Raises NoAttribute."""
        entry = self._catalog.entry(inode)
        if entry is None:
            raise NoAttribute("no such attribute")
        if name.startswith((b"user.castore.", b"user.hash.")):
            value = self._computed(entry, name)
            if value is not None:
                return value
        value = self._catalog.attributes(inode).get(name)
        if value is None:
            raise NoAttribute("no such attribute")
        return value

    def _computed(self, entry: Entry, name: bytes) -> bytes | None:
        if entry.kind is Kind.FILE:
            return blob_attribute(self._catalog, entry.blob_id, name)
        package = self._catalog.package_by_root(entry.inode)
        return None if package is None else _package_attribute(package, name)

    def attribute_names(self, inode: int) -> list[bytes]:
        """The attributes that the publisher set; computed ones are not listed, so that `cp -a` copies none."""
        return sorted(name for name in self._catalog.attributes(inode) if not name.startswith(b"user.castore."))


def blob_attribute(catalog: CatalogReader, blob_id: int, name: bytes) -> bytes | None:
    """A computed attribute of a file's blob: digest, hash, backend, status."""
    if name in (b"user.castore.digest", b"user.hash.sha256"):
        known = catalog.blob_digest(blob_id)
        if known is None:
            return None
        return (known[0].hex if name.endswith(b".sha256") else str(known[0])).encode()
    locations = catalog.locations(blob_id)
    if name == b"user.castore.backend":
        return ",".join(location.backend_id for location in locations).encode()
    if name == b"user.castore.status":
        return ",".join(f"{location.status}" for location in locations).encode()
    return None


def _package_attribute(package: Package, name: bytes) -> bytes | None:
    return {
        b"user.castore.producer": package.producer,
        b"user.castore.retention_class": package.retention_class,
        b"user.castore.digest": str(package.manifest_digest),
        b"user.castore.backend": ",".join(package.backend_ids),
    }.get(name, "").encode() or None
