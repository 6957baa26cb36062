"""The scrub of some backends: catalog rows -> bounded channel -> workers -> status and event in shared transactions.

Backends are scrubbed beside each other, so that one that does not answer holds up no other. What is committed counts:
a scrub that is cancelled, or killed, loses only what it was reading.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from castore.catalog.scrub import ALL_DIGESTS, DigestRange, LocationRow, ScrubReader
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import Digest
from castore.errors import StorageError
from castore.registry.locations import Finding, record_finding
from castore.storage.spi import StorageBackend
from castore.verify.batches import BATCH_LOCATIONS, commit_batches, transact
from castore.verify.first_error import FirstError
from castore.verify.reading import ObjectReader, Reading

WORKERS: Final = 16
"""Objects of a backend read at a time: hides the latency of small ones, and is what a local backend reads at once."""
PAGE_LOCATIONS: Final = 1000
"""Rows read from the catalog by one query: 20 ms."""
ERRORS_IN_A_ROW: Final = 8
"""Errors without a success in between after which a backend is given up. Each was tried several times below."""


class Verdict(enum.StrEnum):
    """What became of one location."""

    VERIFIED = "verified"
    FAILED = "failed"
    CHANGED = "changed"
    """It was put anew, deleted or judged by others while it was read: nothing is recorded."""
    UNREADABLE = "unreadable"
    """The backend did not give the object, nor say that it is missing: nothing is recorded."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One location, after it was looked at. `event` is the data of the event that was stored, None when none was."""

    row: LocationRow
    verdict: Verdict
    reading: Reading | None
    error: str
    duration_ms: int
    event: dict[str, Any] | None = None


@dataclass(slots=True)
class Tally:
    """What a scrub has done so far; counts of locations, and bytes."""

    total_count: int | None = None
    """All there are, once they have been counted."""
    total_bytes: int | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, Verdict), 0))
    """Locations by their verdict."""
    read_bytes: int = 0
    """Bytes that were read and hashed, those read a second time among them."""
    stopped: dict[str, str] = field(default_factory=dict)
    """Why a backend was given up, by its id."""

    @property
    def done_count(self) -> int:
        """Locations that were looked at."""
        return sum(self.counts.values())


