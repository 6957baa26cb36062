"""Staged files: the bytes below staging/data, open handles on them, and their digests. Names are not known here.

A file is *dirty* from its first change until its digest is in the workspace. While it is written front to back it is
hashed behind the writer; otherwise once more from the disk after the last writer is gone.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from castore.blobs.disk_cache import DiskCache
from castore.catalog.workspace import Node, WorkspaceStore
from castore.digest import XXH3, BlobHasher, BlobSummary
from castore.errors import NotOpen, ReadOnly, StagingFull, StateError
from castore.failpoint import failpoint
from castore.ingest.disk_room import DiskRoom
from castore.ingest.hashing import INLINE_BYTES, HashQueue, hash_file
from castore.ingest.pulse import Signal
from castore.ingest.room import StagingRoom
from castore.ingest.spare_files import SpareFiles
from castore.ingest.staged_file import StagedFile

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 1.0
"""Between tries to note a digest while the workspace cannot be written."""
ROOM_SECONDS: Final = 30.0
"""How long a write waits for room that a publish may give back; then it is ENOSPC. Longer than a publish by rename
waits for puts (`ingest.publish_wait`, 5 s), and no longer than somebody bears whose Ctrl-C such a write holds up."""


@dataclass(slots=True)
class _Watched:
    """How often a file changed since the first of its watchers came, and how many they are."""

    changes: int = 0
    watchers: int = 0


class StagedFiles:
    """All staged files of a daemon, within the bounds on staged bytes."""

    def __init__(
        self,
        store: WorkspaceStore,
        folder: Path,
        *,
        hashes: HashQueue,
        max_bytes: int,
        max_bytes_per_user: int = 0,
        block_digest: str = XXH3,
        on_staged: Callable[[], None] = lambda: None,
        on_lost: Callable[[int], None] = lambda _: None,
        cache: DiskCache | None = None,
        spares: SpareFiles | None = None,
    ) -> None:
        self._spares = spares
        self._store = store
        self.folder = folder
        self._hashes = hashes
        self._block_digest = block_digest
        self._on_staged = on_staged
        self._cache = cache
        self._on_lost = on_lost
        """Called with the inode when the bytes that a file was staged with change, or are discarded."""
        self._open: dict[int, StagedFile] = {}
        self._closed: deque[int] = deque()
        """Inodes whose bytes nobody writes any more and that have to be read for their digest; 8 bytes for each."""
        self._has_closed = trio.Event()
        self._watched: dict[int, _Watched] = {}
        """Files that are being put."""
        self.room = StagingRoom(
            store.staged_bytes_by_user(), max_bytes=max_bytes, max_bytes_per_user=max_bytes_per_user
        )
        self.disk = DiskRoom(folder)
        self.released = Signal()
        """Pulsed whenever a writer is gone or a digest is there."""

    # looking

    def path(self, inode: int) -> Path:
        """Where an inode's bytes lie."""
        return Path(self._place(inode))

    def _place(self, inode: int) -> str:
        """As `path`: a Path takes ten microseconds to make, for each file that is copied in."""
        return f"{self.folder}/{inode:x}"

    def open_file(self, inode: int) -> StagedFile | None:
        """The file if it is open or being hashed."""
        return self._open.get(inode)

    def open_in(self, version_inode: int) -> Iterator[StagedFile]:
        """The open files of a version."""
        return (file for file in self._open.values() if file.version_inode == version_inode)

    def follow(self, version_inode: int) -> None:
        """Names moved out of a version: its open files learn in which version they lie now."""
        for file in self.open_in(version_inode):
            node = self._store.node(file.inode)
            if node is not None:
                file.version_inode = node.version_inode

    def unnoted_bytes(self) -> int:
        """By how much open files are larger than they were when last closed."""
        dirty = [file for file in self._open.values() if file.is_dirty and not file.is_published]
        return sum(
            file.size_bytes - node.size_bytes for file in dirty if (node := self._store.node(file.inode)) is not None
        )

    @property
    def staged_bytes(self) -> int:
        """Bytes of all staged files."""
        return self.room.staged_bytes

    @property
    def max_bytes(self) -> int:
        """The bound on all staged bytes."""
        return self.room.max_bytes

    # recovery

    def measure(self, node: Node) -> None:
        """After a kill: size and time of a file that was receiving are what the disk says."""
        path = self.path(node.inode)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        self._store.note_bytes(
            node.inode, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns, changed_ns=status.st_ctime_ns
        )
        self.room.take(node.uid, status.st_size - node.size_bytes)

    # handles

    def expect(self) -> None:
        """A directory was made: files will follow."""
        if self._spares is not None:
            self._spares.expect()

    def create(self, node: Node) -> StagedFile:
        """Open a new node's empty file for writing: one handle, one writer."""
        place = self._place(node.inode)
        made_ahead = self._spares is not None and self._spares.take(place)
        flags = os.O_RDWR | os.O_CLOEXEC if made_ahead else os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        file = StagedFile(node, os.open(place, flags, 0o600))
        if made_ahead:
            file.set_mtime(node.mtime_ns)
        file.hasher = self.new_hasher()
        file.handles = file.writers = 1
        self._open[node.inode] = file
        return file

    def open(self, node: Node, *, writable: bool) -> StagedFile:
        """A handle on a node's bytes."""
        file = self._open.get(node.inode)
        if file is None:
            file = StagedFile(node, os.open(self._place(node.inode), os.O_RDWR | os.O_CLOEXEC))
            self._open[node.inode] = file
        file.handles += 1
        file.writers += writable
        return file

    async def release(self, file: StagedFile, *, writable: bool) -> None:
        """A handle is gone; with the last writer the digest is computed if it is not known yet."""
        file.handles -= 1
        file.writers -= writable
        try:
            if writable and not file.writers:
                await self._finish(file, rehash=True)
        except StateError:
            self.rehash(file.inode)  # nobody else comes back to it
            raise
        finally:
            self._close_if_unused(file)
            self.released.pulse()

    def abandon(self, file: StagedFile) -> None:
        """A handle for writing that was opened for nothing is gone, with no change made by it."""
        file.handles -= 1
        file.writers -= 1
        self._close_if_unused(file)
        self.released.pulse()

    async def flush(self, file: StagedFile) -> None:
        """A descriptor was closed: commit size and time; the digest too when the bytes came front to back."""
        if not file.is_dirty or file.is_published:
            return
        file.is_flushed = True
        await self._finish(file, rehash=False)

    def _close_if_unused(self, file: StagedFile) -> None:
        if file.handles or file.pending or self._open.get(file.inode) is not file:
            return
        del self._open[file.inode]
        os.close(file.descriptor)
        if file.is_published:
            return
        try:
            node = self._store.node(file.inode)
            if node is None or node.nlink == 0:
                self.remove(file.inode, file.uid, file.size_bytes)
                self._store.delete_node(file.inode)
        except StateError as exc:
            log.warning("whether staged file %x is unlinked is looked at again at the next start: %s", file.inode, exc)

    # bytes

    @staticmethod
    def read(file: StagedFile, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end."""
        return os.pread(file.descriptor, length, offset)

    async def write(self, file: StagedFile, offset: int, data: bytes) -> int:
        """Write bytes; returns how many, fewer only when the disk is full. Raises StagingFull and OSError.

        Waits while there is no room, and a publish of another version is about to make some, where the user is at their
        own bound of some bytes of theirs; ROOM_SECONDS at most.
        """
        if offset + len(data) > file.size_bytes and not file.is_published:
            await self._wait_for_room(file, offset, len(data))
        self._begin_change(file)
        grow = max(0, offset + len(data) - file.size_bytes)
        self.room.reserve(file.uid, grow)
        written = 0
        try:
            written = _pwrite_all(file.descriptor, data, offset)
        finally:
            end = offset + written
            grown = max(0, end - file.size_bytes) if written else 0
            self.room.take(file.uid, grown - grow)
            file.size_bytes += grown
        file.touch()
        failpoint("file.written")
        hasher = file.hasher
        if hasher is not None:
            if offset != file.hash_end or written != len(data):
                file.hasher = None
            else:
                file.hash_end = end
                await self._hash(file, hasher, data)
        return written

    async def _wait_for_room(self, file: StagedFile, offset: int, size_bytes: int) -> None:
        """Until a write fits; no checkpoint if it does already. Raises StagingFull."""
        full = self._lack(file, offset, size_bytes)
        if full is not None:
            with trio.move_on_after(ROOM_SECONDS):
                while full is not None and self._room_may_come(file, offset + size_bytes - file.size_bytes):
                    await self.room.changed.wait()
                    full = self._lack(file, offset, size_bytes)
        if full is not None:
            raise full

    def _room_may_come(self, file: StagedFile, grow_bytes: int) -> bool:
        """Whether a publish of another version is under way that helps: at the user's own bound, of bytes of theirs."""
        leaving = self.room.leaving_beside(file.version_inode)
        if not self.room.is_users_own(file.uid, grow_bytes):
            return bool(leaving)
        return any(self._store.has_bytes_of(file.uid, version_inode) for version_inode in leaving)

    def _lack(self, file: StagedFile, offset: int, size_bytes: int) -> StagingFull | None:
        """Why a write does not fit, if it does not. Costs a microsecond."""
        if size_bytes > self.disk.left_bytes(os.fstatvfs(file.descriptor)):
            return StagingFull("the disk of the staging folder is full")
        return self.room.lack(file.uid, offset + size_bytes - file.size_bytes)

    def truncate(self, file: StagedFile, size_bytes: int) -> None:
        """Cut or extend with zeros. Raises StagingFull and OSError."""
        self._begin_change(file)
        grow = size_bytes - file.size_bytes
        self.room.reserve(file.uid, grow)
        try:
            os.ftruncate(file.descriptor, size_bytes)
        except OSError:
            self.room.take(file.uid, -grow)
            raise
        file.size_bytes = size_bytes
        file.touch()
        file.hasher = self.new_hasher() if size_bytes == 0 and not file.pending else None
        file.hash_end = 0

    def _begin_change(self, file: StagedFile) -> None:
        if file.is_published:
            raise ReadOnly("the file was published")
        if not file.writers:
            raise NotOpen("the handle is not open for writing")
        if not file.is_dirty:
            self._store.clear_summary(file.inode)
            file.is_dirty = True
            file.hasher = None
            self._on_lost(file.inode)
        if file.inode in self._watched:
            self._watched[file.inode].changes += 1
        file.changed()

    async def _hash(self, file: StagedFile, hasher: BlobHasher, data: bytes) -> None:
        if not file.pending and len(data) <= INLINE_BYTES:
            hasher.update(data)
            return

        def done() -> None:
            file.pending -= 1
            self._close_if_unused(file)

        file.pending += 1
        try:
            await self._hashes.put(lambda: hasher.update(data), done)
        except BaseException:
            # The writer waited for too long, or the daemon ends: the digest is made from the disk.
            file.pending -= 1
            file.hasher = None
            raise

    # digests

    def new_hasher(self) -> BlobHasher:
        """For the bytes of one file, with the checksums that this store is set to."""
        return BlobHasher(checksum_algorithm=self._block_digest)

    async def _finish(self, file: StagedFile, *, rehash: bool) -> None:
        """Bring size and time into the workspace, and the digest: now or by a queued job."""
        if not file.is_dirty or file.is_published:
            return
        hasher, changes = file.hasher, file.changes
        if file.summary_of_changes == changes:
            return  # it is on its way: a release follows the flush that queued it
        if hasher is not None and file.hash_end == file.size_bytes:
            file.hasher = None
            if not file.pending:
                self._staged(file, hasher.finish(), changes)
                return
        else:
            hasher = None
        self._note(file)
        file.set_mtime(file.mtime_ns)
        if hasher is not None:
            await self._queue_summary(file, hasher, changes)
        elif rehash:
            self.rehash(file.inode)

    def _note(self, file: StagedFile) -> None:
        self._store.note_bytes(
            file.inode, size_bytes=file.size_bytes, mtime_ns=file.mtime_ns, changed_ns=file.changed_ns
        )

    async def _queue_summary(self, file: StagedFile, hasher: BlobHasher, changes: int) -> None:
        """The digest is there once the chunks before it are hashed."""
        result: list[BlobSummary] = []

        def done() -> None:
            file.pending -= 1
            try:
                self._staged(file, result[0], changes)
            except StateError:
                self.rehash(file.inode)
            self._close_if_unused(file)

        file.pending += 1
        file.summary_of_changes = changes
        try:
            await self._hashes.put(lambda: result.append(hasher.finish()), done)
        except BaseException:
            file.pending -= 1
            file.summary_of_changes = -1
            self.rehash(file.inode)
            raise

    def rehash(self, inode: int) -> None:
        """Have the digest computed from the disk, unless someone begins to write before its turn."""
        self._closed.append(inode)
        self._has_closed.set()

    async def run(self) -> None:
        """Read closed files for their digests, one at a time, until cancelled."""
        while True:
            await self._has_closed.wait()
            while self._closed:
                inode = self._closed.popleft()
                try:
                    await self._hash_closed(inode)
                except (StateError, OSError) as exc:  # the workspace is full, or no descriptor is left: both pass
                    log.warning("staged file %x has no digest yet: %s", inode, exc)
                    self._closed.append(inode)
                    await trio.sleep(RETRY_SECONDS)
            self._has_closed = trio.Event()

    async def _hash_closed(self, inode: int) -> None:
        node = self._store.node(inode)
        if node is None or node.state != "receiving" or not node.nlink:
            return
        try:
            file = self.open(node, writable=False)
        except FileNotFoundError as exc:
            self._store.update_node(inode, state="failed", error=f"SourceChanged: cannot be read: {exc.strerror}")
            self.released.pulse()
            return
        try:
            if file.writers or not file.is_dirty:
                return  # whoever writes it has it hashed in the end
            changes = file.changes
            self._staged(file, await trio.to_thread.run_sync(hash_file, file.descriptor, self._block_digest), changes)
        except OSError as exc:
            self._store.update_node(inode, state="failed", error=f"SourceChanged: cannot be read: {exc.strerror}")
            self.released.pulse()
        finally:
            await self.release(file, writable=False)

    def added(self) -> None:
        """Files were staged by `IngestTree.add_staged`."""
        self._on_staged()
        self.released.pulse()

    # puts

    def watch(self, inode: int) -> int:
        """From here on, count changes of the file's bytes; returns the count to compare with. Ends by `unwatch`."""
        watched = self._watched.setdefault(inode, _Watched())
        watched.watchers += 1
        return watched.changes

    def changed_since(self, inode: int, count: int) -> bool:
        """Whether the bytes changed since `watch` returned that count, even if they were changed back."""
        return self._watched[inode].changes != count

    def unwatch(self, inode: int) -> None:
        """One watcher less."""
        self._watched[inode].watchers -= 1
        if not self._watched[inode].watchers:
            del self._watched[inode]

    def _staged(self, file: StagedFile, summary: BlobSummary, changes: int) -> None:
        if changes != file.changes or not file.is_dirty:
            return  # changed meanwhile: whoever changed it will finish it
        failpoint("file.closing")
        self._store.set_summary(file.inode, summary, mtime_ns=file.mtime_ns, changed_ns=file.changed_ns)
        file.is_dirty = False
        self._seed(file, summary)
        failpoint("file.staged")
        self._on_staged()
        self.released.pulse()

    def _seed(self, file: StagedFile, summary: BlobSummary) -> None:
        """A small file goes to the cache at once. What of it cannot be read does not: its put says so."""
        if self._cache is None or not 0 < file.size_bytes <= self._cache.seed_bytes:
            return
        try:
            data = os.pread(file.descriptor, file.size_bytes, 0)
        except OSError as exc:
            log.debug("staged file %x is not cached: %s", file.inode, exc)
            return
        if len(data) == file.size_bytes:
            self._cache.keep(summary, 0, memoryview(data))

    # durability and the end

    async def sync(self, file: StagedFile) -> None:
        """fsync: the file's bytes, its size and its names survive power loss. Raises OSError."""
        if file.is_published:
            return
        self._note(file)
        await trio.to_thread.run_sync(self._sync_blocking, file.descriptor)

    async def sync_names(self) -> None:
        """Make every name committed so far durable."""
        await trio.to_thread.run_sync(self._sync_blocking, None)

    def _sync_blocking(self, descriptor: int | None) -> None:
        if descriptor is not None:
            os.fsync(descriptor)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._store.sync()

    def change_owner(self, inode: int, old_uid: int, new_uid: int, size_bytes: int) -> None:
        """Count a file's bytes for another user."""
        self.room.take(old_uid, -size_bytes)
        self.room.take(new_uid, size_bytes)
        file = self._open.get(inode)
        if file is not None:
            file.uid = new_uid

    def remove(self, inode: int, uid: int, size_bytes: int) -> None:
        """The last name is gone: remove the bytes."""
        self._remove_bytes(inode, uid, size_bytes)
        self._on_lost(inode)

    def _remove_bytes(self, inode: int, uid: int, size_bytes: int) -> None:
        try:
            os.unlink(self._place(inode))
        except FileNotFoundError:
            pass
        except OSError as exc:
            # The name is gone, whatever the disk says: nobody can do anything about it now.
            log.warning("staged bytes %x stay until the next start: %s", inode, exc)
        self.room.take(uid, -size_bytes)

    def publish(self, nodes: Iterable[tuple[Node, BlobSummary | None]]) -> None:
        """These files are published: open handles can only read on, the staged bytes go, into the cache if it can."""
        for node, summary in nodes:
            if summary is not None and self._cache is not None:
                self._cache.adopt(summary, self.path(node.inode))
            file = self._open.get(node.inode)
            if file is not None:
                file.is_published = True
            self._remove_bytes(node.inode, node.uid, node.size_bytes)
            failpoint("publish.forgetting")

    def close(self) -> None:
        """Close every descriptor; what is open stays dirty in the workspace, for recovery."""
        for file in self._open.values():
            if file.is_dirty and not file.is_published:
                self._note(file)
            os.close(file.descriptor)
        self._open.clear()


def _pwrite_all(descriptor: int, data: bytes, offset: int) -> int:
    written = 0
    view = memoryview(data)
    while written < len(data):
        try:
            written += os.pwrite(descriptor, view[written:], offset + written)
        except OSError:
            if not written:
                raise
            break  # the caller gets what was written now, and the error with its next write
    return written
