"""The scrub of some backends: catalog rows -> bounded channel -> workers -> status and event in shared transactions.

Backends are scrubbed beside each other, so that one that does not answer holds up no other. What is committed counts:
a scrub that is cancelled, or killed, loses only what it was reading.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from castore.catalog.scrub import EVERYTHING, Choice, LocationRow, ScrubReader
from castore.catalog.writer import CatalogWriter, Transaction
from castore.registry.locations import Finding, record_finding
from castore.storage.spi import StorageBackend
from castore.verify.backend_scrub import OUTAGE_SECONDS, WORKERS, BackendScrub
from castore.verify.batches import BATCH_LOCATIONS, commit_batches, transact
from castore.verify.first_error import FirstError
from castore.verify.limits import Limits
from castore.verify.outcomes import Outcome, Tally, Verdict
from castore.verify.pace import Pace
from castore.verify.reading import Reading

PAGE_LOCATIONS: Final = 1000
"""Rows read from the catalog by one query: 20 ms."""


class Scrub:
    """One run over the chosen locations of some backends, oldest first.

    `limits` end it before its time, `pace` slows it down; `workers` objects of a backend are read at a time, by default
    as many as its pace needs, and one that was well at first is waited for `outage_s` seconds. `on_outcome` is called
    for each location, after what was found is committed; it must not block for long.
    """

    def __init__(
        self,
        catalog_path: Path,
        backends: Mapping[str, StorageBackend],
        *,
        choice: Choice = EVERYTHING,
        limits: Limits | None = None,
        pace: Pace | None = None,
        workers: int | None = None,
        outage_s: float = OUTAGE_SECONDS,
        on_outcome: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self.tally = Tally()
        self._catalog_path = catalog_path
        self._backends = backends
        self._choice = choice
        self._limits = limits or Limits()
        self._pace = pace or Pace()
        self._workers = self._pace.workers(WORKERS) if workers is None else workers
        self._outage_s = outage_s
        self._now_ns = time.time_ns()
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
                with contextlib.closing(reader.chosen_totals(backend_id, self._choice, self._now_ns)) as parts:
                    while (part := await trio.to_thread.run_sync(next, parts, None)) is not None:
                        count, size_bytes = count + part[0], size_bytes + part[1]
        self.tally.total_count, self.tally.total_bytes = count, size_bytes

    # one backend

    async def _scrub_backend(self, backend: StorageBackend, results: trio.MemorySendChannel[Outcome]) -> None:
        scrub = BackendScrub(
            backend,
            limits=self._limits,
            pace=self._pace,
            on_bytes=self._add_bytes,
            workers=self._workers,
            outage_s=self._outage_s,
        )
        await scrub.run(partial(self._send_rows, backend.backend_id), results)
        if scrub.stopped:
            self.tally.stopped[backend.backend_id] = scrub.stopped

    async def _send_rows(self, backend_id: str, rows: trio.MemorySendChannel[LocationRow]) -> None:
        with contextlib.closing(await trio.to_thread.run_sync(ScrubReader, self._catalog_path)) as reader:
            pages = reader.pages(backend_id, self._choice, self._now_ns, PAGE_LOCATIONS)
            with contextlib.closing(pages):
                while (page := await trio.to_thread.run_sync(next, pages, None)) is not None:
                    for row in page:
                        await rows.send(row)

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
    if event is None and outcome.verdict is not Verdict.UNREACHABLE:
        return replace(outcome, verdict=Verdict.CHANGED)
    return replace(outcome, event=event)
