"""One open blob: which spans a read needs, which to fetch ahead, and the bytes put together. Fetches nothing itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from castore.blobs.flights import MAX_GET_BYTES, Flights
from castore.blobs.memory import KnownBlob, Span
from castore.blobs.pattern import GET_BYTES, ReadPattern, refill_bytes
from castore.catalog.records import Blob
from castore.digest import Digest, block_checksum
from castore.errors import CastoreError

_WIDER_FLIGHTS: Final = 2
"""How often a read that shared a failed flight of more blocks than its own tries again with its own."""

RECHECK_SECONDS: Final = 1.0
"""A block in memory is checked again before it is given out, unless it was in the last second. All that memory holds
takes 7 ms with xxh3 and 50 ms with sha256. At every hit, a 4 KiB read through a mount would take 12 % longer."""

_log = logging.getLogger(__name__)


class OpenBlob:
    """A handle on one blob, for any number of concurrent reads. What is prefetched follows the reads of this handle.

    `on_first_read(waited, fetched)` is called once, when bytes are given out: whether they were not in memory when they
    were asked for, and whether a backend had to give some of what memory has of them.
    """

    __slots__ = (
        "__weakref__",
        "_ahead",
        "_blob",
        "_block_count",
        "_flights",
        "_known",
        "_on_first_read",
        "_pattern",
        "_streaming",
    )

    def __init__(
        self,
        blob: Blob,
        known: KnownBlob,
        flights: Flights,
        on_first_read: Callable[[bool, bool], None] | None = None,
    ) -> None:
        self._blob = blob
        self._known = known
        self._flights = flights
        self._on_first_read = on_first_read
        self._pattern = ReadPattern()
        self._block_count = -(-known.size_bytes // known.block_size)
        self._streaming = False
        self._ahead: list[Span] = []

    @property
    def digest(self) -> Digest:
        """Of all its bytes."""
        return self._blob.summary.digest

    async def read(self, offset: int, length: int) -> bytes | memoryview:
        """The bytes from `offset` on: `length` of them, fewer only at the end of the blob, none beyond it.

        They are checked. A memoryview is read-only and holds its whole span in memory: let go of it soon.
        Raises ValueError for a negative offset or length, BlockUnreadable when no location has good bytes, and a
        StorageError when a location that cannot be asked at present may have them.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"cannot read {length} bytes at {offset}")
        end = min(offset + length, self._known.size_bytes)
        if offset >= end:
            await trio.lowlevel.checkpoint()
            return b""
        stats = self._flights.stats
        stats.reads += 1
        first, last = offset // self._known.block_size, -(-end // self._known.block_size)
        tries = 0
        while True:
            spans = self._cover(first, last)
            if tries == 0:
                self._prefetch(offset, end)
            waited = not all(span.done.is_set() for span in spans)
            started = trio.current_time() if waited else 0.0
            for span in spans:
                await span.done.wait()
            if waited:
                self._flights.waits.add(trio.current_time() - started)
            failed = next((span for span in spans if span.error is not None), None)
            if failed is None:
                stats.read_bytes += end - offset
                if self._on_first_read is not None:
                    self._on_first_read(waited, any(span.fetched for span in spans))
                    self._on_first_read = None
                slices = [span.view[max(0, offset - span.offset) : end - span.offset] for span in spans]
                return slices[0] if len(slices) == 1 else b"".join(slices)
            self._pattern.reset()
            tries += 1
            if tries > _WIDER_FLIGHTS or not _perhaps_elsewhere(failed, first, last):
                stats.read_errors += 1
                raise failed.failure()

    def close(self) -> None:
        """End the prefetch of this handle. Idempotent; reads under way go on, none may begin."""
        self._stream(False)

    def _cover(self, first: int, end: int) -> list[Span]:
        """The spans of the blocks `first` to `end` (exclusive), in order; those that nothing holds are sent for."""
        known, flights = self._known, self._flights
        spans: list[Span] = []
        index = first
        while index < end:
            span = known.spans.get(index)
            missed = span is None or not span.done.is_set()
            if span is None or not self._is_still_right(span, index, end):
                missed = True
                stop = self._gap_end(index, min(end, index + max(1, MAX_GET_BYTES // known.block_size)))
                span = flights.start(self._blob, known, index, stop, prefetched=False)
            spans.append(span)
            blocks = min(end, span.end) - index
            flights.stats.cache_misses += blocks if missed else 0
            flights.stats.cache_hits += 0 if missed else blocks
            flights.memory.touch(span, index, end)
            index = span.end
        return spans

    def _is_still_right(self, span: Span, first: int, end: int) -> bool:
        """Check the blocks `first` to `end` (exclusive) as far as the span has them and it is time; else forget it."""
        if not span.done.is_set():
            return True  # the flight checks them
        summary, size, now = self._blob.summary, self._known.block_size, trio.current_time()
        for index in range(first, min(end, span.end)):
            if now - span.checked_at[index - span.first] < RECHECK_SECONDS:
                continue
            start = index * size - span.offset
            if block_checksum(span.view[start : start + size], summary.checksum_algorithm) != summary.checksum(index):
                _log.error("block %d of %s changed in memory: this host's memory may be bad", index, summary.digest)
                self._flights.stats.memory_bad += 1
                self._flights.memory.forget(span)
                return False
            span.checked_at[index - span.first] = now
        return True

    def _gap_end(self, index: int, limit: int) -> int:
        """Where the run of blocks that nothing holds ends; it begins at `index`."""
        stop = index + 1
        while stop < limit and stop not in self._known.spans:
            stop += 1
        return stop

    def _prefetch(self, offset: int, end: int) -> None:
        known, flights = self._known, self._flights
        window = self._pattern.observe(offset, end)
        if any(span.error is not None for span in self._ahead):
            self._pattern.reset()
            window = 0
        self._stream(self._pattern.sequential)
        if not window or end == known.size_bytes:
            return
        window = min(window, flights.share_bytes())
        index = -(-end // known.block_size)
        limit = min(-(-(end + window) // known.block_size), self._block_count)
        while index < limit and index in known.spans:
            index = known.spans[index].end
        limit = min(limit, index + flights.room_bytes() // known.block_size)
        get_blocks = max(1, GET_BYTES // known.block_size)
        if limit < self._block_count and limit - index >= get_blocks:
            limit -= limit % get_blocks  # servers keep objects in pieces of such sizes
        enough = limit == self._block_count or (limit - index) * known.block_size >= refill_bytes(window)
        if index >= limit or not enough:
            return
        self._ahead = [span for span in self._ahead if span.unread]
        while index < limit:
            stop = self._gap_end(index, min(limit, (index // get_blocks + 1) * get_blocks))
            self._ahead.append(flights.start(self._blob, known, index, stop, prefetched=True))
            flights.stats.prefetched += stop - index
            index = stop
            while index < limit and index in known.spans:
                index = known.spans[index].end

    def _stream(self, streaming: bool) -> None:
        if streaming is not self._streaming:
            self._streaming = streaming
            self._flights.streams += 1 if streaming else -1
        if not streaming and self._ahead:
            for span in self._ahead:
                self._flights.memory.give_up(span)
            self._ahead = []


def _perhaps_elsewhere(failed: Span, first: int, end: int) -> bool:
    """Whether the fault may lie in blocks that the read of `first` to `end` (exclusive) did not ask for."""
    return (
        (failed.first < first or failed.end > end)
        and isinstance(failed.error, CastoreError)
        and not failed.error.temporary
    )
