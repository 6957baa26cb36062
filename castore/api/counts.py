"""What takes a scan of the catalog to know, counted once for all who ask. It changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from castore.catalog.overview import BackendCoverage, OverviewReader
from castore.catalog.records import FailureReason, LocationStatus
from castore.errors import StateError

COUNTS_SHARE: Final = 10
"""Counting the locations takes a second for each million. What took long is given again for that many times as long, so
that whoever watches keeps no more than a tenth of a core busy."""
COUNTS_SECONDS: Final = 3.0
"""How long metrics and the page wait for the first counts; then they are made without: Prometheus gives up at 10."""
COVERAGE_DAYS: Final = (1, 7, 30, 90)
"""Ages by which verified locations are counted: a day, a week, what health asks for, a quarter."""
_SHORT_SECONDS: Final = 0.05
"""What took less is counted again each time."""
_DAY_NS: Final = 86_400 * 10**9


@dataclass(frozen=True, slots=True)
class Counts:
    """As of `counted_at_ns`."""

    counted_at_ns: int
    package_count: int
    package_bytes: int
    locations: list[tuple[str, LocationStatus, int, int]]
    """(backend_id, status, number, bytes)"""
    failures: list[tuple[str, FailureReason, int]]
    """(backend_id, reason, number)"""
    coverage: list[BackendCoverage]
    """`verified_since` is by COVERAGE_DAYS."""

    @property
    def failed_count(self) -> int:
        """Locations that are failed."""
        return sum(count for _, status, count, _ in self.locations if status is LocationStatus.FAILED)


def count(catalog_path: Path) -> Counts:
    """Count everything, in one go. Raises StateError."""
    now = time.time_ns()
    with OverviewReader(catalog_path) as reader:
        return Counts(
            now,
            *reader.totals(),
            locations=reader.location_counts(),
            failures=reader.failures(),
            coverage=reader.coverage(tuple(now - days * _DAY_NS for days in COVERAGE_DAYS)),
        )


class CatalogCounts:
    """Counts when asked, in a thread and on a connection of its own: reads and lookups go on. `run` must be running."""

    def __init__(self, catalog_path: Path, *, count: Callable[[Path], Counts] = count) -> None:
        self._catalog_path = catalog_path
        self._count_catalog = count
        self._nursery: trio.Nursery | None = None
        self._counting: trio.Event | None = None
        self._known: Counts | None = None
        self._error: StateError | None = None
        self._took = 0.0
        self._good_until = 0.0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Count what is asked for, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def latest(self) -> Counts:
        """Counted now; where that takes long, as they are known, and counted anew beside it.

        The first ones are waited for. Raises StateError when the catalog cannot be read.
        """
        assert self._nursery is not None
        if self._known is not None and trio.current_time() <= self._good_until:
            return self._known
        if self._counting is None:
            self._counting = trio.Event()
            self._nursery.start_soon(self._count, self._counting)
        if self._known is None or self._took <= _SHORT_SECONDS:
            await self._counting.wait()
        if self._known is None:
            raise StateError(str(self._error)) from self._error
        return self._known

    async def soon(self) -> Counts | None:
        """The same, or None after COUNTS_SECONDS, and when the catalog cannot be read."""
        with suppress(StateError), trio.move_on_after(COUNTS_SECONDS):
            return await self.latest()
        return None

    async def _count(self, done: trio.Event) -> None:
        started = trio.current_time()
        try:
            self._known = await trio.to_thread.run_sync(self._count_catalog, self._catalog_path, abandon_on_cancel=True)
        except StateError as exc:
            self._known, self._error = None, exc
        finally:
            self._took = trio.current_time() - started
            long = self._took > _SHORT_SECONDS
            self._good_until = trio.current_time() + (COUNTS_SHARE * self._took if long else 0)
            self._counting = None
            done.set()
