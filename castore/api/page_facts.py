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
from castore.api.sources import Sources
from castore.api.status import states_of
from castore.catalog.event_log import StoredEvent
from castore.catalog.overview import FailedLocation, OverviewReader, PublishedPackage
from castore.errors import StateError
from castore.ingest.rate import Rate

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
VERSIONS_SHOWN: Final = 20
"""Versions in ingest/ on the page. `castore status` names all."""


@dataclass(frozen=True, slots=True)
class StagedVersion:
    """A version in ingest/, how much of it is stored, and why it could not be published."""

    ref: str
    stored_files: int
    total_files: int
    stored_bytes: int
    total_bytes: int
    error: str


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits to be stored."""

    states: tuple[tuple[str, int, int], ...]
    """(state, files, bytes)"""
    rate: Rate
    eta_s: float | None
    staged_bytes: int
    staging_max_bytes: int
    versions: tuple[StagedVersion, ...]
    version_count: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Of the catalog."""

    failed: list[FailedLocation]
    packages: list[PublishedPackage]
    events: list[StoredEvent]


@dataclass(frozen=True, slots=True)
class PageFacts:
    """All that the page says. Without `rows` the catalog cannot be read, and `health` says why; without `counts` alone
    it is being counted for the first time.
    """

    made_at_ns: int
    health: dict[str, Any]
    probes: dict[str, Probe]
    counts: Counts | None
    rows: Rows | None
    queue: Queue | None


async def gather(sources: Sources) -> PageFacts:
    """The facts as of now, within seconds whatever the backends do."""
    health = await sources.health.make()
    probes = await sources.probes.latest()
    rows: Rows | None = None
    with suppress(StateError):  # health says why
        rows = await trio.to_thread.run_sync(_look, sources.catalog_path)
    counts = None if rows is None else await sources.counts.soon()
    return PageFacts(time.time_ns(), health, probes, counts, rows, _queue(sources))


def _look(path: Path) -> Rows:
    with OverviewReader(path) as reader:
        return Rows(
            failed=reader.first_failed(FAILED_SHOWN, PATHS_SHOWN),
            packages=reader.newest_packages(PACKAGES_SHOWN),
            events=reader.newest_events(EVENTS_LOOKED_AT),
        )


def _queue(sources: Sources) -> Queue | None:
    ingest = sources.ingest
    if ingest is None:
        return None
    versions = ingest.store.versions()
    shown = []
    for name, version, inode in versions[:VERSIONS_SHOWN]:
        progress = ingest.publisher.progress(inode)
        shown.append(
            StagedVersion(
                ref=f"{name}/{version}",
                stored_files=progress.stored_files,
                total_files=progress.total_files,
                stored_bytes=progress.stored_bytes,
                total_bytes=progress.total_bytes,
                error=ingest.store.error(inode),
            )
        )
    return Queue(
        states=tuple(states_of(ingest)),
        rate=ingest.uploader.rate.rate(),
        eta_s=ingest.eta_seconds(),
        staged_bytes=ingest.files.staged_bytes,
        staging_max_bytes=ingest.files.max_bytes,
        versions=tuple(shown),
        version_count=len(versions),
    )
