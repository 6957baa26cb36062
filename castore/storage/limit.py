"""Bounds how many calls a backend does at once; the others wait their turn, in order. Not a bound on bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from castore.storage.spi import StorageBackend
from castore.storage.wrapping import Operation, Wrapping

T = TypeVar("T")

_WRITES: Final = frozenset({"put", "delete"})


class LimitedBackend(Wrapping):
    """At most `reads` gets, heads, abandons and steps of listings at a time, and at most `writes` puts and deletes.

    Two bounds, so that a large upload keeps waiting neither a reader nor who gives it up. `health` does not wait.
    """

    def __init__(self, inner: StorageBackend, *, reads: int, writes: int) -> None:
        super().__init__(inner)
        self._reads = trio.Semaphore(reads)
        self._writes = trio.Semaphore(writes)

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        turns = self._writes if operation.name in _WRITES else self._reads
        try:
            turns.acquire_nowait()  # passes nobody who waits, and saves a change of tasks: `call` makes its own
        except trio.WouldBlock:
            await turns.acquire()
        try:
            return await call()
        finally:
            turns.release()
