"""Checked blocks in memory, within a bound, the least recently used out first. Fetches and checks nothing itself.

The unit is the span: neighbouring blocks of one blob that came in one get, in one buffer. Spans are kept and evicted
whole, so what is accounted is what is held: a block never pins a buffer that the bound does not count.
"""

from __future__ import annotations

from collections import OrderedDict
from copy import copy
from typing import Final

import trio

from castore.blobs.stats import ReadStats
from castore.errors import CastoreError

MEMORY_BYTES: Final = 64 * 1024 * 1024
"""Default bound of the spans that are kept: room for many readers' windows, in a daemon that stays small."""

SPAN_OVERHEAD_BYTES: Final = 1800
"""Charged for each span beside its buffer: its objects take 1.8 kB, nearly all that a tiny blob needs."""


class KnownBlob:
    """The spans of one blob, by each of their block indices; alive while a handle is open or a span is held."""

    __slots__ = ("__weakref__", "block_size", "size_bytes", "spans")

    def __init__(self, size_bytes: int, block_size: int) -> None:
        self.size_bytes = size_bytes
        self.block_size = block_size
        self.spans: dict[int, Span] = {}


class Span:
    """Blocks `first` to `end` (exclusive) of a blob: on their way until `done` is set, then whole or failed.

    It has no buffer until it is its turn to be filled: that is `target` then. Only slices of `view` are given out, and
    a slice stays true when its span is evicted.
    """

    __slots__ = (
        "checked_at",
        "done",
        "end",
        "error",
        "fetched",
        "first",
        "known",
        "offset",
        "size_bytes",
        "target",
        "unread",
    )

    def __init__(self, known: KnownBlob, first: int, end: int, *, prefetched: bool) -> None:
        self.known = known
        self.first = first
        self.end = end
        self.offset = first * known.block_size
        """Where in the blob the buffer begins, in bytes."""
        self.size_bytes = min(end * known.block_size, known.size_bytes) - self.offset
        self.target: memoryview | None = None
        self.done = trio.Event()
        self.error: Exception | None = None
        self.fetched = False
        """Whether a backend was asked for any of it."""
        self.checked_at: list[float] = []
        """When each block was checked last, by trio's clock. Empty until all have arrived."""
        self.unread = (1 << (end - first)) - 1 if prefetched else 0
        """A bit for each block, the first one lowest, that was prefetched and has not been read."""

    @property
    def view(self) -> memoryview:
        """The bytes, once they are there."""
        assert self.target is not None, "nothing was received yet"
        return self.target.toreadonly()

    def failure(self) -> Exception:
        """The error to raise, another instance for each reader of the flight: raising writes to it."""
        assert self.error is not None
        if not isinstance(self.error, CastoreError):
            return self.error
        error = copy(self.error)
        error.__cause__ = self.error
        return error


class SpanMemory:
    """All spans. Those that arrived are kept within `max_bytes`; one that exceeds it alone is not kept at all.

    What is on its way comes on top and evicts nothing: while no backend answers, what is kept has to serve.
    """

    def __init__(self, max_bytes: int, stats: ReadStats) -> None:
        self.max_bytes = max_bytes
        self.kept_bytes = 0
        self.in_flight_bytes = 0
        self.unread_bytes = 0
        """Kept blocks that were prefetched and are not read; a blob's last block counts as a whole one."""
        self._kept: OrderedDict[Span, None] = OrderedDict()
        self._stats = stats

    def begin(self, known: KnownBlob, first: int, end: int, *, prefetched: bool) -> Span:
        """A span that is on its way: readers of its blocks find it from now on."""
        span = Span(known, first, end, prefetched=prefetched)
        self.in_flight_bytes += _cost(span)
        for index in range(first, end):
            known.spans[index] = span
        return span

    def keep(self, span: Span) -> None:
        """The span arrived and is checked."""
        self.in_flight_bytes -= _cost(span)
        span.checked_at = [trio.current_time()] * (span.end - span.first)
        self._kept[span] = None
        self.kept_bytes += _cost(span)
        self.unread_bytes += span.unread.bit_count() * span.known.block_size
        while self.kept_bytes > self.max_bytes:
            self.forget(next(iter(self._kept)))

    def drop(self, span: Span) -> None:
        """The span failed: the next read of its blocks begins anew."""
        self.in_flight_bytes -= _cost(span)
        self._leave(span)

    def touch(self, span: Span, first: int, end: int) -> None:
        """Blocks `first` to `end` (exclusive) are read; what lies outside the span is ignored."""
        if span in self._kept:
            self._kept.move_to_end(span)
        if span.unread:
            low, high = max(first, span.first) - span.first, min(end, span.end) - span.first
            read = span.unread & ((1 << high) - (1 << low))
            self._stats.prefetched_read += read.bit_count()
            self._clear_unread(span, read)

    def give_up(self, span: Span) -> None:
        """Whoever had the span prefetched will not read the rest of it; it stays as long as any other."""
        self._stats.prefetched_unread += span.unread.bit_count()
        self._clear_unread(span, span.unread)

    def _clear_unread(self, span: Span, blocks: int) -> None:
        span.unread ^= blocks
        if span in self._kept:
            self.unread_bytes -= blocks.bit_count() * span.known.block_size

    def let_go(self) -> bool:
        """Keep the span that was used least lately no longer; False when none is kept."""
        if not self._kept:
            return False
        self.forget(next(iter(self._kept)))
        return True

    def clear(self) -> None:
        """Keep nothing of what has arrived. What readers hold stays true, what is on its way arrives."""
        while self._kept:
            self.forget(next(iter(self._kept)))

    def forget(self, span: Span) -> None:
        """Keep a span that has arrived no longer: the next read of its blocks begins anew."""
        self._leave(span)
        del self._kept[span]
        self.kept_bytes -= _cost(span)

    def _leave(self, span: Span) -> None:
        self.give_up(span)
        for index in range(span.first, span.end):
            del span.known.spans[index]


def _cost(span: Span) -> int:
    return span.size_bytes + SPAN_OVERHEAD_BYTES
