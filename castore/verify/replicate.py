"""Copying from one backend to another: catalog rows -> intents -> workers read, check and put -> location and event.

First the files, then the manifests, as publish has it; at last the packages that are whole in their new backend are
said to be there. What is committed counts: a replication that is cancelled, or killed, goes on where it was.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from castore.catalog.copying import CopyReader, PackageCopy
from castore.catalog.reader import CatalogReader
from castore.catalog.records import FailureReason
from castore.catalog.scrub import LocationRow
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import Digest
from castore.errors import CatalogBusy, StorageError
from castore.registry.locations import record_copy, record_finding
from castore.storage.spi import BackendHealth, StorageBackend
from castore.verify.aside import AsideRoom
from castore.verify.backend_scrub import ERRORS_IN_A_ROW, WORKERS
from castore.verify.batches import BATCH_LOCATIONS, commit_batches, transact
from castore.verify.first_error import FirstError
from castore.verify.own_puts import own_puts
from castore.verify.reading import ObjectReader, Reading
from castore.verify.scrub import PAGE_LOCATIONS, finding_of

INTENTS_AHEAD: Final = 64
"""Objects that share a commit of intents: few enough that those which a kill leaves behind are few."""
PAGE_PACKAGES: Final = 100
"""Packages that share a transaction at last; looking for what each lacks takes much longer."""
PACKAGES_NAMED: Final = 20
"""Packages named of those that are not whole in the new backend."""


class Copied(enum.StrEnum):
    """What became of one object."""

    COPIED = "copied"
    FAILED = "failed"
    """The source has missing or wrong bytes: its location is `failed`, and nothing was copied."""
    CHANGED = "changed"
    """It was put there by others meanwhile, or is needed no more: nothing is recorded."""
    NOT_COPIED = "not_copied"
    """One of the backends did not do its part: nothing is recorded, the next run tries it again."""


@dataclass(frozen=True, slots=True)
class CopyOutcome:
    """One object, after all was done with it. `event` is the data of the event that was stored, None when none was."""

    row: LocationRow
    result: Copied
    reading: Reading | None
    error: str
    duration_ms: int
    event: dict[str, Any] | None = None

    @property
    def reason(self) -> FailureReason | None:
        """Why the source is bad, if it is."""
        return self.reading.reason if self.reading else None


@dataclass(slots=True)
class CopyTally:
    """What a replication has done so far; counts of objects, and bytes."""

    total_count: int | None = None
    """All there were to copy, once they have been counted."""
    total_bytes: int | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, Copied), 0))
    """Objects by what became of them."""
    copied_bytes: int = 0
    done_bytes: int = 0
    """Of all objects that were looked at, copied or not."""
    stopped: str = ""
    """Why it was given up; empty when it was not."""
    package_count: int = 0
    """Packages that came to be whole in their new backend by this run."""
    incomplete_count: int = 0
    incomplete: list[tuple[str, int]] = field(default_factory=list)
    """Some packages that are not whole there, and how many of their blobs are lacking."""

    @property
    def done_count(self) -> int:
        """Objects that were looked at."""
        return sum(self.counts.values())


class Replication:
    """One run from the backend `source` to the backend `target`, of one package or of all.

    `folder` is where larger objects are kept for a while, in files without a name, and `puts_dir` tells others that its
    puts live. `on_outcome` is called for each
    object, after what became of it is committed; it must not block for long.
    """

    def __init__(
        self,
        catalog_path: Path,
        *,
        source: StorageBackend,
        target: StorageBackend,
        folder: Path,
        puts_dir: Path,
        package: PackageCopy | None = None,
        on_outcome: Callable[[CopyOutcome], None] = lambda _: None,
    ) -> None:
        self.tally = CopyTally()
        self._catalog_path = catalog_path
        self._source = source
        self._folder = folder
        self._route = (source.backend_id, target.backend_id)
        self._target = target
        self._package = package
        self._on_outcome = on_outcome
        self._puts_dir = puts_dir
        self._owner = ""
        self._errors = FirstError()
        self._reader = ObjectReader(source)
        self._room = AsideRoom(folder)
        self._waiting: set[Digest] = set()
        """Whose intents are committed, and whose puts have not begun."""
        self._errors_in_a_row = 0
        self._patience = ERRORS_IN_A_ROW

    async def run(self) -> None:
        """Copy everything. When cancelled, what was put until then is committed first.

        Raises StateError when the catalog cannot be read or written; that a backend failed is in `tally.stopped`.
        """
        ill = [health.detail for health in await self._healths() if health.status == "fail"]
        if ill:
            # One chance: its first error is the answer.
            self._patience = 1
        with contextlib.closing(CatalogWriter(self._catalog_path)) as writer:
            counter = await trio.to_thread.run_sync(CopyReader, self._catalog_path)
            with contextlib.closing(counter):
                # Counted as it is now, while the copying goes on.
                await trio.to_thread.run_sync(counter.hold)
                backends = {self._target.backend_id: self._target}
                async with own_puts(writer, backends, self._puts_dir) as self._owner:
                    try:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(self._errors.guard, nursery.cancel_scope, self._count, counter)
                            await self._errors.guard(nursery.cancel_scope, self._copy_all, writer)
                    finally:
                        with trio.CancelScope(shield=True), contextlib.suppress(CatalogBusy):
                            await writer.run(self._forget_waiting)
        self._errors.check()
        if ill and not self.tally.done_count:
            # There was nothing to copy, and yet it must not look as if all were well.
            self.tally.stopped = ill[0]

    async def _healths(self) -> list[BackendHealth]:
        found: list[BackendHealth] = []

        async def ask(backend: StorageBackend) -> None:
            found.append(await backend.health())

        async with trio.open_nursery() as nursery:
            for backend in (self._source, self._target):
                nursery.start_soon(ask, backend)
        return found

    async def _count(self, reader: CopyReader) -> None:
        count = size_bytes = 0
        parts = reader.copyable_totals(*self._route, self._package)
        while (part := await trio.to_thread.run_sync(next, parts, None)) is not None:
            count, size_bytes = count + part[0], size_bytes + part[1]
        self.tally.total_count, self.tally.total_bytes = count, size_bytes
        await trio.to_thread.run_sync(reader.let_go)

    def _forget_waiting(self, transaction: Transaction) -> None:
        transaction.drop_intents((digest, self._target.backend_id) for digest in self._waiting)

    async def _copy_all(self, writer: CatalogWriter) -> None:
        reader = await trio.to_thread.run_sync(CopyReader, self._catalog_path)
        with contextlib.closing(reader):
            for manifests in (False, True):
                await self._copy(writer, reader, manifests)
                if self.tally.stopped:
                    return
            await self._settle_packages(writer, reader)

    # copying

    async def _copy(self, writer: CatalogWriter, reader: CopyReader, manifests: bool) -> None:
        """Copy the files, or the manifests; when it returns, what became of them is committed."""
        guard = self._errors.guard
        blobs = CatalogReader(self._catalog_path)
        with contextlib.closing(blobs):
            async with trio.open_nursery() as nursery:
                results, findings = trio.open_memory_channel[CopyOutcome](BATCH_LOCATIONS)
                nursery.start_soon(guard, nursery.cancel_scope, commit_batches, findings, partial(self._commit, writer))
                async with results, trio.open_nursery() as workers:
                    rows, queue = trio.open_memory_channel[LocationRow](WORKERS)
                    for _ in range(WORKERS):
                        workers.start_soon(
                            guard, nursery.cancel_scope, self._work, blobs, queue, results, workers.cancel_scope
                        )
                    async with rows:
                        pages = reader.copyable(*self._route, self._package, PAGE_LOCATIONS, manifests=manifests)
                        await guard(nursery.cancel_scope, self._send_rows, writer, pages, rows, results)
        self._errors.check()

    async def _send_rows(
        self,
        writer: CatalogWriter,
        pages: Iterator[list[LocationRow]],
        rows: trio.MemorySendChannel[LocationRow],
        results: trio.MemorySendChannel[CopyOutcome],
    ) -> None:
        while (page := await trio.to_thread.run_sync(next, pages, None)) is not None:
            for first in range(0, len(page), INTENTS_AHEAD):
                batch = page[first : first + INTENTS_AHEAD]
                wanted = await transact(writer, partial(self._begin, batch))
                self._waiting |= wanted
                for row in batch:
                    if row.digest in wanted:
                        await rows.send(row)
                    else:
                        await results.send(CopyOutcome(row, Copied.CHANGED, None, "", 0))

    def _begin(self, batch: list[LocationRow], transaction: Transaction) -> set[Digest]:
        target_id = self._target.backend_id
        wanted = {row.digest for row in batch if target_id not in transaction.good_backends(row.digest)}
        # What is being deleted there is left to the next run.
        wanted -= {digest for digest, _ in transaction.being_deleted((digest, target_id) for digest in wanted)}
        transaction.add_intents(((digest, target_id) for digest in wanted), owner=self._owner)
        return wanted

    async def _work(
        self,
        blobs: CatalogReader,
        queue: trio.MemoryReceiveChannel[LocationRow],
        results: trio.MemorySendChannel[CopyOutcome],
        scope: trio.CancelScope,
    ) -> None:
        async for row in queue:
            outcome = await self._copy_one(blobs, row)
            self._errors_in_a_row = self._errors_in_a_row + 1 if outcome.result is Copied.NOT_COPIED else 0
            is_last_straw = self._errors_in_a_row >= self._patience
            await results.send(outcome)
            if is_last_straw:
                self.tally.stopped = self.tally.stopped or outcome.error
                scope.cancel()

    async def _copy_one(self, blobs: CatalogReader, row: LocationRow) -> CopyOutcome:
        started = time.monotonic()
        reading, error = None, ""
        try:
            async with self._room.take(row.size_bytes) as aside:
                reading = await self._reader.judge(row.digest, row.size_bytes, keep=aside.keep)
                blob = blobs.blob(row.blob_id)
                if blob is None:
                    result = Copied.CHANGED
                elif reading.reason is not None:
                    result = Copied.FAILED
                else:
                    self._waiting.discard(row.digest)
                    await self._target.put(row.digest, aside.source(blob.summary))
                    result = Copied.COPIED
        except StorageError as exc:
            result, error = Copied.NOT_COPIED, str(exc)
        except OSError as exc:
            result = Copied.NOT_COPIED
            why = exc.strerror or exc
            error = f"{self._folder}: {row.size_bytes} bytes of {row.digest} cannot be kept there for a while: {why}"
        return CopyOutcome(row, result, reading, error, round((time.monotonic() - started) * 1000))

    # recording

    async def _commit(self, writer: CatalogWriter, batch: list[CopyOutcome]) -> None:
        """Record a batch and empty it. Raises StateError with the batch as it was."""
        events = await transact(writer, lambda transaction: [self._record(transaction, outcome) for outcome in batch])
        self._waiting -= {outcome.row.digest for outcome in batch}
        recorded, batch[:] = list(zip(batch, events, strict=True)), []
        for outcome, event in recorded:
            told = outcome if outcome.result is Copied.NOT_COPIED or event is not None else _changed(outcome)
            self.tally.counts[told.result] += 1
            self.tally.done_bytes += told.row.size_bytes
            self.tally.copied_bytes += told.row.size_bytes if told.result is Copied.COPIED else 0
            self._on_outcome(replace(told, event=event))

    def _record(self, transaction: Transaction, outcome: CopyOutcome) -> dict[str, Any] | None:
        row, reading = outcome.row, outcome.reading
        if outcome.result is Copied.COPIED:
            return record_copy(
                transaction,
                row.digest,
                self._target.backend_id,
                source_id=row.backend_id,
                size_bytes=row.size_bytes,
                duration_ms=outcome.duration_ms,
            )
        if row.digest in self._waiting:
            # Else a put failed: the intent tells that something of it may be left there.
            transaction.drop_intents([(row.digest, self._target.backend_id)])
        if outcome.result is Copied.FAILED and reading is not None:
            return record_finding(transaction, finding_of(row, reading, outcome.duration_ms))
        return None

    # packages

    async def _settle_packages(self, writer: CatalogWriter, reader: CopyReader) -> None:
        """Say of each package that is whole in the target that it is stored there."""
        if self._package is not None:
            await self._settle(writer, reader, [self._package])
            return
        after = 0
        while page := await trio.to_thread.run_sync(reader.packages_not_in, *self._route, after, PAGE_PACKAGES):
            await self._settle(writer, reader, page)
            after = page[-1].package_id

    async def _settle(self, writer: CatalogWriter, reader: CopyReader, page: list[PackageCopy]) -> None:
        target_id = self._target.backend_id
        whole: list[int] = []
        for package in page:
            lacking = await trio.to_thread.run_sync(reader.lacking_count, package, target_id)
            if not lacking:
                whole.append(package.package_id)
                continue
            self.tally.incomplete_count += 1
            if len(self.tally.incomplete) < PACKAGES_NAMED:
                self.tally.incomplete.append((package.ref, lacking))
        if whole:
            self.tally.package_count += await transact(
                writer, lambda transaction: sum(transaction.add_package_backend(one, target_id) for one in whole)
            )


def _changed(outcome: CopyOutcome) -> CopyOutcome:
    return replace(outcome, result=Copied.CHANGED)
