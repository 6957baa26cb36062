"""Mending failed locations: judged once more -> good bytes kept aside -> put -> read back -> status and event.

Nothing is overwritten that is good, and nothing is put whose digest was not computed just before. First come good
copies in other backends and in the disk cache, for one location after the other; then the files of a directory, each
for the locations that it mends. What is committed counts: a repair that is cancelled, or killed, goes on where it was.
"""

from __future__ import annotations

import bisect
import contextlib
import enum
import os
import stat
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from castore.blobs.disk_cache import DiskCache
from castore.catalog.records import Blob, FailureReason
from castore.catalog.repairing import RepairReader
from castore.catalog.scrub import LocationRow
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import PRIMARY_ALGORITHM
from castore.errors import StorageError
from castore.failpoint import failpoint
from castore.registry.locations import Finding, record_finding, record_repair
from castore.storage.spi import StorageBackend
from castore.verify.aside import Aside, AsideRoom
from castore.verify.backend_scrub import ERRORS_IN_A_ROW, WORKERS
from castore.verify.batches import BATCH_LOCATIONS, commit_batches, transact
from castore.verify.first_error import FirstError
from castore.verify.good_copies import GoodCopies, GoodCopy, Said
from castore.verify.own_puts import own_puts
from castore.verify.reading import ObjectReader
from castore.verify.scrub import PAGE_LOCATIONS, finding_of

UNREADABLE_NAMED: Final = 20
"""Files of the directory that could not be read and are named."""


class Mended(enum.StrEnum):
    """What became of one failed location."""

    REPAIRED = "repaired"
    VERIFIED = "verified"
    """It was good again before anything was put."""
    NO_COPY = "no_copy"
    """No good copy of it was found anywhere: it stays failed."""
    CHANGED = "changed"
    """It was put anew, deleted or judged by others meanwhile: nothing is recorded."""
    NOT_REPAIRED = "not_repaired"
    """A backend did not do its part, or there was no room: it stays failed, the next run tries it again."""


@dataclass(frozen=True, slots=True)
class RepairOutcome:
    """One failed location, after all was done with it. `event` is the data of the event that was stored, if one was."""

    row: LocationRow
    result: Mended
    reason: FailureReason | None = None
    """Why it was failed, as it was found now."""
    copy: GoodCopy | None = None
    error: str = ""
    duration_ms: int = 0
    findings: tuple[Finding, ...] = ()
    """What was found of other locations on the way."""
    event: dict[str, Any] | None = None


@dataclass(slots=True)
class RepairTally:
    """What a repair has done so far; counts of locations, and bytes."""

    total_count: int = 0
    total_bytes: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, Mended), 0))
    done_bytes: int = 0
    stopped: dict[str, str] = field(default_factory=dict)
    """Why a backend was given up, by its id."""
    unreadable_count: int = 0
    unreadable: list[str] = field(default_factory=list)
    """Some files of the directory that could not be read, with the reason."""

    @property
    def done_count(self) -> int:
        """Locations that were dealt with."""
        return sum(self.counts.values())


