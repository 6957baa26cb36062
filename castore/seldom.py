"""Warnings that would come again and again: one a minute of each kind, with how many were left out. Others go by it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

PAUSE_SECONDS: Final = 60.0
"""Between two lines of one kind. As long as the pause of what is tried again by itself: then each try is told."""


class SeldomLog:
    """Warnings to one logger. Of kinds there are few: the caller names them, never a user."""

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._silent_until: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, kind: str, message: str) -> None:
        """Tell it, unless one of its kind was told less than PAUSE_SECONDS ago."""
        now = self._clock()
        if now < self._silent_until.get(kind, now):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._silent_until[kind] = now + PAUSE_SECONDS
        count = self._left_out.pop(kind, 0)
        self._log.warning("%s%s", message, f" ({count} more of this kind since the last one told)" if count else "")
