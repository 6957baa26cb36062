"""What the status page says, gathered. Everything that may be many is asked for up to a bound, and counted."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from castore.api.counts import Counts
from castore.api.probes import Probe
from castore.api.queue_report import MountSaid, Queue, queue_of
from castore.api.sources import Sources
from castore.catalog.event_log import StoredEvent
from castore.catalog.overview import FailedLocation, OverviewReader, PublishedPackage
from castore.errors import StateError

PACKAGES_SHOWN: Final = 20
"""Packages on the page: those published last. `castore package list` names all."""
FAILED_SHOWN: Final = 50
"""Failed locations on the page, a screen of them or two; some milliseconds, however many there are."""
PATHS_SHOWN: Final = 3
"""Files named for one of them: an empty file may be in thousands of packages."""
EVENTS_SHOWN: Final = 20
"""Rows of events on the page: the last ones. /v1/events gives all."""
EVENTS_LOOKED_AT: Final = 500
"""Events that these rows are made of: a scrub makes one for each object, and they share a row."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Of the catalog."""

    failed: list[FailedLocation]
    packages: list[PublishedPackage]
    events: list[StoredEvent]


@dataclass(frozen=True, slots=True)
class PageFacts:
    """All that the page says. Without `rows` the catalog cannot be read, and `health` says why; without `counts` alone
    it is being counted for the first time. `mount` is what another process said, of whom the queue is then.
    """

    made_at_ns: int
    health: dict[str, Any]
    probes: dict[str, Probe]
    counts: Counts | None
    rows: Rows | None
    queue: Queue | None
    mount: MountSaid | None


async def gather(sources: Sources) -> PageFacts:
    """The facts as of now, within seconds whatever the backends do."""
    health = await sources.health.make()
    probes = await sources.probes.latest()
    rows: Rows | None = None
    with suppress(StateError):  # health says why
        rows = await trio.to_thread.run_sync(_look, sources.catalog_path)
    counts = None if rows is None else await sources.counts.soon()
    mount = None if sources.mount is None else await sources.mount.latest()
    queue = None if sources.ingest is None else queue_of(sources.ingest)
    if mount is not None:
        queue = mount.queue
    return PageFacts(time.time_ns(), health, probes, counts, rows, queue, mount)


def _look(path: Path) -> Rows:
    with OverviewReader(path) as reader:
        return Rows(
            failed=reader.first_failed(FAILED_SHOWN, PATHS_SHOWN),
            packages=reader.newest_packages(PACKAGES_SHOWN),
            events=reader.newest_events(EVENTS_LOOKED_AT),
        )
