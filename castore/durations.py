"""How long things took, counted by size: what a histogram of metrics is made of. Knows no metric and no clock."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds in seconds. A request on loopback takes 1 ms, one to a far store 50 to 200, a large put some seconds,
and no read takes longer than the last one."""


class Durations:
    """Counts durations; only ever up. Use it from one thread."""

    __slots__ = ("_counts", "sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """Something took so long."""
        self._counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds

    def include(self, other: Durations) -> None:
        """Count all of another one, too."""
        self._counts = [one + more for one, more in zip(self._counts, other._counts, strict=True)]
        self.sum_s += other.sum_s

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self._counts)

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """(bound, how many took at most so long) for each bound; the last one is infinity."""
        return zip((*BUCKETS_S, float("inf")), accumulate(self._counts), strict=True)

    def within(self, part: float) -> float | None:
        """The smallest bound within which that part (0 to 1) of them was; None when there was none."""
        wanted = part * self.count
        return next((bound for bound, count in self.cumulative() if count and count >= wanted), None)
