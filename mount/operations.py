"""The FUSE handlers: a few lines each. They find the tree that an inode is in and pass the request on."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from typing import Final, cast

import pyfuse3
import trio

from castore.errors import InvalidName, NotFound, NotPermitted, ReadOnly
from castore.ingest.service import Ingest
from castore.ingest.tree import INGEST_ROOT
from mount.attributes import IMMUTABLE_SECONDS, make, of_node
from mount.by_digest import ByDigestTree
from mount.control import ControlTree
from mount.guard import deadlined, guarded
from mount.handles import BlobHandle, Handles, StagedHandle
from mount.ingest import IngestFiles
from mount.inodes import (
    BY_DIGEST,
    BY_DIGEST_ALGORITHM,
    CONTROL,
    DIGEST_DIRECTORIES,
    DIGEST_FILES,
    HEALTH_FILE,
    PACKAGES,
    ROOT,
    STATUS_FILE,
)
from mount.packages import PackagesTree
from mount.statfs import statfs_of

ReadableTree = PackagesTree | IngestFiles | ByDigestTree | ControlTree

_TOP = {b"packages": PACKAGES, b"ingest": INGEST_ROOT, b"by-digest": BY_DIGEST, b".castore": CONTROL}
_DOTS: Final = 2
"""How many entries come before those of a tree in each listing, and so by how much their cookies are higher."""


class CastoreOperations(pyfuse3.Operations):
    """The handlers of one mount. `ingest` is None on a read-only one, where the kernel refuses what would write."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(
        self,
        *,
        packages: PackagesTree,
        by_digest: ByDigestTree,
        control: ControlTree,
        ingest: Ingest | None,
        publish_wait_seconds: float,
        sync_wait_seconds: float,
    ) -> None:
        super().__init__()
        self._packages = packages
        self._by_digest = by_digest
        self._control = control
        self._files = None if ingest is None else IngestFiles(ingest)
        self._top = {name: inode for name, inode in _TOP.items() if ingest is not None or inode != INGEST_ROOT}
        self._publish_wait_seconds = publish_wait_seconds
        self._sync_wait_seconds = sync_wait_seconds
        self._started_ns = time.time_ns()
        self.handles = Handles()
        self.begun = trio.Event()
        """The kernel has begun to use the mount. Whoever waits for it goes on when the kernel has its answer."""

    def init(self) -> None:
        """pyfuse3 calls it within the kernel's first request, and sends the answer before any task has its turn."""
        self.begun.set()

    def _of(self, inode: int) -> ReadableTree:
        """The tree that an inode is in; the root is looked after here."""
        if self._packages.knows(inode):
            return self._packages
        if inode >= DIGEST_DIRECTORIES or inode in (BY_DIGEST, BY_DIGEST_ALGORITHM):
            return self._by_digest
        if inode in (CONTROL, STATUS_FILE, HEALTH_FILE):
            return self._control
        if self._files is not None and self._files.has(inode):
            return self._files
        return self._packages

    @property
    def _workspace(self) -> IngestFiles:
        """The tree ingest/. Raises ReadOnly on a mount without it."""
        if self._files is None:
            raise ReadOnly("this mount is read-only")
        return self._files

    def _writable(self, inode: int) -> IngestFiles:
        """The tree ingest/. Raises ReadOnly unless the inode is in it."""
        if inode == ROOT or not self._workspace.has(inode):
            raise ReadOnly("only ingest/ can be written")
        return self._workspace

    def _changeable(self, inode: int) -> IngestFiles:
        """As `_writable`, for what is in the tree. Raises NotPermitted for ingest/ itself."""
        files = self._writable(inode)
        if inode == INGEST_ROOT:
            raise NotPermitted("ingest/ itself does not change")
        return files

    def _root(self) -> pyfuse3.EntryAttributes:
        return make(
            ROOT,
            stat.S_IFDIR | 0o755,
            uid=os.getuid(),
            gid=os.getgid(),
            mtime_ns=self._started_ns,
            seconds=IMMUTABLE_SECONDS,
        )

    # looking

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name == b".":
            return self._attributes(parent_inode)
        if name == b"..":
            return self._attributes(ROOT if parent_inode == ROOT else self._parent(parent_inode))
        if parent_inode == ROOT:
            if name not in self._top:
                raise NotFound("no such entry")
            return self._attributes(self._top[name])
        return self._of(parent_inode).lookup(parent_inode, name)

    def _parent(self, inode: int) -> int:
        if inode in self._top.values():
            return ROOT
        return self._of(inode).parent(inode)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        return self._root() if inode == ROOT else self._of(inode).attributes(inode)

    @guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Nothing is kept for the kernel's sake: every inode can be looked up by its number."""

    @guarded
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        tree = self._of(inode)
        if not isinstance(tree, PackagesTree | IngestFiles):
            raise NotFound("no symbolic links here")
        return tree.readlink(inode)

    @guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """`.` and `..` come first: programs count them. A child's cookie is that of its tree, behind those two."""
        if start_id < _DOTS and not self._dots(fh, start_id, token):
            return
        after = max(0, start_id - _DOTS)
        if fh == ROOT:
            for name, inode in list(self._top.items()):
                if inode > after and not pyfuse3.readdir_reply(token, name, self._attributes(inode), inode + _DOTS):
                    return
            return
        for cookie, name, attributes in self._of(fh).children(fh, after):
            if not pyfuse3.readdir_reply(token, name, attributes, cookie + _DOTS):
                return

    def _dots(self, inode: int, start_id: int, token: pyfuse3.ReaddirToken) -> bool:
        """Whether both are in the reply, or in an earlier one. Of them the kernel takes number and type, no more."""
        above = ROOT if inode == ROOT else self._parent(inode)
        for cookie, name, number in ((1, b".", inode), (_DOTS, b"..", above)):
            if cookie > start_id:
                attributes = pyfuse3.EntryAttributes()
                attributes.st_ino = number
                attributes.st_mode = stat.S_IFDIR | 0o755
                if not pyfuse3.readdir_reply(token, name, attributes, cookie):
                    return False
        return True

    async def releasedir(self, fh: int) -> None:
        """An open directory is its inode number: nothing to release."""

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        return statfs_of(None if self._files is None else self._files.staged)

    # extended attributes

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        tree = self._of(inode)
        if isinstance(tree, IngestFiles):
            return await tree.attribute(inode, name)
        return tree.attribute(inode, name)

    @guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        tree = self._of(inode)
        if isinstance(tree, IngestFiles):
            return [] if inode == INGEST_ROOT else tree.tree.attribute_names(inode)
        return tree.attribute_names(inode) if isinstance(tree, PackagesTree) else []

    @guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._changeable(inode).tree.set_attribute(inode, name, value)

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._changeable(inode).tree.remove_attribute(inode, name)

    # names

    @guarded
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        tree = self._writable(parent_inode).tree
        return of_node(tree.mkdir(parent_inode, name, mode=mode, uid=ctx.uid, gid=ctx.gid))

    @guarded
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        files = self._writable(parent_inode)
        if not stat.S_ISREG(mode):
            raise NotPermitted("devices, sockets and fifos cannot be packaged")
        handle, node = await files.create(parent_inode, name, mode, ctx.uid, ctx.gid)
        await self._release_staged(handle)
        return of_node(node)

    @guarded
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        tree = self._writable(parent_inode).tree
        return of_node(tree.symlink(parent_inode, name, target, uid=ctx.uid, gid=ctx.gid))

    @guarded
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        files = self._writable(new_parent_inode)
        if not files.has(inode):
            raise NotPermitted("hard links work inside one version only")
        return of_node(files.tree.link(inode, new_parent_inode, new_name))

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._writable(parent_inode).tree.unlink(parent_inode, name)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._writable(parent_inode).tree.rmdir(parent_inode, name)

    @deadlined
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        files = self._writable(parent_inode_old)
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise InvalidName("two names cannot be exchanged")
        if files.has(parent_inode_new):
            files.tree.rename(
                parent_inode_old,
                name_old,
                parent_inode_new,
                name_new,
                replace_existing=not flags & pyfuse3.RENAME_NOREPLACE,
            )
            return
        await self._publish(parent_inode_old, name_old, parent_inode_new, name_new)

    async def _publish(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        """A rename from ingest/NAME to packages/NAME is a publish; to anywhere else it is refused, never EXDEV."""
        node = self._workspace.tree.lookup(parent, name)
        if node is None:
            raise NotFound("no such version")
        target = self._packages.name_of(new_parent)
        if target is None:
            raise ReadOnly("only packages/NAME takes a version")
        if not node.is_version:
            raise InvalidName("only ingest/NAME/VERSION can be published")
        await self._workspace.publish(node.inode, target.name, new_name, wait_seconds=self._publish_wait_seconds)

    @deadlined
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        files = self._changeable(inode)
        if fields.update_size:
            handle = None if fh is None else self.handles.staged(fh)
            await files.set_size(inode, attr.st_size, handle)
        return of_node(
            files.tree.set_attributes(
                inode,
                mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
                uid=attr.st_uid if fields.update_uid else None,
                gid=attr.st_gid if fields.update_gid else None,
                mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            )
        )

    # files

    @guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        tree = self._of(inode)
        if isinstance(tree, IngestFiles):
            return pyfuse3.FileInfo(fh=self.handles.add(await tree.open(inode, flags)))
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise ReadOnly("published files do not change")
        if isinstance(tree, ControlTree):
            return await self._open_document(inode)
        if isinstance(tree, ByDigestTree):
            handle = self._packages.open_blob(inode - DIGEST_FILES)
        else:
            handle = tree.open(inode)
        return pyfuse3.FileInfo(fh=self.handles.add(handle), keep_cache=True)

    @deadlined
    async def _open_document(self, inode: int) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=self.handles.add(await self._control.open(inode)), direct_io=True)

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        files = self._writable(parent_inode)
        handle, node = await files.create(parent_inode, name, mode, ctx.uid, ctx.gid, flags=flags)
        return pyfuse3.FileInfo(fh=self.handles.add(handle)), of_node(node)

    @deadlined
    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self.handles.get(fh)
        if isinstance(handle, BlobHandle):
            # pyfuse3 takes any buffer, and a memoryview saves a copy.
            return cast(bytes, await handle.blob.read(off, size))
        if isinstance(handle, StagedHandle):
            return self._workspace.staged.read(handle.file, off, size)
        return handle.data[off : off + size]

    @deadlined
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._workspace.staged.write(self.handles.staged(fh).file, off, buf)

    @guarded
    async def flush(self, fh: int) -> None:
        handle = self.handles.get(fh)
        if isinstance(handle, StagedHandle) and handle.writable:
            await self._flush_staged(handle)

    async def _flush_staged(self, handle: StagedHandle) -> None:
        # Only what waits for earlier pieces to be hashed needs a deadline, and one costs as much as a query.
        if handle.file.pending:
            await self._flush_later(handle)
        else:
            await self._workspace.staged.flush(handle.file)

    @deadlined
    async def _flush_later(self, handle: StagedHandle) -> None:
        await self._workspace.staged.flush(handle.file)

    @guarded
    async def release(self, fh: int) -> None:
        handle = self.handles.pop(fh)
        if isinstance(handle, StagedHandle):
            await self._release_staged(handle)
        elif isinstance(handle, BlobHandle):
            handle.blob.close()

    async def _release_staged(self, handle: StagedHandle) -> None:
        if handle.file.pending:
            await self._release_later(handle)
        else:
            await self._workspace.staged.release(handle.file, writable=handle.writable)

    @deadlined
    async def _release_later(self, handle: StagedHandle) -> None:
        await self._workspace.staged.release(handle.file, writable=handle.writable)

    @deadlined
    async def fsync(self, fh: int, datasync: bool) -> None:
        handle = self.handles.get(fh)
        if isinstance(handle, StagedHandle):
            await self._workspace.staged.sync(handle.file)

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        if fh != ROOT and self._files is not None and self._files.has(fh):
            await self._files.sync_directory(fh, wait_seconds=self._sync_wait_seconds)
