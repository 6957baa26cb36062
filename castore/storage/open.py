"""Settings -> a backend with all its wrappers. The only place that knows every type of backend; opens nothing itself.

The order, from the outside: breaker, retry, limit, measured, deadline, backend. So a wait before another try takes no
turn from others, and a call that waits for its turn is not counted as a backend that does not answer. What fails for
the breaker has failed after all its tries, so a server's fail-over that these outlast is no outage; and what the
breaker refuses is not tried again: whoever asked turns to another location at once. What is measured is the backend
alone: each try, and no wait for a turn.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import trio

from castore.config import BackendSettings, LocalSettings, S3Settings
from castore.digest import Digest
from castore.errors import ConfigError
from castore.storage.breaker import BreakerBackend
from castore.storage.deadline import DeadlineBackend
from castore.storage.limit import LimitedBackend
from castore.storage.measured import CallStats, MeasuredBackend
from castore.storage.retry import RetryingBackend
from castore.storage.spi import ProbeReport, Probing, StorageBackend

if TYPE_CHECKING:
    from castore.storage.backends.local import LocalBackend
    from castore.storage.backends.s3 import S3Backend


def open_backend(settings: BackendSettings, stats: CallStats | None = None) -> StorageBackend:
    """The backend that the settings describe, ready for use. Its calls are counted in `stats`, if given.

    Touches no disk and no network.

    Raises ConfigError for a type of backend that this installation does not have.
    """
    if isinstance(settings, LocalSettings):
        local = _local(settings)
        return wrap(local, reads=local.read_threads, writes=local.write_threads, stats=stats)
    s3 = _s3(settings)
    return wrap(s3, reads=s3.reads, writes=s3.writes, stats=stats)


def load_backend(settings: BackendSettings) -> None:
    """Import what the first request of such a backend would import: a third of a second. For a thread.

    For a program that is going to read: its first reader need not wait for that.
    """
    if isinstance(settings, S3Settings) and settings.transfer == "native":
        with suppress(ImportError):  # whoever opens it says what is missing
            import castore.storage.backends.s3_native  # noqa: F401


def wrap(backend: StorageBackend, *, reads: int, writes: int, stats: CallStats | None = None) -> StorageBackend:
    """A bare backend made fit for use: bounded in time, in calls at once, and in tries; left alone while it is dead."""
    bounded: StorageBackend = DeadlineBackend(backend)
    if stats is not None:
        bounded = MeasuredBackend(bounded, stats)
    return BreakerBackend(RetryingBackend(LimitedBackend(bounded, reads=reads, writes=writes)))


async def create_backend(settings: BackendSettings) -> bool:
    """Make the place where the backend keeps its objects; False when it is there already.

    Raises StorageError, and ConfigError as `open_backend` does.
    """
    async with _opened(settings) as backend:
        return await backend.create()


async def sweep_backend(settings: BackendSettings, *, is_wanted: Callable[[Digest], bool] | None = None) -> int:
    """Remove what puts of dead processes left behind; how many things. Safe at any time.

    What was left of a digest that is wanted stays where a put may go on from it. Raises StorageError, and ConfigError
    as `open_backend` does.
    """
    async with _opened(settings) as backend:
        return await backend.sweep(is_wanted=is_wanted)


async def probe_backend(settings: BackendSettings) -> ProbeReport:
    """Ask the backend what it does and enforces: see `Probing.probe`.

    Raises StorageError when it cannot be asked at all, and ConfigError as `open_backend` does or for a type of backend
    that has no probe.
    """
    async with _opened(settings) as backend:
        offered: object = backend
        if not isinstance(offered, Probing):
            raise ConfigError(f'backend {settings.backend_id}: type = "{settings.backend_type}" has no probe')
        return await offered.probe()


@asynccontextmanager
async def _opened(settings: BackendSettings) -> AsyncIterator[LocalBackend | S3Backend]:
    backend = _local(settings) if isinstance(settings, LocalSettings) else _s3(settings)
    try:
        yield backend
    finally:
        with trio.CancelScope(shield=True):
            await backend.aclose()


def _local(settings: LocalSettings) -> LocalBackend:
    from castore.storage.backends.local import LocalBackend

    return LocalBackend(settings.backend_id, settings.path)


def _s3(settings: S3Settings) -> S3Backend:
    from castore.storage.backends.s3 import S3Backend

    return S3Backend(settings)
