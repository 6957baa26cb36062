"""Flights: one task for each span on its way, whoever waits for it. What is read or prefetched is not decided here.

A flight belongs to the nursery of `run`, not to a reader: a reader that is cancelled takes nothing from the others, and
every flight ends, because each of its gets has the backend's deadline.
"""

from __future__ import annotations

import logging
from typing import Final

import trio

from castore.blobs.buffers import Buffers
from castore.blobs.cache_files import Runs
from castore.blobs.disk_cache import CacheStalledError, DiskCache
from castore.blobs.fetch import BlockFetcher
from castore.blobs.memory import KnownBlob, Span, SpanMemory
from castore.blobs.stats import ReadStats
from castore.blobs.turns import Turns
from castore.catalog.records import Blob
from castore.durations import Durations
from castore.errors import CastoreError, StorageUnavailable

MAX_GET_BYTES: Final = 8 * 1024 * 1024
"""Bytes asked for in one get at most: a span is one buffer, and is waited for and evicted whole."""

PREFETCH_BYTES: Final = 32 * 1024 * 1024
"""Bytes on their way and prefetched ones not yet read, of all handles together, up to which there is prefetch. Reads
that somebody waits for are not held back by it: their number is bounded by the number of readers."""

_PREFETCH_SHARE: Final = 2
"""And no more than this part of memory. 64 readers in turn touch as much again as is prefetched for them before they
come to it: with a half, 25 % of it was evicted unread; with a quarter, 5 %."""

_RUNS_MAX: Final = 4
"""Gaps of the disk cache that are sent for one by one. Where there are more, one get brings them and all in between."""

_CACHE: Final = ""
"""The line of those who look into the disk cache; the others have the ids of backends."""

_log = logging.getLogger(__name__)


class Flights:
    """Starts flights, and knows how much may be prefetched."""

    def __init__(
        self, fetcher: BlockFetcher, memory: SpanMemory, stats: ReadStats, cache: DiskCache | None = None
    ) -> None:
        self.memory = memory
        self.stats = stats
        self.waits = Durations()
        """How long reads waited that found not all in memory."""
        self.streams = 0
        """Handles that are read sequentially at present: they share what may be prefetched."""
        self._fetcher = fetcher
        self._cache = cache
        self._nursery: trio.Nursery | None = None
        self.buffers = Buffers()
        self._turns = Turns(self.buffers, memory.let_go)
        self._prefetch_bytes = min(PREFETCH_BYTES, memory.max_bytes // _PREFETCH_SHARE)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry flights until cancelled; those under way fail then with StorageUnavailable."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def share_bytes(self) -> int:
        """How far ahead one sequential reader may be."""
        return self._prefetch_bytes // max(1, self.streams)

    def room_bytes(self) -> int:
        """How much may be prefetched now."""
        if self._nursery is None or self._turns.is_waited_for:
            return 0
        ahead = self.memory.in_flight_bytes + self.memory.unread_bytes
        return max(0, min(self._prefetch_bytes - ahead, self._turns.spare_bytes()))

    def start(self, blob: Blob, known: KnownBlob, first: int, end: int, *, prefetched: bool) -> Span:
        """Send for the blocks `first` to `end` (exclusive), none of which is in memory or on its way.

        Raises StorageUnavailable when `run` does not run.
        """
        if self._nursery is None:
            raise StorageUnavailable("reading has been stopped")
        span = self.memory.begin(known, first, end, prefetched=prefetched)
        # A tiny blob that the cache has needs no flight: a task costs more than the lookup.
        looked = self._cache is not None and self._cache.is_tiny(blob.summary, span.size_bytes)
        if looked and (looked := self._turns.enter_nowait(_CACHE, span)) and self._land(blob, span):
            return span
        self._nursery.start_soon(self._fly, blob, span, looked)
        return span

    def _land(self, blob: Blob, span: Span) -> bool:
        """Whether the cache had the tiny blob; it is in memory then."""
        assert self._cache is not None, "it is asked"
        assert span.target is not None, "it has its turn"
        has_it = self._cache.fill_tiny(blob.summary, span.target)
        self._turns.leave(_CACHE, span)
        if has_it:
            self.memory.keep(span)
            span.done.set()
        else:
            span.target = None
        return has_it

    async def _fly(self, blob: Blob, span: Span, looked: bool) -> None:
        try:
            await self._fill(blob, span, looked)
        except CastoreError as exc:
            # Its frames would hold the buffer for as long as anyone holds the error.
            span.error = exc.with_traceback(None)
            self.memory.drop(span)
        except Exception as exc:
            if span.unread:
                _log.error("prefetch of %s failed", blob.summary.digest, exc_info=exc)  # nobody may be waiting for it
            span.error = exc
            self.memory.drop(span)
        except BaseException:
            span.error = StorageUnavailable("reading has been stopped")
            self.memory.drop(span)
            raise
        else:
            self.memory.keep(span)
        finally:
            span.done.set()

    async def _fill(self, blob: Blob, span: Span, looked: bool) -> None:
        """From the disk cache, unless it was `looked` for there, and what that lacks from a backend, which the cache
        keeps then.
        """
        cache, summary = self._cache, blob.summary
        if cache is None:
            span.fetched = True
            await self._fetcher.fill(blob, span.first, span, turns=self._turns)
            return
        missing = [(span.first, span.end)] if looked else await self._look(cache, blob, span)
        if not missing:
            return
        missing, span.fetched = _few(missing), True
        backend_id = await self._fetcher.fill(blob, span.first, span, turns=self._turns, missing=missing)
        if backend_id not in cache.same_disk:
            for first, end in missing:
                start, stop = (index * summary.block_size_bytes - span.offset for index in (first, end))
                cache.keep(summary, first, span.view[start:stop])

    async def _look(self, cache: DiskCache, blob: Blob, span: Span) -> Runs:
        """Take what the cache has; what is missing."""
        nothing = [(span.first, span.end)]
        await self._turns.enter(_CACHE, span)
        try:
            assert span.target is not None, "it has its turn"
            missing = await cache.fill(blob.summary, span.first, span.target)
        except CacheStalledError:
            span.target = None  # a thread that hangs may yet write to it
            return nothing
        finally:
            self._turns.leave(_CACHE, span)
        if missing == nothing:
            span.target = None  # others need it while this one waits for its turn
        return missing


def _few(runs: Runs) -> Runs:
    return runs if len(runs) <= _RUNS_MAX else [(runs[0][0], runs[-1][1])]
