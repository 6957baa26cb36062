"""When a scrub has done enough: after a time, or so many bytes. What is being read then is read to its end."""

from __future__ import annotations

import time


class Limits:
    """Says before each object whether it may be begun. `seconds` and `max_bytes` are of the whole run; 0 is none.

    The first object is always begun, however large it is: else it would be first for ever, and nothing would be done.
    """

    def __init__(self, *, seconds: float = 0, max_bytes: int = 0) -> None:
        self.reached = ""
        """Which limit ended the run: `time limit` or `byte limit`; empty while none did."""
        self._until = time.monotonic() + seconds if seconds else None
        self._max_bytes = max_bytes
        self._begun_bytes: int | None = None

    def allow(self, size_bytes: int) -> bool:
        """Whether an object of that size may be begun; if so, it counts. After the first no, none is."""
        if self.reached:
            return False
        begun = (self._begun_bytes or 0) + size_bytes
        if self._begun_bytes is not None:
            if self._until is not None and time.monotonic() >= self._until:
                self.reached = "time limit"
            elif self._max_bytes and begun > self._max_bytes:
                self.reached = "byte limit"
            if self.reached:
                return False
        self._begun_bytes = begun
        return True