class Scrub:
    """One run over the locations of some backends.

    `on_outcome` is called for each location, after what was found is committed; it must not block for long.
    """

    def __init__(
        self,
        catalog_path: Path,
        backends: Mapping[str, StorageBackend],
        *,
        within: DigestRange = ALL_DIGESTS,
        on_outcome: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self.tally = Tally()
        self._catalog_path = catalog_path
        self._backends = backends
        self._within = within
        self._on_outcome = on_outcome
        self._errors = FirstError()

    async def run(self) -> None:
        """Look at every location. When cancelled, what was found until then is committed first.

        Raises StateError when the catalog cannot be read or written; backends that fail are in `tally.stopped`.
        """
        with contextlib.closing(CatalogWriter(self._catalog_path)) as writer:
            async with trio.open_nursery() as nursery:
                results, findings = trio.open_memory_channel[Outcome](BATCH_LOCATIONS)
                guard = self._errors.guard
                nursery.start_soon(guard, nursery.cancel_scope, self._count)
                nursery.start_soon(guard, nursery.cancel_scope, commit_batches, findings, partial(self._commit, writer))
                async with results:
                    async with trio.open_nursery() as backends:
                        for backend in self._backends.values():
                            backends.start_soon(guard, nursery.cancel_scope, self._scrub_backend, backend, results)
        self._errors.check()

    async def _count(self) -> None:
        count = size_bytes = 0
        with contextlib.closing(await trio.to_thread.run_sync(ScrubReader, self._catalog_path)) as reader:
            for backend_id in self._backends:
                for part in self._within.slices():
                    part_count, part_bytes = await trio.to_thread.run_sync(reader.totals_within, backend_id, part)
                    count, size_bytes = count + part_count, size_bytes + part_bytes
        self.tally.total_count, self.tally.total_bytes = count, size_bytes

    # one backend

    async def _scrub_backend(self, backend: StorageBackend, results: trio.MemorySendChannel[Outcome]) -> None:
        # A backend that is ill gets one chance: its first error is the answer.
        health = await backend.health()
        patience = 1 if health.status == "fail" else ERRORS_IN_A_ROW
        reader = ObjectReader(backend, on_bytes=self._add_bytes)
        rows, queue = trio.open_memory_channel[LocationRow](WORKERS)
        errors = looked_at = 0
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                nonlocal errors, looked_at
                async for row in queue:
                    outcome = await _look_at(reader, row)
                    looked_at += 1
                    errors = errors + 1 if outcome.verdict is Verdict.UNREADABLE else 0
                    is_last_straw = errors >= patience
                    await results.send(outcome)
                    if is_last_straw:
                        self.tally.stopped.setdefault(backend.backend_id, outcome.error)
                        nursery.cancel_scope.cancel()

            for _ in range(WORKERS):
                nursery.start_soon(self._errors.guard, nursery.cancel_scope, work)
            await self._errors.guard(nursery.cancel_scope, self._send_rows, backend.backend_id, rows)
        self._errors.check()
        if health.status == "fail" and not looked_at:
            # There was nothing to read, and yet it must not look as if all were well.
            self.tally.stopped[backend.backend_id] = health.detail

    async def _send_rows(self, backend_id: str, rows: trio.MemorySendChannel[LocationRow]) -> None:
        last: Digest | None = None
        with contextlib.closing(await trio.to_thread.run_sync(ScrubReader, self._catalog_path)) as reader:
            async with rows:
                while page := await trio.to_thread.run_sync(
                    reader.locations_after, backend_id, last, self._within, PAGE_LOCATIONS
                ):
                    for row in page:
                        await rows.send(row)
                    last = page[-1].digest

    def _add_bytes(self, size_bytes: int) -> None:
        self.tally.read_bytes += size_bytes

    # recording

    async def _commit(self, writer: CatalogWriter, batch: list[Outcome]) -> None:
        """Record a batch and empty it. Raises StateError with the batch as it was."""
        events = await transact(writer, lambda transaction: [_record(transaction, outcome) for outcome in batch])
        recorded, batch[:] = list(zip(batch, events, strict=True)), []
        for outcome, event in recorded:
            told = _told(outcome, event)
            self.tally.counts[told.verdict] += 1
            self._on_outcome(told)


async def _look_at(reader: ObjectReader, row: LocationRow) -> Outcome:
    started = time.monotonic()

    def outcome(verdict: Verdict, reading: Reading | None, error: str) -> Outcome:
        return Outcome(row, verdict, reading, error, round((time.monotonic() - started) * 1000))

    try:
        reading = await reader.judge(row.digest, row.size_bytes)
    except StorageError as exc:
        return outcome(Verdict.UNREADABLE, None, str(exc))
    return outcome(Verdict.VERIFIED if reading.reason is None else Verdict.FAILED, reading, "")


def _record(transaction: Transaction, outcome: Outcome) -> dict[str, Any] | None:
    row, reading = outcome.row, outcome.reading
    if reading is None:
        return None
    return record_finding(transaction, finding_of(row, reading, outcome.duration_ms))


def finding_of(row: LocationRow, reading: Reading, duration_ms: int) -> Finding:
    """What a reading says of the location as it was in the catalog before."""
    return Finding(
        digest=row.digest,
        backend_id=row.backend_id,
        size_bytes=row.size_bytes,
        reason=reading.reason,
        observed_digest=reading.observed_digest,
        duration_ms=duration_ms,
        seen_status=row.status,
        seen_stored_at_ns=row.stored_at_ns,
    )


def _told(outcome: Outcome, event: dict[str, Any] | None) -> Outcome:
    """The outcome as it was recorded."""
    verdict = outcome.verdict
    if event is None and verdict is not Verdict.UNREADABLE:
        verdict = Verdict.CHANGED
    return Outcome(outcome.row, verdict, outcome.reading, outcome.error, outcome.duration_ms, event)
