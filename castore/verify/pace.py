"""How fast a scrub may read: below a rate, and after those who wait for their bytes. Reads nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

YIELD_SECONDS: Final = 1.0
"""The longest that one piece waits for readers: on a mount that is always read, a scrub still gets on."""
LOOK_SECONDS: Final = 0.02
"""Between two looks whether readers wait."""
WORKER_BYTES_PER_S: Final = 2 * 1024 * 1024
"""What one worker reads at least, also of small objects from a server that is far."""
WORKERS_MIN: Final = 2
"""Workers at the slowest rate: one reads while another one hashes."""


class Pace:
    """Lets pieces go, one after the other, so that on the whole no more than `bytes_per_s` are read; 0 is no bound.

    A piece of a faster moment is made up for by a longer wait, never the other way round. With `is_busy`, a piece
    waits while it says so, for at most YIELD_SECONDS.
    """

    def __init__(self, bytes_per_s: int = 0, *, is_busy: Callable[[], bool] | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._is_busy = is_busy
        self._free_at = 0.0

    @property
    def is_free(self) -> bool:
        """Whether no piece ever waits, however large."""
        return not self._bytes_per_s and self._is_busy is None

    def workers(self, most: int) -> int:
        """How many objects at a time that rate needs, up to `most`.

        Further ones would be begun, wait, and be read to their end long after a limit of time was reached.
        """
        if not self._bytes_per_s:
            return most
        return min(most, max(WORKERS_MIN, self._bytes_per_s // WORKER_BYTES_PER_S))

    async def take(self, size_bytes: int) -> None:
        """Wait until so many bytes may be read."""
        if self._bytes_per_s:
            now = trio.current_time()
            begin = max(now, self._free_at)
            self._free_at = begin + size_bytes / self._bytes_per_s
            await trio.sleep_until(begin)
        with trio.move_on_after(YIELD_SECONDS):
            while True:
                if self._is_busy is None or not self._is_busy():
                    return
                await trio.sleep(LOOK_SECONDS)
