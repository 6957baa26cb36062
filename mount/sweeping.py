"""Now and then, what broken puts left in a backend is removed. Not garbage collection: it touches no object."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import trio

from castore.config import BackendSettings
from castore.digest import Digest
from castore.errors import StorageError
from castore.storage.open import sweep_backend

SWEEP_SECONDS: Final = 3600.0
"""Between two sweeps: as long as leftovers have to be silent before they count as abandoned."""

log = logging.getLogger(__name__)


async def sweep_always(
    settings: BackendSettings,
    *,
    first_s: float,
    every_s: float = SWEEP_SECONDS,
    is_wanted: Callable[[Digest], bool] | None = None,
) -> None:
    """Sweep the backend in `first_s` seconds, and `every_s` after each sweep, until cancelled. Failures are logged.

    What was left of a digest that is wanted stays where the next put may go on from it, however old it is.
    """
    await trio.sleep(first_s)
    while True:
        try:
            count = await sweep_backend(settings, is_wanted=is_wanted)
        except StorageError as exc:
            log.warning("backend %s is not swept: %s", settings.backend_id, exc)
        except Exception:
            # Housekeeping: no reason to end a mount.
            log.exception("the sweep of backend %s failed unexpectedly", settings.backend_id)
        else:
            if count:
                log.info("backend %s: %d leftovers of broken puts removed", settings.backend_id, count)
        await trio.sleep(every_s)
