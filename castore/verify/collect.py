"""Garbage collection: expired packages, then blobs that nothing needs, then orphans. What may go is decided by marks.

Each object goes through three steps: a mark, in the transaction that proves that nothing needs it; the delete; the
rows. A kill between them leaves marks, which the next collection goes on with. `docs/decisions/0024-deletion.md` says
why.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import trio

from castore.catalog import collecting, deleting, schema
from castore.catalog.collecting import CollectReader, Doomed, Unneeded
from castore.catalog.connection import open_writer
from castore.catalog.deleting import DeletedPackage
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import MANIFEST_ALGORITHM, PRIMARY_ALGORITHM, BlobSummary, Digest
from castore.errors import ObjectMissing, StorageError
from castore.failpoint import failpoint
from castore.registry.deletion import SEND_SECONDS, end_purge, is_over, record_gone
from castore.storage.spi import ObjectInfo, StorageBackend
from castore.verify.batches import transact
from castore.verify.first_error import FirstError
from castore.verify.own_puts import clear_dead_puts

BATCH_OBJECTS: Final = 256
"""Objects that share a mark: some 10 ms of the write lock, and what a kill leaves marked at most."""
WORKERS: Final = 16
"""Deletes at a time."""
ENTRIES_AT_ONCE: Final = 5000
"""Entries of a purged package that go with one transaction: some 50 ms of the write lock."""
LISTED_AT_ONCE: Final = 1000
"""Objects of a listing that are looked up together."""
ERRORS_IN_A_ROW: Final = 8
"""Deletes that fail one after the other, until a backend is given up."""


@dataclass(slots=True)
class Counted:
    """Objects, and their bytes."""

    count: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        """One more."""
        self.count += 1
        self.size_bytes += size_bytes


@dataclass(slots=True)
class BackendTally:
    """What there is to collect in one backend; `deleted` is what of it went. `young` and `in_use` stay for now."""

    unneeded: Counted = field(default_factory=Counted)
    orphans: Counted = field(default_factory=Counted)
    young: Counted = field(default_factory=Counted)
    in_use: Counted = field(default_factory=Counted)
    deleted: Counted = field(default_factory=Counted)
    unknown_packages: int = 0
    """Manifests that the catalog does not know: with one of them, nothing is collected there."""
    stopped: str = ""
    """Why it was given up, or not collected from."""


@dataclass(slots=True)
class CollectTally:
    """What a collection found and did."""

    backends: dict[str, BackendTally]
    expired: list[str] = field(default_factory=list)
    """Deleted packages whose time to be restored is over."""
    expired_bytes: int = 0
    purged_count: int = 0
    waiting: list[str] = field(default_factory=list)
    """Expired packages whose manifest could not be deleted everywhere, so that nothing of them was touched."""
    left_count: int = 0
    """Marks that stay for a later collection."""

    @property
    def deleted_bytes(self) -> int:
        """Of all backends."""
        return sum(tally.deleted.size_bytes for tally in self.backends.values())


class GarbageCollection:
    """One run. Without `deletes` it looks only. Whoever deletes holds the turn of `castore.registry.deletion.gc_turn`.

    `in_use` gives the digests that a daemon's readers have open. `on_forgotten` is called, in a thread, with each blob
    that the catalog forgot. `workspace` is the database of ingest/, `puts_dir` tells who puts beside the daemon.
    """

    def __init__(
        self,
        catalog_path: Path,
        backends: Mapping[str, StorageBackend],
        *,
        workspace: Path,
        puts_dir: Path,
        restore_within_seconds: float,
        orphans_after_seconds: float,
        deletes: bool,
        unknown_packages_go: bool = False,
        orphans_go: bool = True,
        in_use: Callable[[], Collection[Digest]] = tuple,
        on_forgotten: Callable[[BlobSummary], None] = lambda _: None,
    ) -> None:
        now = time.time_ns()
        self.tally = CollectTally({backend_id: BackendTally() for backend_id in backends})
        self._catalog_path = catalog_path
        self._backends = backends
        self._workspace = workspace
        self._puts_dir = puts_dir
        self._restorable_ns = now - int(restore_within_seconds * 1e9)
        self._young_ns = now - int(orphans_after_seconds * 1e9)
        self._deletes = deletes
        self._unknown_packages_go = unknown_packages_go
        self._orphans_go = orphans_go
        self._in_use = in_use
        self._on_forgotten = on_forgotten
        self._errors_in_a_row = dict.fromkeys(backends, 0)
        self._writer: CatalogWriter
        self._reader: CollectReader

    async def run(self) -> None:
        """Look, and delete. Cancelled, it leaves marks for the next one.

        Raises StateError. That a backend failed is in the tally.
        """
        with contextlib.ExitStack() as stack:
            self._reader = stack.enter_context(
                contextlib.closing(await trio.to_thread.run_sync(CollectReader, self._catalog_path))
            )
            self._writer = stack.enter_context(contextlib.closing(CatalogWriter(self._catalog_path)))
            if self._deletes and self._workspace.exists():
                # While it is open here, it can be attached read-only, whether a daemon runs or not.
                workspace = open_writer(self._workspace, schema.workspace_migrations)
                stack.callback(workspace.close)
                workspace.execute("SELECT count(*) FROM names").fetchone()
            if self._deletes:
                await clear_dead_puts(self._writer, self._backends, self._puts_dir)
                await self._resume()
            await self._purge_all()
            for backend_id in self._backends:
                await self._collect_from(backend_id)
            if self._deletes:
                await self._forget_bare()

    async def _resume(self) -> None:
        """Go on with what a collection that died had marked."""
        found = await trio.to_thread.run_sync(self._reader.deletions, set(self._backends))
        over = [doomed for doomed, begun_ns in found if is_over(self._backends[doomed.backend_id], begun_ns)]
        # An older catalog that was restored has its marks again: of blobs that were put anew since, for newer packages.
        newer = [
            backend_id
            for backend_id in {doomed.backend_id for doomed in over if doomed.digest.algorithm == PRIMARY_ALGORITHM}
            if not await self._knows_all_packages(backend_id)
        ]
        over = [one for one in over if one.backend_id not in newer or one.digest.algorithm == MANIFEST_ALGORITHM]
        self.tally.left_count += len(found) - len(over)
        for first in range(0, len(over), BATCH_OBJECTS):
            batch = over[first : first + BATCH_OBJECTS]
            await self._renew(batch)
            await self._delete(batch)

    async def _knows_all_packages(self, backend_id: str) -> bool:
        """Whether no manifest is there that the catalog does not know, or such packages are to go."""
        unknown: list[ObjectInfo] = []

        async def note(found: list[ObjectInfo]) -> None:
            unknown.extend(found)

        try:
            await each_stranger(self._reader, self._backends[backend_id], MANIFEST_ALGORITHM, note)
        except StorageError as exc:
            self.tally.backends[backend_id].stopped = str(exc)
            return False
        return self._unknown_packages_go or not unknown

    # packages

    async def _purge_all(self) -> None:
        for deleted in await trio.to_thread.run_sync(self._reader.deleted_packages, self._restorable_ns):
            self.tally.expired.append(deleted.package.ref)
            self.tally.expired_bytes += deleted.package.size_bytes
            if self._deletes and not await self._purge(deleted):
                self.tally.waiting.append(deleted.package.ref)

    async def _purge(self, deleted: DeletedPackage) -> bool:
        """The manifest first, everywhere: then nothing can bring the package back. False when that is not done yet."""
        deletion_id = deleted.package.package_id
        begin = partial(deleting.begin_purge, deletion_id=deletion_id, before_ns=self._restorable_ns)
        if not await transact(self._writer, begin):
            return True  # somebody restored it
        failpoint("gc.purging")
        mark = partial(collecting.mark_manifest, deletion_id=deletion_id, backend_ids=tuple(self._backends))
        marked = await transact(self._writer, mark)
        failpoint("gc.manifest_marked")
        await self._delete(marked)
        if await transact(self._writer, partial(deleting.manifest_backends, deletion_id=deletion_id)):
            return False
        failpoint("gc.manifest_gone")
        root = await trio.to_thread.run_sync(self._reader.entry, deleted.package.root_id)
        if root is not None:
            numbers = await trio.to_thread.run_sync(self._entry_ids, deleted.package.root_id)
            # The innermost first: what a kill leaves still hangs below the root.
            for end in range(len(numbers), 0, -ENTRIES_AT_ONCE):
                part = numbers[max(0, end - ENTRIES_AT_ONCE) : end]
                await transact(self._writer, partial(deleting.drop_entries, entry_ids=part))
                failpoint("gc.entries_gone")
        await transact(self._writer, lambda transaction: end_purge(transaction, deleted))
        failpoint("gc.purged")
        self.tally.purged_count += 1
        return True

    def _entry_ids(self, root_id: int) -> array[int]:
        """Of a whole tree, a directory before what is in it; 8 bytes each."""
        return array("q", [root_id, *(entry.entry_id for _, entry in self._reader.walk(root_id))])

    # blobs

    async def _collect_unneeded(self, backend_id: str) -> None:
        tally = self.tally.backends[backend_id]
        pages = self._reader.unneeded(backend_id)
        while (page := await trio.to_thread.run_sync(next, pages, None)) is not None:
            open_now = set(await trio.to_thread.run_sync(self._in_use)) if page else set()
            batch: list[Unneeded] = []
            for blob in page:
                if blob.stored_at_ns >= self._young_ns:
                    tally.young.add(blob.size_bytes)
                elif blob.digest in open_now:
                    tally.in_use.add(blob.size_bytes)
                else:
                    tally.unneeded.add(blob.size_bytes)
                    batch.append(blob)
            for first in range(0, len(batch) if self._deletes else 0, BATCH_OBJECTS):
                if tally.stopped:
                    return
                await self._delete(await self._mark_unneeded(backend_id, batch[first : first + BATCH_OBJECTS]))

    async def _mark_unneeded(self, backend_id: str, batch: Sequence[Unneeded]) -> list[Doomed]:
        is_there = self._workspace.exists()
        work = partial(
            collecting.mark_unneeded, backend_id=backend_id, batch=batch, before_ns=self._young_ns, is_staged=is_there
        )
        marked = await transact(self._writer, work, workspace=self._workspace if is_there else None)
        failpoint("gc.marked")
        return marked

    async def _forget_bare(self) -> None:
        """Blobs that are nowhere and that nothing needs: a backend that was retired left them."""
        after: int | None = 0
        while after is not None:
            after = await transact(self._writer, partial(collecting.forget_bare_blobs, after=after))

    # orphans

    async def _collect_from(self, backend_id: str) -> None:
        """All that may go of one backend: nothing while it has packages that the catalog does not know.

        The catalog is older than the backend then, and what it knows no need for may be needed by those.
        """
        tally, backend = self.tally.backends[backend_id], self._backends[backend_id]
        unknown: list[ObjectInfo] = []

        async def note(found: list[ObjectInfo]) -> None:
            unknown.extend(found)

        try:
            await each_stranger(self._reader, backend, MANIFEST_ALGORITHM, note)
            tally.unknown_packages = len(unknown)
            if unknown and not self._unknown_packages_go:
                tally.stopped = (
                    f"it has the manifests of {len(unknown)} packages that this catalog does not know, so nothing is "
                    "collected there: run `castore catalog rebuild`, or give --unknown-packages to have them deleted"
                )
                return
            await self._collect_unneeded(backend_id)
            if self._orphans_go and not tally.stopped:
                take = partial(self._take_orphans, backend_id)
                await take(unknown)
                await each_stranger(self._reader, backend, PRIMARY_ALGORITHM, take)
        except StorageError as exc:
            tally.stopped = str(exc)

    async def _take_orphans(self, backend_id: str, found: Sequence[ObjectInfo]) -> None:
        tally = self.tally.backends[backend_id]
        old: list[tuple[Digest, int]] = []
        for info in found:
            if info.modified_ns >= self._young_ns:
                tally.young.add(info.size_bytes)
            else:
                tally.orphans.add(info.size_bytes)
                old.append((info.digest, info.size_bytes))
        for first in range(0, len(old) if self._deletes else 0, BATCH_OBJECTS):
            if tally.stopped:
                return
            batch = old[first : first + BATCH_OBJECTS]
            marked = await transact(self._writer, partial(collecting.mark_orphans, backend_id=backend_id, batch=batch))
            failpoint("gc.orphans_marked")
            await self._delete(marked)

    # deleting

    async def _delete(self, marked: Sequence[Doomed]) -> None:
        """Delete marked objects, then their rows. What cannot be deleted now stays marked."""
        if not marked:
            return
        gone: list[Doomed] = []
        none: list[Doomed] = []
        queue = iter(marked)
        self._begun = time.monotonic()
        errors = FirstError()
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(min(WORKERS, len(marked))):
                    nursery.start_soon(errors.guard, nursery.cancel_scope, self._delete_some, queue, marked, gone, none)
            errors.check()
            failpoint("gc.deleted")
        finally:
            with trio.CancelScope(shield=True):
                await self._forget(gone, none)
        failpoint("gc.forgotten")

    async def _delete_some(
        self, queue: Iterable[Doomed], marked: Sequence[Doomed], gone: list[Doomed], none: list[Doomed]
    ) -> None:
        for doomed in queue:
            tally = self.tally.backends[doomed.backend_id]
            if tally.stopped:
                self.tally.left_count += 1
                continue
            if time.monotonic() - self._begun > SEND_SECONDS / 2:
                await self._renew(marked)
            backend = self._backends[doomed.backend_id]
            try:
                if doomed.is_orphan and not await self._is_old(backend, doomed):
                    none.append(doomed)
                    continue
                failpoint("gc.deleting")
                await backend.delete(doomed.digest)
            except StorageError as exc:
                self.tally.left_count += 1
                self._errors_in_a_row[doomed.backend_id] += 1
                if self._errors_in_a_row[doomed.backend_id] >= ERRORS_IN_A_ROW or not exc.temporary:
                    tally.stopped = str(exc)
                continue
            self._errors_in_a_row[doomed.backend_id] = 0
            tally.deleted.add(doomed.size_bytes)
            gone.append(doomed)

    async def _is_old(self, backend: StorageBackend, doomed: Doomed) -> bool:
        """Whether an orphan is still the one that was listed: somebody may have put it again before it was marked."""
        try:
            return (await backend.head(doomed.digest)).modified_ns < self._young_ns
        except ObjectMissing:
            return True

    async def _renew(self, marked: Sequence[Doomed]) -> None:
        self._begun = time.monotonic()
        await transact(self._writer, partial(collecting.renew_marks, marked=marked))

    async def _forget(self, gone: Sequence[Doomed], none: Sequence[Doomed]) -> None:
        def work(transaction: Transaction) -> list[BlobSummary]:
            for doomed in none:
                collecting.unmark(transaction, doomed)
            blobs = [record_gone(transaction, doomed) for doomed in gone]
            return [blob for blob in blobs if blob is not None]

        for blob in await transact(self._writer, work):
            await trio.to_thread.run_sync(self._on_forgotten, blob)


async def each_stranger(
    reader: CollectReader,
    backend: StorageBackend,
    algorithm: str,
    take: Callable[[list[ObjectInfo]], Awaitable[None]],
) -> None:
    """Give the objects of a backend that have neither location, intent nor deletion to `take`, some at a time.

    Raises StorageError.
    """
    page: list[ObjectInfo] = []

    async def look() -> None:
        digests = [info.digest for info in page]
        unknown = await trio.to_thread.run_sync(reader.strangers, backend.backend_id, digests)
        await take([info for info in page if info.digest in unknown])
        page.clear()

    async with backend.list(algorithm) as objects:
        async for info in objects:
            page.append(info)
            if len(page) == LISTED_AT_ONCE:
                await look()
    await look()