class Repair:
    """One run over the failed locations of the backends named by `targets`.

    `backends` are all that good copies may come from; `folder` is where larger objects are kept for a while, in files
    without a name, and `puts_dir` tells others that its puts live. `directory` is searched for what no backend and no
    cache has. `on_outcome` is called for each location, after what became of it is committed; it must not block for
    long.
    """

    def __init__(
        self,
        catalog_path: Path,
        backends: Mapping[str, StorageBackend],
        *,
        targets: tuple[str, ...],
        folder: Path,
        puts_dir: Path,
        cache: DiskCache | None = None,
        directory: Path | None = None,
        on_outcome: Callable[[RepairOutcome], None] = lambda _: None,
    ) -> None:
        self.tally = RepairTally()
        self._catalog_path = catalog_path
        self._backends = backends
        self._targets = targets
        self._folder = folder
        self._cache = cache
        self._directory = directory
        self._on_outcome = on_outcome
        self._puts_dir = puts_dir
        self._owner = ""
        self._errors = FirstError()
        self._room = AsideRoom(folder)
        self._readers = {backend_id: ObjectReader(backends[backend_id]) for backend_id in targets}
        self._errors_in_a_row = 0
        self._lost: dict[str, array[int]] = {backend_id: array("q") for backend_id in targets}
        """The blobs of which no copy was found until now, by backend; they are told at the end."""
        self._found: set[tuple[str, int]] = set()
        """(backend id, blob) of what the directory had, told already."""
        self._catalog: RepairReader
        self._copies: GoodCopies
        self._writer: CatalogWriter
        self._results: trio.MemorySendChannel[RepairOutcome]

    async def run(self) -> None:
        """Mend what can be mended. When cancelled, what was put until then is committed first.

        Raises StateError when the catalog cannot be read or written; backends that fail are in `tally.stopped`.
        """
        with (
            contextlib.closing(CatalogWriter(self._catalog_path)) as self._writer,
            contextlib.closing(RepairReader(self._catalog_path)) as self._catalog,
        ):
            self._copies = GoodCopies(self._catalog, self._backends, cache=self._cache)
            totals = await trio.to_thread.run_sync(self._catalog.failed_totals, self._targets)
            self.tally.total_count, self.tally.total_bytes = totals
            async with (
                own_puts(self._writer, self._backends, self._puts_dir) as self._owner,
                trio.open_nursery() as nursery,
            ):
                self._results, findings = trio.open_memory_channel[RepairOutcome](BATCH_LOCATIONS)
                commit = partial(commit_batches, findings, self._commit)
                nursery.start_soon(self._errors.guard, nursery.cancel_scope, commit)
                async with self._results:
                    await self._errors.guard(nursery.cancel_scope, self._mend_all)
        self._errors.check()

    async def _mend_all(self) -> None:
        for backend_id in self._targets:
            await self._mend_backend(backend_id)
        if self._directory is not None:
            await self._search(self._directory)
        for backend_id, lost in self._lost.items():
            for blob_id in lost:
                row = self._catalog.failed_location(backend_id, blob_id)
                if row is not None and (backend_id, blob_id) not in self._found:
                    await self._results.send(RepairOutcome(row, Mended.NO_COPY))

    async def _work(self, take: Callable[[Any], Awaitable[None]], items: Iterator[list[Any]], scope: Any) -> None:
        """Do all of `items` by WORKERS tasks; each page is asked for in a thread, when it is wanted."""
        queue, waiting = trio.open_memory_channel[Any](WORKERS)
        async with trio.open_nursery() as nursery:
            scope.append(nursery.cancel_scope)

            async def work() -> None:
                async for item in waiting:
                    await take(item)

            async def send() -> None:
                while (page := await trio.to_thread.run_sync(next, items, None)) is not None:
                    for item in page:
                        await queue.send(item)

            for _ in range(WORKERS):
                nursery.start_soon(self._errors.guard, nursery.cancel_scope, work)
            async with queue:
                await self._errors.guard(nursery.cancel_scope, send)
        self._errors.check()

    # from other backends and the cache

    async def _mend_backend(self, backend_id: str) -> None:
        self._errors_in_a_row = 0
        scopes: list[trio.CancelScope] = []

        async def take(row: LocationRow) -> None:
            outcome = await self._mend(row, partial(self._elsewhere, row))
            if outcome.result is Mended.NO_COPY:
                self._lost[backend_id].append(row.blob_id)
                if outcome.findings:
                    await transact(self._writer, partial(_record_findings, outcome.findings))
                return
            await self._results.send(outcome)
            is_error = outcome.result is Mended.NOT_REPAIRED
            self._errors_in_a_row = self._errors_in_a_row + 1 if is_error else 0
            if self._errors_in_a_row >= ERRORS_IN_A_ROW:
                self.tally.stopped.setdefault(backend_id, outcome.error)
                scopes[0].cancel()

        await self._work(take, self._failed(backend_id), scopes)

    def _failed(self, backend_id: str) -> Iterator[list[LocationRow]]:
        after = 0
        with contextlib.closing(RepairReader(self._catalog_path)) as reader:
            while page := reader.failed_after(backend_id, after, PAGE_LOCATIONS):
                yield page
                after = page[-1].blob_id

    async def _elsewhere(self, row: LocationRow, blob: Blob, aside: Aside, said: Said) -> GoodCopy | None:
        return await self._copies.elsewhere(blob, row.backend_id, aside, said)

    # from a directory

    async def _search(self, directory: Path) -> None:
        """Every file that has the size of something lost is hashed; those that are wanted mend what they can."""
        sizes = await trio.to_thread.run_sync(self._catalog.failed_sizes, self._targets)

        async def take(path: Path) -> None:
            try:
                digest, _ = await self._copies.digest_of(path, PRIMARY_ALGORITHM)
            except OSError as exc:
                self._unreadable(path, exc)
                return
            for row in self._catalog.failed_with(digest.raw, self._targets):
                key = (row.backend_id, row.blob_id)
                if key in self._found:
                    continue  # the same bytes are there many times
                self._found.add(key)
                outcome = await self._mend(row, partial(self._in_file, path))
                if outcome.result is Mended.NO_COPY:
                    self._found.discard(key)
                else:
                    await self._results.send(outcome)

        if sizes:
            await self._work(take, _files(directory, sizes, self._unreadable), [])

    async def _in_file(self, path: Path, blob: Blob, aside: Aside, _said: Said) -> GoodCopy | None:
        return await self._copies.in_file(path, blob, aside)

    def _unreadable(self, path: object, exc: OSError) -> None:
        self.tally.unreadable_count += 1
        if len(self.tally.unreadable) < UNREADABLE_NAMED:
            self.tally.unreadable.append(f"{path}: {exc.strerror or exc}")

    # one location

    async def _mend(
        self, row: LocationRow, find: Callable[[Blob, Aside, Said], Awaitable[GoodCopy | None]]
    ) -> RepairOutcome:
        """Put the bytes that `find` keeps aside, if the location is still bad."""
        started = time.monotonic()
        said = Said()

        def outcome(result: Mended, **more: Any) -> RepairOutcome:
            duration_ms = round((time.monotonic() - started) * 1000)
            return RepairOutcome(row, result, findings=tuple(said.findings), duration_ms=duration_ms, **more)

        try:
            before = await self._readers[row.backend_id].judge(row.digest, row.size_bytes)
            if before.reason is None:
                said.findings.append(finding_of(row, before, round((time.monotonic() - started) * 1000)))
                return outcome(Mended.VERIFIED)
            blob = self._catalog.blob(row.blob_id)
            if blob is None:
                return outcome(Mended.CHANGED)
            async with self._room.take(row.size_bytes) as aside:
                copy = await find(blob, aside, said)
                if copy is None:
                    if said.errors:
                        return outcome(Mended.NOT_REPAIRED, reason=before.reason, error=said.errors[0])
                    return outcome(Mended.NO_COPY, reason=before.reason)
                failpoint("repair.kept")
                if not await transact(self._writer, partial(self._begin, row)):
                    return outcome(Mended.CHANGED)
                failpoint("repair.intended")
                await self._backends[row.backend_id].put(row.digest, aside.source(blob.summary))
            failpoint("repair.put")
            after = await self._readers[row.backend_id].judge(row.digest, row.size_bytes)
        except StorageError as exc:
            return outcome(Mended.NOT_REPAIRED, error=str(exc))
        except OSError as exc:
            error = f"{self._folder}: {row.size_bytes} bytes of {row.digest} cannot be kept there for a while: {exc}"
            return outcome(Mended.NOT_REPAIRED, error=error)
        if after.reason is not None:
            error = f"backend {row.backend_id}: {row.digest} was put, and reads back with a {after.reason}"
            return outcome(Mended.NOT_REPAIRED, reason=after.reason, error=error)
        return outcome(Mended.REPAIRED, reason=before.reason, copy=copy)

    def _begin(self, row: LocationRow, transaction: Transaction) -> bool:
        """Note the put, if the location is still as it was."""
        if not transaction.is_failed(row.digest, row.backend_id, row.stored_at_ns):
            return False
        transaction.add_intents([(row.digest, row.backend_id)], owner=self._owner)
        return True

    # recording

    async def _commit(self, batch: list[RepairOutcome]) -> None:
        """Record a batch and empty it. Raises StateError with the batch as it was."""
        told = await transact(self._writer, lambda transaction: [_record(transaction, outcome) for outcome in batch])
        failpoint("repair.recorded")
        batch.clear()
        for outcome in told:
            self.tally.counts[outcome.result] += 1
            self.tally.done_bytes += outcome.row.size_bytes
            self._on_outcome(outcome)


