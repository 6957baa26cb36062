"""Progress of a command that goes through named steps: one line that changes on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Final, Self

_LINE_SECONDS: Final = 2.0
"""Between plain lines, and before the first: a short run says nothing."""


class Steps:
    """Shows the step under way on standard error, until it is left."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self._title = title
        self._quiet = quiet
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._next_time = time.monotonic() + _LINE_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def begin(self, step: str, number: int, count: int) -> None:
        """Step `number` of `count`, counted from 1, begins."""
        if self._quiet:
            return
        line = f"{self._title} ({number} of {count}): {step}"
        if self._terminal:
            print(f"\r\x1b[K{line[:100]}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() >= self._next_time:
            print(line, file=sys.stderr, flush=True)
            self._next_time = time.monotonic() + _LINE_SECONDS
