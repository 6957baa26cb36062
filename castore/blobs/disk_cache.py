"""The disk cache of blocks: looked at before a backend is asked, filled behind the readers. Not what finds its files.

Nothing that happens to its folder makes a read fail or wait for long: what cannot be read is missing, what cannot be
written is not kept. Blocks that it gives are checked.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from castore.blobs.cache_files import CacheFiles, CacheWriter, Found, Runs
from castore.blobs.cache_room import CacheRoom
from castore.blobs.stats import ReadStats
from castore.catalog.tiny import TinyBlobs
from castore.config import Config, LocalSettings
from castore.digest import BlobSummary, Digest, block_checksum
from castore.errors import StateError

QUEUE_BYTES: Final = 64 * 1024 * 1024
"""Blocks that wait to be written; as much as is kept in memory, where most of them are, too.
Beyond it they are not kept: a slow disk must not slow readers down."""

READ_THREADS: Final = 8
"""Reads of the cache at a time: enough for a disk that likes several requests."""

READ_SECONDS: Final = 5.0
"""A disk that does not answer for so long is not asked again for PAUSE_SECONDS: the backends may be quicker."""

PAUSE_SECONDS: Final = 30.0
"""After a failed write, nothing is written for so long: a full or broken disk is not asked with every block."""

REPORT_SECONDS: Final = 60.0
"""Between two lines of log about damaged blocks, or reads that fail."""

FLUSH_SECONDS: Final = 2.0
"""At the end, for what waits to be written."""

INLINE_BYTES: Final = 1024 * 1024
"""Copied from the page cache and checked on the loop before other tasks get their turn; about 200 microseconds."""

TINY_BATCH: Final = 256
"""Small blobs that share a transaction, while they wait together."""

LINGER_SECONDS: Final = 0.25
"""What is to be written waits so long for more, unless TINY_BATCH blobs or LINGER_BYTES wait: whoever reads small files
one after the other would have a visit to the thread, and a transaction, for each of them."""

LINGER_BYTES: Final = 4 * 1024 * 1024
"""Written at once, and what comes meanwhile with it: large files fill the queue in less than LINGER_SECONDS."""

_log = logging.getLogger(__name__)


class CacheStalledError(Exception):
    """The disk does not answer. The thread that waits for it may yet write to the buffer: it must not be used again."""


@dataclass(frozen=True, slots=True)
class _Write:
    summary: BlobSummary
    first: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class CacheState:
    """How the cache is. `used_bytes` is -1 before files were counted, `problem` empty unless it is paused."""

    dir: str
    max_bytes: int
    used_bytes: int
    file_count: int
    evicted_files: int
    tiny_used_bytes: int
    queued_bytes: int
    problem: str


class DiskCache:
    """One folder of cached blocks, shared with other processes. `run` has to run for it to be filled.

    `same_disk` holds the backends whose blocks are not worth a copy: they lie on the cache's own disk. Blobs of at most
    `tiny_bytes` are in `tiny` and not in a file. Staged files of that size are worth being kept when it `seeds`, and
    larger ones are taken over when it `adopts`.
    """

    def __init__(
        self,
        files: CacheFiles,
        max_bytes: int,
        *,
        same_disk: frozenset[str] = frozenset(),
        tiny: TinyBlobs | None = None,
        tiny_bytes: int = 0,
        seeds: bool = True,
        adopts: bool = True,
    ) -> None:
        self.stats = ReadStats()
        self.same_disk = same_disk
        self._tiny = tiny
        self._tiny_bytes = tiny_bytes
        self._tiny_used_bytes = 0
        self.seed_bytes = tiny_bytes if seeds and tiny is not None else 0
        """Files of up to so many bytes are worth keeping when they are staged."""
        self._adopts = adopts
        self._files = files
        self._room = CacheRoom(files, max_bytes)
        self._blocks = CacheWriter(files)
        self._is_quick = False
        """Whether the folder's file system tells what is in memory: then the loop may ask it."""
        self._queue: deque[_Write] = deque()
        # Each is changed by one thread only: bytes that came to the queue, and bytes that left it.
        self._came_bytes = 0
        self._left_bytes = 0
        self._has_work = trio.Event()
        self._has_much = trio.Event()
        self._readers = trio.CapacityLimiter(READ_THREADS)
        self._writer = trio.CapacityLimiter(1)
        self._read_again_at = -1.0
        self._write_again_at = -1.0
        self._problem = ""
        self._report_at = -1.0

    def state(self) -> CacheState:
        """As of now."""
        paused = max(self._write_again_at, self._read_again_at) > trio.current_time()
        return CacheState(
            dir=str(self._files.folder),
            max_bytes=self._room.max_bytes,
            used_bytes=self._room.used_bytes,
            file_count=self._room.file_count,
            evicted_files=self._room.evicted,
            tiny_used_bytes=self._tiny_used_bytes,
            queued_bytes=self.queued_bytes,
            problem=self._problem if paused else "",
        )

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait to be written."""
        return self._came_bytes - self._left_bytes

    # reading

    async def fill(self, summary: BlobSummary, first: int, target: memoryview) -> Runs:
        """Fill `target`, from block `first` on, with what the cache has; the blocks that it has not.

        Raises CacheStalledError when the disk does not answer.
        """
        end = first - (-len(target) // summary.block_size_bytes)
        if self.is_tiny(summary, len(target)):
            await trio.lowlevel.checkpoint()
            return [] if self.fill_tiny(summary, target) else [(first, end)]
        if trio.current_time() < self._read_again_at:
            await trio.lowlevel.checkpoint()
            self.stats.disk_misses += end - first
            return [(first, end)]
        found = await self._look(summary, first, target)
        missing = sum(stop - start for start, stop in found.missing)
        self.stats.disk_hits += end - first - missing
        self.stats.disk_misses += missing
        self.stats.disk_bad += found.bad
        if found.bad:
            self._report("%d blocks of %s in the disk cache are damaged, and fetched again", found.bad, summary.digest)
        if found.error is not None:
            self._report("the disk cache cannot be read: %s", found.error)
        return found.missing

    def is_tiny(self, summary: BlobSummary, size_bytes: int) -> bool:
        """Whether so many bytes are all of a blob, which is in the database of small ones if it is kept."""
        return self._tiny is not None and size_bytes == summary.size_bytes <= self._tiny_bytes

    def fill_tiny(self, summary: BlobSummary, target: memoryview) -> bool:
        """Fill `target` with all of a tiny blob, if the cache has it; some 10 microseconds."""
        has_it = self._get_tiny(summary, target)
        blocks = -(-len(target) // summary.block_size_bytes)
        self.stats.disk_hits += blocks if has_it else 0
        self.stats.disk_misses += 0 if has_it else blocks
        return has_it

    def _get_tiny(self, summary: BlobSummary, target: memoryview) -> bool:
        assert self._tiny is not None
        try:
            data = self._tiny.get(summary.digest)
        except StateError as exc:
            self._give_up_tiny(exc)
            return False
        if data is None:
            return False
        size = summary.block_size_bytes
        blocks = ((index, data[index * size : (index + 1) * size]) for index in range(-(-len(target) // size)))
        if len(data) != len(target) or any(
            block_checksum(block, summary.checksum_algorithm) != summary.checksum(index) for index, block in blocks
        ):
            self.stats.disk_bad += 1
            self._report("%s in the database of small blobs is damaged, and fetched again", summary.digest)
            return False
        target[:] = data
        return True

    def _give_up_tiny(self, error: StateError) -> None:
        """For the life of this process; the next one makes it anew."""
        _log.warning("small blobs are not looked up any more: %s", error)
        self._tiny = None

    async def _look(self, summary: BlobSummary, first: int, target: memoryview) -> Found:
        """On the loop as far as nothing waits for the disk, then in a thread. Raises CacheStalledError."""
        size = summary.block_size_bytes
        step = max(1, INLINE_BYTES // size)
        end = first - (-len(target) // size)
        found, index = Found(), first
        # Names and sizes are in memory when files were counted: only then is nothing but bytes waited for.
        while index < end and self._is_quick:
            await trio.lowlevel.checkpoint()
            place = target[(index - first) * size : (index - first + step) * size]
            try:
                found.add(self._files.read(summary, index, place, nowait=True))
            except BlockingIOError:
                break
            index += step
        if index < end:
            rest = target[(index - first) * size :]
            found.add(await self._in_reader(partial(self._files.read, summary, index, rest)))
        return found

    async def _in_reader(self, work: Callable[[], Found]) -> Found:
        with trio.move_on_after(READ_SECONDS):
            return await trio.to_thread.run_sync(
                work, abandon_on_cancel=True, limiter=self._readers, thread_name="castore cache"
            )
        self._read_again_at = trio.current_time() + PAUSE_SECONDS
        self._problem = f"{self._files.folder} does not answer"
        _log.warning("the disk cache in %s does not answer; reads do without it for a while", self._files.folder)
        raise CacheStalledError

    def _report(self, message: str, *about: object) -> None:
        if trio.current_time() >= self._report_at:
            self._report_at = trio.current_time() + REPORT_SECONDS
            _log.warning(message, *about)

    # filling

    def keep(self, summary: BlobSummary, first: int, data: memoryview) -> None:
        """Write whole blocks, which are right and do not change, when there is time. Never waits."""
        if len(data) + self.queued_bytes > QUEUE_BYTES or trio.current_time() < self._write_again_at:
            self.stats.disk_dropped += -(-len(data) // summary.block_size_bytes)
            return
        self._queue.append(_Write(summary, first, data))
        self._came_bytes += len(data)
        self._has_work.set()
        if len(self._queue) >= TINY_BATCH or self.queued_bytes >= LINGER_BYTES:
            self._has_much.set()

    def adopt(self, summary: BlobSummary, source: Path) -> None:
        """Take over a staged file that is not needed any more, if it is worth it and there is room; else leave it."""
        if not self._adopts or summary.size_bytes <= self.seed_bytes or trio.current_time() < self._write_again_at:
            return
        if not self._files.fits(summary) or not self._room.has(summary.size_bytes):
            return
        try:
            self._files.adopt(summary, source)
        except OSError as exc:
            _log.debug("%s is not taken over from staging: %s", summary.digest, exc)
            return
        self._room.took(summary.size_bytes)

    async def store(self, summary: BlobSummary, first: int, data: memoryview) -> bool:
        """Write whole blocks now; False when there is no room for them. Raises OSError."""
        return await trio.to_thread.run_sync(self._store, _Write(summary, first, data), limiter=self._writer)

    def room_bytes(self) -> int:
        """What can be kept at a time; counts what is there. For a thread. Raises OSError."""
        return self._room.room_bytes()

    def close(self) -> None:
        """After `run` ended."""
        if self._tiny is not None:
            self._tiny.close()

    async def run(self) -> None:
        """Count what is there and write what is kept, until cancelled; then write what is left, for a moment."""
        try:
            await self._in_writer(self._count)
            while True:
                await self._has_work.wait()
                with trio.move_on_after(LINGER_SECONDS):
                    await self._has_much.wait()
                self._has_work, self._has_much = trio.Event(), trio.Event()
                await self._in_writer(self._drain)
        finally:
            with trio.CancelScope(deadline=trio.current_time() + FLUSH_SECONDS, shield=True):
                await self._in_writer(self._drain)

    async def _in_writer(self, work: Callable[[], None]) -> None:
        try:
            await trio.to_thread.run_sync(
                work, abandon_on_cancel=True, limiter=self._writer, thread_name="castore cache"
            )
        except OSError as exc:
            self._write_again_at = trio.current_time() + PAUSE_SECONDS
            self._problem = f"{self._files.folder} cannot be written: {exc.strerror}"
            self._forget_queue()
            _log.warning("the disk cache is not filled for a while: %s", self._problem)
        except Exception:
            # The mount is worth more than its cache.
            self._write_again_at = trio.current_time() + PAUSE_SECONDS
            self._problem = "it failed unexpectedly: the log says more"
            self._forget_queue()
            _log.exception("the disk cache is not filled for a while")

    def _drain(self) -> None:
        """Write all that is queued, and as long as much comes meanwhile, that too."""
        queued = self._came_bytes
        while self._queue and (self._left_bytes < queued or self.queued_bytes >= LINGER_BYTES):
            write = self._queue.popleft()
            try:
                if self._is_tiny(write):
                    self._keep_tiny(write)
                elif self._write(write):
                    self.stats.disk_written_bytes += len(write.data)
                else:
                    self.stats.disk_dropped += -(-len(write.data) // write.summary.block_size_bytes)
            finally:
                self._left_bytes += len(write.data)
        self._blocks.close()

    def _is_tiny(self, write: _Write) -> bool:
        """Whether it is all of a small blob; the rest of one that is read in parts goes to a file."""
        return self._tiny is not None and len(write.data) == write.summary.size_bytes <= self._tiny_bytes

    def _keep_tiny(self, write: _Write) -> None:
        """Together with those that wait right behind it."""
        batch: list[tuple[Digest, bytes]] = [(write.summary.digest, bytes(write.data))]
        while self._queue and len(batch) < TINY_BATCH and self._is_tiny(self._queue[0]):
            more = self._queue.popleft()
            batch.append((more.summary.digest, bytes(more.data)))
            self._left_bytes += len(more.data)
        tiny = self._tiny
        if tiny is None:
            return
        try:
            tiny.put(batch)
            self._tiny_used_bytes = tiny.used_bytes()
        except StateError as exc:
            if not exc.temporary:
                self._give_up_tiny(exc)
            self.stats.disk_dropped += len(batch)
        else:
            self.stats.disk_written_bytes += sum(len(data) for _, data in batch)

    def _forget_queue(self) -> None:
        while self._queue:
            write = self._queue.popleft()
            self._left_bytes += len(write.data)
            self.stats.disk_dropped += -(-len(write.data) // write.summary.block_size_bytes)

    def _store(self, write: _Write) -> bool:
        if self._is_tiny(write):
            self._keep_tiny(write)
            return True
        try:
            return self._write(write)
        finally:
            self._blocks.close()

    def _count(self) -> None:
        if self._tiny is not None:
            self._tiny_used_bytes = self._tiny.used_bytes()
        self._room.count()
        self._is_quick = self._files.tells_what_waits()

    def _write(self, write: _Write) -> bool:
        if not self._room.make(len(write.data)):
            return False
        # A disk that is slower than what comes is helped by memory: what does not fit the queue is not kept.
        keeps_up = self.queued_bytes <= QUEUE_BYTES // 2
        self._blocks.write(write.summary, write.first, write.data, past_page_cache=keeps_up)
        return True


def open_disk_cache(config: Config) -> DiskCache | None:
    """The cache that is configured, its folder made; None for `max_bytes` 0. For a thread.

    Raises StateError when its folder cannot be used.
    """
    settings = config.cache
    if not settings.max_bytes:
        return None
    files = CacheFiles(settings.dir)
    files.prepare()
    same_disk = same_disk_backends(config)
    seeds = settings.seed and bool(config.backends.keys() - same_disk)
    return DiskCache(
        files,
        settings.max_bytes,
        same_disk=same_disk,
        tiny=open_tiny_blobs(config),
        tiny_bytes=settings.tiny_bytes,
        seeds=seeds,
        adopts=seeds and _on_one_disk(config.store.state_dir, settings.dir),
    )


def open_tiny_blobs(config: Config) -> TinyBlobs | None:
    """The database of small blobs; None where they are kept in files like others."""
    settings = config.cache
    if not settings.tiny_bytes or not settings.tiny_max_bytes:
        return None
    try:
        return TinyBlobs(config.store.tiny_path, settings.tiny_max_bytes)
    except StateError as exc:
        _log.warning("small blobs are cached in files: %s", exc)
        return None


def same_disk_backends(config: Config) -> frozenset[str]:
    """The backends whose blocks readers do not leave in the cache: `local` ones on its disk, unless told otherwise."""
    if config.cache.same_disk:
        return frozenset()
    return frozenset(
        backend_id
        for backend_id, backend in config.backends.items()
        if isinstance(backend, LocalSettings) and _on_one_disk(backend.path, config.cache.dir)
    )


def _on_one_disk(one: Path, other: Path) -> bool:
    return _device(one) == _device(other)


def _device(path: Path) -> int:
    """The file system that a path is on, or will be on once it is made."""
    for place in (path, *path.parents):
        with suppress(OSError):
            return os.stat(place).st_dev
    return 0
