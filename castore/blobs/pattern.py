"""How a handle is read, and how far ahead that makes it worth to fetch. Pure arithmetic, no bytes."""

from __future__ import annotations

from collections import deque
from typing import Final

WINDOW_MIN_BYTES: Final = 512 * 1024
WINDOW_MAX_BYTES: Final = 32 * 1024 * 1024
"""A sequential reader gets as much ahead as it has read, within these: at most half of what is fetched is wasted."""

GET_BYTES: Final = 4 * 1024 * 1024
"""Of prefetch, once a reader is in full flow: eight gets may be on their way. With gets of 2 MiB a server spends 1.7
times as much of its processor on the same bytes, with 1 MiB 2.4 times (SeaweedFS); 8 MiB are no better than 4."""

_SEQUENTIAL: Final = 2
"""The score from which reads are sequential: random reads reach 1 now and then, and fall back with the next."""

_SCORE_MAX: Final = 3
"""So that one stray read, a look at the header for example, ends nothing, and two do."""

_REMEMBERED: Final = 8
"""Reads whose edges are remembered: the kernel sends a few readahead requests at once, and they arrive in any order."""


def refill_bytes(window_bytes: int) -> int:
    """How much of a window must be missing before it is sent for: half of it while it grows, so that there are no tiny
    gets and one is on its way while another is read, and a whole get of a large one. Gets of 512 KiB read a local
    directory a third slower than those of 1 to 8 MiB.
    """
    return min(window_bytes // 2, GET_BYTES)


class ReadPattern:
    """Watches the reads of one handle and keeps a score.

    A read scores 1 for each of its edges that touches a recent read, before it or, when it was overtaken, behind it.
    One that touches none is a stray and costs 1.
    """

    __slots__ = ("_ends", "_run_bytes", "_score", "_starts")

    def __init__(self) -> None:
        self._starts: deque[int] = deque(maxlen=_REMEMBERED)
        self._ends: deque[int] = deque(maxlen=_REMEMBERED)
        self.reset()

    def reset(self) -> None:
        """Prefetch has to be earned anew."""
        self._score = 0
        self._run_bytes = 0

    @property
    def sequential(self) -> bool:
        """Whether the reads of late follow each other."""
        return self._score >= _SEQUENTIAL

    def observe(self, start: int, end: int) -> int:
        """Note a read of the bytes `start` to `end` (exclusive). Returns how many bytes beyond `end` are worth having:
        0 for a stray, and while the reads are not sequential.
        """
        touches = (start in self._ends) + (end in self._starts)
        self._starts.append(start)
        self._ends.append(end)
        if touches:
            self._score = min(self._score + touches, _SCORE_MAX)
            self._run_bytes += end - start
        else:
            self._score = max(self._score - 1, 0)
            if not self._score:
                self._run_bytes = end - start
        if not touches or not self.sequential:
            return 0
        return min(max(self._run_bytes, WINDOW_MIN_BYTES), WINDOW_MAX_BYTES)