def _record_findings(findings: tuple[Finding, ...], transaction: Transaction) -> None:
    for finding in findings:
        record_finding(transaction, finding)


def _record(transaction: Transaction, outcome: RepairOutcome) -> RepairOutcome:
    """The outcome as it was recorded."""
    row = outcome.row
    events = [record_finding(transaction, finding) for finding in outcome.findings]
    event = None
    if outcome.result is Mended.VERIFIED:
        event = events[-1]
    elif outcome.result is Mended.REPAIRED and outcome.copy is not None and outcome.reason is not None:
        event = record_repair(
            transaction,
            row.digest,
            row.backend_id,
            seen_stored_at_ns=row.stored_at_ns,
            size_bytes=row.size_bytes,
            reason=outcome.reason,
            source=outcome.copy.kind,
            source_id=outcome.copy.backend_id,
            duration_ms=outcome.duration_ms,
        )
    else:
        return outcome
    return replace(outcome, event=event) if event is not None else replace(outcome, result=Mended.CHANGED)


def _files(directory: Path, sizes: array[int], on_error: Callable[[object, OSError], None]) -> Iterator[list[Path]]:
    """The regular files below a directory that have one of the sizes, by folder. Links are not followed."""
    walk = os.walk(directory, onerror=lambda exc: on_error(exc.filename, exc))
    for folder, folders, names in walk:
        folders.sort()
        found = []
        for name in sorted(names):
            path = Path(folder, name)
            try:
                status = path.lstat()
            except OSError as exc:
                on_error(path, exc)
                continue
            if stat.S_ISREG(status.st_mode):
                place = bisect.bisect_left(sizes, status.st_size)
                if place < len(sizes) and sizes[place] == status.st_size:
                    found.append(path)
        yield found
