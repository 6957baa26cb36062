"""The `local` backend: a directory of files, written durably. Not a cache, and not the staging folder.

Objects are `PATH/<key>`, files 0600 in folders 0700. Several processes may use one PATH at a time.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

import trio

from castore.digest import Digest
from castore.errors import ObjectMissing, ObjectTruncated, StorageError
from castore.storage.backends.durable import DurableTree
from castore.storage.backends.local_probe import probe_local
from castore.storage.backends.oserrors import storage_errors
from castore.storage.layout import digest_of, key_of
from castore.storage.pages import Pages
from castore.storage.receive import receiving_view
from castore.storage.source import read_exactly
from castore.storage.spi import BackendHealth, ObjectInfo, ProbeReport, Source, TakerT

T = TypeVar("T")

WRITE_THREADS: Final = 8
"""Puts and deletes at a time. A durable 4 KiB put costs 0.45 ms with one thread, 0.16 ms with 8; more gain nothing."""
READ_THREADS: Final = 16
"""Reads that wait for the disk at a time. Cold reads of 128 KiB cost 0.21 ms with one thread, 0.13 ms with 4 and with
any more; the others are there for when a slow disk holds some."""
SWEEP_GRACE_S: Final = 3600.0
"""Age in seconds at which a temporary file that nobody locks is abandoned: far beyond the moment before it is locked,
also when the clocks of two hosts differ."""
LOW_FREE_BYTES: Final = 1 << 30
"""Free space below which health warns: room for a few large files while the operator reacts."""
LOW_FREE_INODES: Final = 10_000
"""The same for files, on file systems that bound their number."""

_INLINE_BYTES: Final = 1 << 20
"""Bytes copied from the page cache before other tasks get their turn; about 100 microseconds."""
_SCAN_BYTES: Final = 1 << 19
"""A piece of a scan: fits into a core's cache, where SHA-256 takes 0.6 of the time that it takes from memory. With half
of it the scanning threads wait for the interpreter twice as often, which costs 5 % of the time; twice is no faster."""
_RECENT_PATHS: Final = 1024
"""Paths that may be read without a thread: 8 microseconds for 4 KiB instead of 60."""
_PAGE_OBJECTS: Final = 1000
"""Objects listed in one visit to a thread, which costs 50 microseconds, and a `stat` each."""
_PAGE_FOLDERS: Final = 256
"""Folders swept in one visit to a thread."""
_ALGORITHM: Final = re.compile("[a-z0-9-]+")
_BYTE: Final = re.compile("[0-9a-f]{2}")


class LocalBackend:
    """Objects in a directory. Making one touches no disk; `create` makes the directory.

    A missing directory raises StorageUnavailable from everything but `health`, and is never made by `put`. Disk calls
    run in threads that are abandoned on cancellation: a disk that hangs costs threads, up to the bounds, but no caller.
    """

    backend_type = "local"

    def __init__(
        self, backend_id: str, path: Path, *, write_threads: int = WRITE_THREADS, read_threads: int = READ_THREADS
    ) -> None:
        self.backend_id = backend_id
        self.path = path
        self._tree = DurableTree(path)
        self._recent: dict[str, None] = {}  # paths read lately, oldest first, on a file system that knows RWF_NOWAIT
        self.write_threads = write_threads
        self.read_threads = read_threads
        self._writers = trio.CapacityLimiter(write_threads)
        self._readers = trio.CapacityLimiter(read_threads)

    async def create(self) -> bool:
        """Make the directory, with a mark by which it is known again; False when it is there. Raises StorageError."""
        return await self._in_thread(self._writers, f"create {self.path}", self._tree.create)

    async def put(self, digest: Digest, source: Source) -> None:
        permit = _Permit()
        try:
            await self._in_thread(self._writers, f"put {digest}", partial(self._put, digest, source, permit))
        finally:
            permit.withdraw()  # a thread that was abandoned must not make the object visible later

    def _put(self, digest: Digest, source: Source, permit: _Permit) -> None:
        folder, _, name = key_of(digest).rpartition("/")

        def fill(fd: int) -> None:
            with closing(read_exactly(digest, source)) as chunks:
                for chunk in chunks:
                    if permit.withdrawn:
                        raise _Withdrawn
                    _write_all(fd, chunk)

        self._tree.write(folder, name, fill=fill, commit=permit.use)

    async def get(
        self, digest: Digest, *, offset: int, length: int, into: bytearray | memoryview | None = None
    ) -> memoryview:
        target = receiving_view(offset, length, into)
        path = self._path(digest)
        done = 0
        await trio.lowlevel.checkpoint()
        while done < length:
            count = self._read_cached(path, target[done : done + _INLINE_BYTES], offset + done)
            if count == 0:
                break
            done += count
            if done < length:
                await trio.lowlevel.checkpoint()
        if done < length or length == 0:
            # The thread has a buffer of its own: it may be abandoned, and then must not touch the caller's.
            rest = target[done:] if into is None else memoryview(bytearray(length - done))
            work = partial(self._read, digest, rest, offset + done)
            knows_nowait = await self._in_thread(self._readers, f"get {digest}", work)
            if into is not None:
                target[done:] = rest
            if knows_nowait:
                self._remember(path)
        return target

    def _read(self, digest: Digest, buffer: memoryview, offset: int) -> bool:
        """Fill the buffer; whether the next read may try `_read_cached`."""
        fd = self._open(digest)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(fd, [buffer[done:]], offset + done)
                if count == 0:
                    raise self._truncated(digest, offset + len(buffer))
                done += count
            return _read_nowait(fd, memoryview(bytearray(1)), offset) > 0
        finally:
            os.close(fd)

    def _open(self, digest: Digest) -> int:
        try:
            # Not blocking: should a pipe lie there, opening it would wait for a writer, for ever.
            fd = os.open(self._path(digest), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as exc:  # the second: a file is where a folder was
            raise self._missing(digest) from exc
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise self._missing(digest)
        return fd

    @property
    def scans(self) -> bool:
        return True

    async def scan(self, digest: Digest, *, offset: int, length: int, begin: Callable[[], TakerT]) -> TakerT:
        permit = _Permit()
        try:
            work = partial(self._scan, digest, offset, length, begin, permit)
            return await self._in_thread(self._readers, f"get {digest}", work)
        finally:
            permit.withdraw()

    def _scan(self, digest: Digest, offset: int, length: int, begin: Callable[[], TakerT], permit: _Permit) -> TakerT:
        fd = self._open(digest)
        try:
            taker, piece, done = begin(), memoryview(bytearray(min(length, _SCAN_BYTES))), 0
            while done < length and not permit.withdrawn:
                count = os.preadv(fd, [piece[: length - done]], offset + done)
                if count == 0:
                    raise self._truncated(digest, offset + length)
                taker.update(piece[:count])
                done += count
            return taker
        finally:
            os.close(fd)

    def _read_cached(self, path: str, buffer: memoryview, offset: int) -> int:
        """Read what is in memory, without a thread: the number of bytes, 0 when a thread has to look.

        Only a path that was read lately is opened here: its folders are in memory too, so nothing waits for a disk.
        """
        if path not in self._recent:
            return 0
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # met again, and reported, in the thread
            return 0
        try:
            return _read_nowait(fd, buffer, offset)
        finally:
            os.close(fd)

    def _remember(self, path: str) -> None:
        self._recent.pop(path, None)
        self._recent[path] = None
        if len(self._recent) > _RECENT_PATHS:
            del self._recent[next(iter(self._recent))]

    async def head(self, digest: Digest) -> ObjectInfo:
        return await self._in_thread(self._readers, f"head {digest}", partial(self._head, digest))

    def _head(self, digest: Digest) -> ObjectInfo:
        try:
            status = os.stat(self._path(digest))
        except (FileNotFoundError, NotADirectoryError) as exc:  # the second: a file is where a folder was
            raise self._missing(digest) from exc
        if not stat.S_ISREG(status.st_mode):
            raise self._missing(digest)
        return ObjectInfo(digest, status.st_size, status.st_mtime_ns)

    async def delete(self, digest: Digest) -> None:
        folder, _, name = key_of(digest).rpartition("/")
        await self._in_thread(self._writers, f"delete {digest}", partial(self._tree.remove, folder, name))

    async def abandon(self, digest: Digest) -> None:
        # Whoever still writes to a temporary file holds its lock, but for the moment between making and locking it:
        # then that put fails for now, and is tried again.
        folder, _, _ = key_of(digest).rpartition("/")
        await self._in_thread(self._readers, f"abandon {digest}", partial(self._abandon, folder))

    def _abandon(self, folder: str) -> None:
        self._tree.require_root()
        self._tree.sweep(folder, grace_ns=0)

    @asynccontextmanager
    async def list(self, algorithm: str, *, prefix: str = "") -> AsyncIterator[AsyncIterator[ObjectInfo]]:
        objects = self._objects(algorithm, prefix)

        async def next_page() -> Iterable[ObjectInfo]:
            page = partial(tuple[ObjectInfo, ...], islice(objects, _PAGE_OBJECTS))
            return await self._in_thread(self._readers, f"list {algorithm}:{prefix}", page)

        yield Pages(next_page)

    def _objects(self, algorithm: str, prefix: str) -> Iterator[ObjectInfo]:
        """For threads: reads one folder of objects at a time."""
        self._tree.require_root()
        for folder in self._folders(algorithm, prefix):
            for name in self._tree.names(folder):
                digest = digest_of(f"{folder}/{name}")
                if digest is None or not name.startswith(prefix):
                    continue
                try:
                    status = os.stat(self.path / folder / name)
                except FileNotFoundError:  # deleted meanwhile
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield ObjectInfo(digest, status.st_size, status.st_mtime_ns)

    def _folders(self, algorithm: str, prefix: str = "") -> Iterator[str]:
        for first in self._tree.names(algorithm):
            if _BYTE.fullmatch(first) and first.startswith(prefix[:2]):
                for second in self._tree.names(f"{algorithm}/{first}"):
                    if _BYTE.fullmatch(second) and second.startswith(prefix[2:4]):
                        yield f"{algorithm}/{first}/{second}"

    async def sweep(self, *, grace_s: float = SWEEP_GRACE_S, is_wanted: Callable[[Digest], bool] | None = None) -> int:
        """Remove what puts of dead processes left behind and nobody changed for `grace_s` seconds; how many files.

        Safe at any time, beside puts of this and of other processes. What is wanted makes no difference: no put goes
        on from what another left.
        """
        counts = self._sweep(int(grace_s * 1e9))
        removed = 0
        while page := await self._in_thread(self._writers, "sweep", lambda: tuple(islice(counts, _PAGE_FOLDERS))):
            removed += sum(page)
        return removed

    def _sweep(self, grace_ns: int) -> Iterator[int]:
        self._tree.require_root()
        for algorithm in self._tree.names(""):
            if _ALGORITHM.fullmatch(algorithm):
                for folder in self._folders(algorithm):
                    yield self._tree.sweep(folder, grace_ns=grace_ns)

    async def health(self) -> BackendHealth:
        try:
            return await self._in_thread(self._readers, "health", self._health)
        except StorageError as exc:
            return BackendHealth("fail", str(exc))

    def _health(self) -> BackendHealth:
        self._tree.require_root()
        space = os.statvfs(self.path)
        free = space.f_bavail * space.f_frsize
        if not os.access(self.path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            return BackendHealth("fail", f"{self.path} cannot be written", free)
        if free < LOW_FREE_BYTES:
            return BackendHealth("warn", f"{self.path} has only {free >> 20} MiB left", free)
        if space.f_files and space.f_favail < LOW_FREE_INODES:
            return BackendHealth("warn", f"{self.path} has room for only {space.f_favail} more files", free)
        return BackendHealth("pass", f"{self.path} has {free >> 30} GiB left", free)

    async def probe(self) -> ProbeReport:
        return await probe_local(self.backend_id, self.path)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _in_thread(self, limiter: trio.CapacityLimiter, what: str, work: Callable[[], T]) -> T:
        with storage_errors(f"backend {self.backend_id}: {what}"):
            return await trio.to_thread.run_sync(
                work, abandon_on_cancel=True, limiter=limiter, thread_name=f"castore {self.backend_id}"
            )

    def _path(self, digest: Digest) -> str:
        return f"{self.path}/{key_of(digest)}"

    def _truncated(self, digest: Digest, end: int) -> ObjectTruncated:
        return ObjectTruncated(f"backend {self.backend_id}: {digest} ends before byte {end}")

    def _missing(self, digest: Digest) -> ObjectMissing:
        self._tree.require_root()  # of a disk that is not mounted nothing is known
        return ObjectMissing(f"backend {self.backend_id}: no object {digest}")


def _read_nowait(fd: int, buffer: memoryview, offset: int) -> int:
    """Read without waiting for a disk; 0 at the end, when it would wait, or where the file system cannot promise it."""
    try:
        return os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError:
        return 0


class _Withdrawn(Exception):
    """Ends a thread that nobody waits for any more."""


class _Permit:
    """Leave to make one object visible, used or withdrawn once, whichever comes first. For two threads."""

    def __init__(self) -> None:
        self._once = threading.Lock()
        self.withdrawn = False

    def use(self) -> bool:
        return self._once.acquire(blocking=False)

    def withdraw(self) -> None:
        self.withdrawn = self._once.acquire(blocking=False)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
