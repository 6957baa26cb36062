"""Settings -> a backend with all its wrappers. The only place that knows every type of backend; opens nothing itself.

The order, from the outside: retry, limit, deadline, backend. So a wait before another try takes no turn from others,
and a call that waits for its turn is not counted as a backend that does not answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from castore.config import BackendSettings, LocalSettings
from castore.errors import ConfigError
from castore.storage.deadline import DeadlineBackend
from castore.storage.limit import LimitedBackend
from castore.storage.retry import RetryingBackend
from castore.storage.spi import StorageBackend

if TYPE_CHECKING:
    from castore.storage.backends.local import LocalBackend


def open_backend(settings: BackendSettings) -> StorageBackend:
    """The backend that the settings describe, ready for use. Touches no disk and no network.

    Raises ConfigError for a type of backend that this installation does not have.
    """
    backend = _bare(settings)
    return wrap(backend, reads=backend.read_threads, writes=backend.write_threads)


def wrap(backend: StorageBackend, *, reads: int, writes: int) -> StorageBackend:
    """A bare backend made fit for use: bounded in time, in calls at once, and in tries."""
    return RetryingBackend(LimitedBackend(DeadlineBackend(backend), reads=reads, writes=writes))


async def create_backend(settings: BackendSettings) -> None:
    """Make the place where the backend keeps its objects. Succeeds when it is there.

    Raises StorageError, and ConfigError as `open_backend` does.
    """
    await _bare(settings).create()


async def sweep_backend(settings: BackendSettings) -> int:
    """Remove what puts of dead processes left behind; how many things. Safe at any time.

    Raises StorageError, and ConfigError as `open_backend` does.
    """
    return await _bare(settings).sweep()


def _bare(settings: BackendSettings) -> LocalBackend:
    if isinstance(settings, LocalSettings):
        from castore.storage.backends.local import LocalBackend

        return LocalBackend(settings.backend_id, settings.path)
    raise ConfigError(
        f'backend {settings.backend_id}: type = "{settings.backend_type}" is not available in this installation of '
        'castore; use type = "local" with a path'
    )
