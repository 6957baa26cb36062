"""Settings -> a backend with all its wrappers. The only place that knows every type of backend; opens nothing itself.

The order, from the outside: retry, limit, deadline, backend. So a wait before another try takes no turn from others,
and a call that waits for its turn is not counted as a backend that does not answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from castore.config import BackendSettings, LocalSettings, S3Settings
from castore.storage.deadline import DeadlineBackend
from castore.storage.limit import LimitedBackend
from castore.storage.retry import RetryingBackend
from castore.storage.spi import StorageBackend

if TYPE_CHECKING:
    from castore.storage.backends.local import LocalBackend
    from castore.storage.backends.s3 import S3Backend


def open_backend(settings: BackendSettings) -> StorageBackend:
    """The backend that the settings describe, ready for use. Touches no disk and no network.

    Raises ConfigError for a type of backend that this installation does not have.
    """
    if isinstance(settings, LocalSettings):
        local = _local(settings)
        return wrap(local, reads=local.read_threads, writes=local.write_threads)
    s3 = _s3(settings)
    return wrap(s3, reads=s3.reads, writes=s3.writes)


def wrap(backend: StorageBackend, *, reads: int, writes: int) -> StorageBackend:
    """A bare backend made fit for use: bounded in time, in calls at once, and in tries."""
    return RetryingBackend(LimitedBackend(DeadlineBackend(backend), reads=reads, writes=writes))


async def create_backend(settings: BackendSettings) -> bool:
    """Make the place where the backend keeps its objects; False when it is there already.

    Raises StorageError, and ConfigError as `open_backend` does.
    """
    async with _opened(settings) as backend:
        return await backend.create()


async def sweep_backend(settings: BackendSettings) -> int:
    """Remove what puts of dead processes left behind; how many things. Safe at any time.

    Raises StorageError, and ConfigError as `open_backend` does.
    """
    async with _opened(settings) as backend:
        return await backend.sweep()


@asynccontextmanager
async def _opened(settings: BackendSettings) -> AsyncIterator[LocalBackend | S3Backend]:
    backend = _local(settings) if isinstance(settings, LocalSettings) else _s3(settings)
    try:
        yield backend
    finally:
        await backend.aclose()


def _local(settings: LocalSettings) -> LocalBackend:
    from castore.storage.backends.local import LocalBackend

    return LocalBackend(settings.backend_id, settings.path)


def _s3(settings: S3Settings) -> S3Backend:
    from castore.storage.backends.s3 import S3Backend

    return S3Backend(settings)
