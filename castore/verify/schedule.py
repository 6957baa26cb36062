"""The scrub beside a serving daemon: what was not verified for long, slowly, and after those who read.

It records what it finds as `castore storage verify` does, with the same events; health tells operators.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import trio

from castore.catalog.scrub import Choice, ScrubReader
from castore.config import BackendSettings, VerifySettings
from castore.errors import CastoreError
from castore.storage.open import open_backend
from castore.verify.outcomes import Outcome
from castore.verify.pace import Pace
from castore.verify.scrub import Scrub

REST_SECONDS: Final = 600.0
"""Between two runs: what is due by then is due for a thirtieth of a percent of a month."""
WORKERS: Final = 2
"""Objects of a backend read at a time: enough for the rates that a background is for, and little memory."""

_NS: Final = 10**9

log = logging.getLogger(__name__)


async def scrub_always(
    settings: VerifySettings,
    catalog_path: Path,
    backends: Mapping[str, BackendSettings],
    *,
    is_busy: Callable[[], bool],
) -> None:
    """Verify what was not verified for `settings.every_seconds`, oldest first, again and again, until cancelled.

    Backends are opened anew, so that no reader waits for a turn that the scrub has. Failures are logged.
    """
    chosen = {backend_id: backends[backend_id] for backend_id in settings.backends or backends}
    while True:
        try:
            await _scrub_once(settings, catalog_path, chosen, is_busy)
        except CastoreError as exc:
            log.warning("the scrub in the background ended early: %s", exc)
        except Exception:
            # Housekeeping: no reason to end a mount.
            log.exception("the scrub in the background failed unexpectedly")
        await trio.sleep(min(REST_SECONDS, settings.every_seconds))


async def _scrub_once(
    settings: VerifySettings, catalog_path: Path, chosen: Mapping[str, BackendSettings], is_busy: Callable[[], bool]
) -> None:
    choice = Choice(verified_before_ns=time.time_ns() - int(settings.every_seconds * _NS))
    due = await trio.to_thread.run_sync(_due, catalog_path, choice, chosen)
    if not due:
        return
    opened = {backend_id: open_backend(chosen[backend_id]) for backend_id in due}
    scrub = Scrub(
        catalog_path,
        opened,
        choice=choice,
        pace=Pace(settings.bytes_per_s, is_busy=is_busy),
        workers=WORKERS,
        on_outcome=_tell,
    )
    try:
        await scrub.run()
    finally:
        with trio.CancelScope(shield=True):
            for backend in opened.values():
                await backend.aclose()
    for backend_id, error in scrub.tally.stopped.items():
        log.warning("backend %s is not verified for now: %s", backend_id, error)


def _due(catalog_path: Path, choice: Choice, backends: Mapping[str, BackendSettings]) -> list[str]:
    """The backends with something to verify."""
    found = []
    with ScrubReader(catalog_path) as reader:
        for backend_id in backends:
            with contextlib.closing(reader.pages(backend_id, choice, time.time_ns(), 1)) as pages:
                if next(pages, None) is not None:
                    found.append(backend_id)
    return found


def _tell(outcome: Outcome) -> None:
    if outcome.reading is not None and outcome.reading.reason is not None and outcome.event is not None:
        log.error("%s in backend %s: %s", outcome.row.digest, outcome.row.backend_id, outcome.reading.reason)
