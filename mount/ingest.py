"""The tree ingest/ as FUSE sees it: each method a call of the library. The rules are in castore.ingest."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator

import pyfuse3

from castore.catalog.records import Kind
from castore.catalog.workspace import Node
from castore.errors import DeadlineExceeded, IsADirectory, NoAttribute, from_text
from castore.failpoint import failpoint
from castore.ingest.service import Ingest
from castore.ingest.tree import INGEST_ROOT, PRODUCER, RETENTION_CLASS
from mount.attributes import CHANGING_SECONDS, INGEST_SECONDS, absent, make, of_node
from mount.guard import waits
from mount.handles import StagedHandle
from mount.packages import PAGE
from mount.recent import Child

STATE = b"user.castore.state"
ERROR = b"user.castore.error"


class IngestFiles:
    """The writable tree."""

    def __init__(self, ingest: Ingest) -> None:
        self.tree = ingest.tree
        self.staged = ingest.files
        self._ingest = ingest
        self._started_ns = time.time_ns()

    def has(self, inode: int) -> bool:
        """Whether the inode is in this tree now."""
        return inode == INGEST_ROOT or self.tree.find(inode) is not None

    # looking

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Attributes of anything in the tree. ingest/ itself is as /tmp: anyone may make a NAME."""
        if inode == INGEST_ROOT:
            return make(
                INGEST_ROOT,
                stat.S_IFDIR | stat.S_ISVTX | 0o777,
                uid=os.getuid(),
                gid=os.getgid(),
                mtime_ns=self._started_ns,
                seconds=CHANGING_SECONDS,
            )
        return of_node(self.tree.get(inode))

    def lookup(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        """Attributes of a name, or the answer that it is absent: only this mount can make it."""
        node = self.tree.lookup(parent, name)
        return absent(INGEST_SECONDS) if node is None else of_node(node)

    def parent(self, inode: int) -> int:
        """The directory above a directory."""
        return 1 if inode == INGEST_ROOT else self.tree.parent(inode)

    def children(self, inode: int, after: int) -> Iterator[Child]:
        """The entries of a directory with a cookie above `after`."""
        while page := self.tree.children(inode, after, PAGE):
            for cookie, name, node in page:
                yield cookie, name, of_node(node)
            after = page[-1][0]

    def readlink(self, inode: int) -> bytes:
        """The target of a symbolic link."""
        return self.tree.readlink(inode)

    # attributes that users ask for

    async def attribute(self, inode: int, name: bytes) -> bytes:
        """An extended attribute, computed or set. Raises NoAttribute."""
        if inode == INGEST_ROOT or not name.startswith(b"user."):
            raise NoAttribute("no such attribute")
        node = self.tree.get(inode)
        computed = await self._computed(node, name) if name.startswith((b"user.castore.", b"user.hash.")) else b""
        return computed or self.tree.attribute(inode, name)

    async def _computed(self, node: Node, name: bytes) -> bytes:
        if node.kind is Kind.FILE and name == STATE:
            error = self._ingest.store.error(node.inode) if node.state == "failed" else ""
            return f"failed: {from_text(error)}".encode() if error else node.state.encode()
        if node.kind is Kind.FILE and name in (b"user.castore.digest", b"user.hash.sha256"):
            summary = self._ingest.store.summary(node.inode)
            if summary is None:
                return b""
            return (summary.digest.hex if name.endswith(b".sha256") else str(summary.digest)).encode()
        if node.is_version and name == ERROR:
            return self._ingest.store.error(node.inode).encode()
        if node.is_version and name in (PRODUCER, RETENTION_CLASS):
            labels = await self._ingest.labels.labels(node.inode)
            return (labels.producer if name == PRODUCER else labels.retention_class).encode()
        return b""

    # files

    async def open(self, inode: int, flags: int) -> StagedHandle:
        """A handle on a file; O_TRUNC cuts it, as Linux does even where the handle can only read."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if flags & os.O_TRUNC and not writable:
            await self.set_size(inode, 0, None)
        handle = self._open(inode, writable=writable)
        if flags & os.O_TRUNC and writable:
            try:
                self.staged.truncate(handle.file, 0)
            except BaseException:
                self.staged.abandon(handle.file)
                raise
        return handle

    def _open(self, inode: int, *, writable: bool) -> StagedHandle:
        node = self.tree.get(inode)
        if node.kind is Kind.DIRECTORY:
            raise IsADirectory("not a file")
        if writable:
            self.tree.check_writable(node)
        return StagedHandle(self.staged.open(node, writable=writable), writable)

    async def create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, flags: int = os.O_WRONLY
    ) -> tuple[StagedHandle, Node]:
        """A new file and its first handle."""
        node = self.tree.create(parent, name, mode=mode, uid=uid, gid=gid)
        try:
            file = self.staged.create(node)
        except OSError:
            self.tree.unlink(parent, name)  # no descriptor, no room: then no name either
            raise
        failpoint("file.created")
        handle = StagedHandle(file, writable=True)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            return handle, node
        # Nobody writes through it: it must not hold up a publish.
        reader = self._open(node.inode, writable=False)
        await self.staged.release(file, writable=True)
        return reader, node

    async def set_size(self, inode: int, size_bytes: int, handle: StagedHandle | None) -> None:
        """truncate and ftruncate."""
        if handle is not None and handle.writable:
            self.staged.truncate(handle.file, size_bytes)
            return
        temporary = self._open(inode, writable=True)
        try:
            self.staged.truncate(temporary.file, size_bytes)
        finally:
            await self.staged.release(temporary.file, writable=True)

    async def publish(self, inode: int, name: str, version: bytes, *, wait_seconds: float) -> None:
        """Publish a version; what may go wrong, Publisher.publish says."""
        await self._ingest.publisher.publish(inode, name, version, wait_seconds=wait_seconds)

    async def sync_directory(self, inode: int, *, wait_seconds: float) -> None:
        """fsync of a directory: its names are durable; of a VERSION also: all closed files below are stored."""
        await self.staged.sync_names()
        node = self.tree.find(inode)
        if node is None or not node.is_version:
            return
        with waits.within(wait_seconds):
            await self._ingest.publisher.wait_stored(inode)
            return
        raise DeadlineExceeded(f"not everything was stored within {wait_seconds:g} s, or the daemon ends; sync again")
