"""Bounds how long a backend may take for each call. Does not try again, and does not count time spent elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from castore.errors import StorageTimeout
from castore.storage.spi import BackendHealth, StorageBackend
from castore.storage.wrapping import Operation, Wrapping

T = TypeVar("T")

_READS: Final = frozenset({"get", "head"})

BASE_S: Final = 30.0
"""Seconds for a put, a delete or a step of a listing, beside the time for its bytes: a server's fail-over takes 10 to
20, and a page of a large bucket's listing may take as long."""
READ_BASE_S: Final = 10.0
"""The same for a get or head. Somebody waits for it, another location may have the bytes, and trying again costs
little: a connection that the way there forgot is found out, and three tries outlast a fail-over, too."""
MIN_BYTES_PER_S: Final = 1 << 20
"""The slowest transfer that is still one: a tenth of what 100 Mbit/s carry, shared by 8 transfers."""
HEALTH_S: Final = 5.0
"""Seconds for a health probe, which whoever asks for a status page waits for."""


class DeadlineBackend(Wrapping):
    """Every call raises StorageTimeout after `base_s` seconds, and one second more for each `min_bytes_per_s` moved.

    Gets and heads have `read_base_s`, where that is less. Each step of a listing has `base_s`. `health` fails after
    `health_s`; `aclose` has `base_s`.
    """

    def __init__(
        self,
        inner: StorageBackend,
        *,
        base_s: float = BASE_S,
        read_base_s: float = READ_BASE_S,
        min_bytes_per_s: float = MIN_BYTES_PER_S,
        health_s: float = HEALTH_S,
    ) -> None:
        super().__init__(inner)
        self._base_s = base_s
        self._read_base_s = min(read_base_s, base_s)
        self._min_bytes_per_s = min_bytes_per_s
        self._health_s = health_s

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        base_s = self._read_base_s if operation.name in _READS else self._base_s
        seconds = base_s + operation.size_bytes / self._min_bytes_per_s
        with trio.move_on_after(seconds):
            return await call()
        raise StorageTimeout(
            f"backend {self.backend_id}: {operation.name} {operation.subject}: no answer within {seconds:.1f} s"
        )

    async def health(self) -> BackendHealth:
        with trio.move_on_after(self._health_s):
            return await self._inner.health()
        return BackendHealth("fail", f"no answer within {self._health_s:.1f} s")

    async def aclose(self) -> None:
        with trio.move_on_after(self._base_s):
            await self._inner.aclose()
