"""How fast files became stored over the last seconds, and how long the rest may take. Within a bound of memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import trio

WINDOW_SECONDS: Final = 10
"""Long enough for a rate that does not jump, short enough to notice that a backend became slow."""


@dataclass(frozen=True, slots=True)
class Rate:
    """What became stored by the second."""

    files_per_s: float
    bytes_per_s: float

    def seconds_for(self, file_count: int, size_bytes: int) -> float | None:
        """How long so much takes at this rate; None when nothing moves. The slower of files and bytes counts."""
        if not file_count:
            return 0.0
        if not self.files_per_s:
            return None
        by_bytes = size_bytes / self.bytes_per_s if self.bytes_per_s else 0.0
        return max(file_count / self.files_per_s, by_bytes)


class RateWindow:
    """Counts what is stored, by whole seconds of trio's clock, of the last WINDOW_SECONDS."""

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()
        """[second, files, bytes], at most one for each second of the window."""
        self._busy_since = 0.0

    def add(self, file_count: int, size_bytes: int) -> None:
        """So much became stored now."""
        now = trio.current_time()
        self._forget(now)
        if not self._seconds:
            self._busy_since = now
        if not self._seconds or self._seconds[-1][0] != int(now):
            self._seconds.append([int(now), 0, 0])
        self._seconds[-1][1] += file_count
        self._seconds[-1][2] += size_bytes

    def rate(self) -> Rate:
        """Over the whole seconds of the window and the one that runs, or since the first file after a pause as long."""
        now = trio.current_time()
        self._forget(now)
        since = max(self._busy_since, float(int(now) - WINDOW_SECONDS + 1))
        span = max(1.0, now - since)
        files, size = (sum(second[part] for second in self._seconds) for part in (1, 2))
        return Rate(round(files / span, 3), round(size / span, 3))

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] <= int(now) - WINDOW_SECONDS:
            self._seconds.popleft()
