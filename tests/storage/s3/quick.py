"""A backend put together for use whose deadlines pass quickly. Tests nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from castore.config import S3Settings
from castore.storage.backends.s3 import S3Backend
from castore.storage.breaker import PAUSE_MAX_S, PAUSE_MIN_S, BreakerBackend
from castore.storage.deadline import BASE_S, MIN_BYTES_PER_S, READ_BASE_S, DeadlineBackend
from castore.storage.limit import LimitedBackend
from castore.storage.open import open_backend
from castore.storage.retry import LAST_TRY_S, RetryingBackend
from castore.storage.spi import StorageBackend

SPEED: Final = 10
"""Where a test waits for deadlines, all of them pass so many times as fast."""


@asynccontextmanager
async def wrapped(settings: S3Settings, *, speed: float | None = None) -> AsyncIterator[StorageBackend]:
    """As it is put together for use. With `speed`, its deadlines are divided by that, and no try waits.

    (Waits of random length would make it a matter of chance how many tries there is time for.)
    """
    if speed is None:
        backend = open_backend(settings)
    else:
        bare = S3Backend(settings)
        deadline = DeadlineBackend(
            bare, base_s=BASE_S / speed, read_base_s=READ_BASE_S / speed, min_bytes_per_s=MIN_BYTES_PER_S * speed
        )
        limited = LimitedBackend(deadline, reads=bare.reads, writes=bare.writes)
        retrying = RetryingBackend(limited, last_try_s=LAST_TRY_S / speed, uniform=lambda low, high: low)
        backend = BreakerBackend(retrying, pause_min_s=PAUSE_MIN_S / speed, pause_max_s=PAUSE_MAX_S / speed)
    try:
        yield backend
    finally:
        await backend.aclose()
