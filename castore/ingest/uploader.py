"""Puts staged files in the background. What is worth putting where is decided by the registry's routes.

One way through: pick a batch of staged files -> one transaction that finds what is stored already and commits intents
for the rest -> puts, several at a time -> one transaction of locations for what was acknowledged meanwhile -> the files
are `stored`. A batch is whatever is ready, so a single file is quick and many files share their commits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from castore import errors
from castore.catalog.reader import CatalogReader
from castore.catalog.workspace import WorkspaceStore
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import BlobSummary, Digest
from castore.errors import (
    CastoreError,
    ConfigError,
    DeletionUnderWay,
    NotFound,
    SourceChanged,
    StateError,
    StorageError,
    to_text,
)
from castore.failpoint import failpoint
from castore.ingest.files import StagedFiles
from castore.ingest.labels import LabelReader
from castore.ingest.leftovers import Leftovers
from castore.ingest.pulse import Signal
from castore.ingest.rate import RateWindow
from castore.registry.deletion import take_over
from castore.registry.locations import record_stored
from castore.registry.routing import Route, Router
from castore.seldom import SeldomLog
from castore.storage.source import FileSource
from castore.storage.spi import StorageBackend

log = logging.getLogger(__name__)

BATCH_FILES: Final = 64
"""Files that share one transaction of intents: a commit costs about as much as one small put."""
LINGER_SECONDS: Final = 0.01
LINGER_SECONDS_MAX: Final = 0.05
"""How long a staged file waits for others to share a commit with, and how long while they come one after the other: far
below what a person notices."""
IN_FLIGHT_FILES: Final = 256
"""Files picked and not yet stored or failed; bounds what the uploader remembers."""
WORKERS: Final = 8
"""Puts at a time: on the local backend more than 8 gain nothing, on a remote one 8 hide its latency."""
DELETION_SECONDS: Final = 10.0
"""How long a put waits for the end of a deletion of the same object, which takes as long as some deletes; then it fails
for now, as other puts do, and is tried again. Others may need its worker."""
DELETION_POLL_SECONDS: Final = 0.05
RETRY_SECONDS_MIN: Final = 1.0
RETRY_SECONDS_MAX: Final = 60.0
"""Files that failed for now are tried again after this long, doubling from the first to the last. What failed for good
is tried again when someone asks: by a publish, a sync of the version, or a new start."""
TEMPORARY_NAMES: Final = tuple(name for name, kind in vars(errors).items() if getattr(kind, "temporary", False) is True)
"""The classes whose errors pass, as `to_text` writes them."""


@dataclass(slots=True, eq=False)
class _Upload:
    """One blob on its way: the files that wait for it, and the backends that have not acknowledged it yet."""

    summary: BlobSummary
    inodes: list[int]
    missing: set[str]
    stored: list[str] = field(default_factory=list)
    error: CastoreError | None = None
    changes: int = 0
    """The first file's count of changes when it was picked."""
    followers: list[int] = field(default_factory=list)
    """Files with the same bytes that belong in another backend: looked at again when this upload is over."""
    puts: set[trio.CancelScope] = field(default_factory=set)
    """Those under way."""
    is_wanted: bool = True
    """Whether any file waits for it, as far as is known."""
    deleting: set[str] = field(default_factory=set)
    """The backends where the object was being deleted when the intents were committed, so that there is none."""


@dataclass(frozen=True, slots=True)
class _Result:
    """How a put ended. Its intent goes when it `is_over`: when nothing unfinished of it is left in the backend."""

    upload: _Upload
    backend_id: str
    error: CastoreError | None
    is_over: bool


class Uploader:
    """The background puts of one daemon."""

    def __init__(
        self,
        store: WorkspaceStore,
        *,
        catalog: CatalogReader,
        writer: CatalogWriter,
        backends: Mapping[str, StorageBackend],
        router: Router,
        labels: LabelReader,
        files: StagedFiles,
        leftovers: Leftovers,
        owner: str,
        gc_lock: Path,
    ) -> None:
        self._gc_lock = gc_lock
        self._store = store
        self._catalog = catalog
        self._writer = writer
        self._backends = backends
        self._router = router
        self._labels = labels
        self._files = files
        self._leftovers = leftovers
        self._owner = owner
        self._wake = trio.Event()
        self._woken = 0
        """How often since the last files were picked."""
        self._uploads: dict[Digest, _Upload] = {}
        self._file_count = 0
        self._puts, self._put_queue = trio.open_memory_channel[tuple[_Upload, str]](0)
        self._results, self._result_queue = trio.open_memory_channel[_Result](IN_FLIGHT_FILES)
        self._complaints = SeldomLog(log)
        self._retry_seconds = 0.0
        self._failing = trio.Event()
        self._broken_off: dict[tuple[Digest, str], list[int]] = {}
        """Puts that failed and may have left something in a backend, and the files that they were for: the next try
        goes on from it, or it is removed. As many as there are `failed` files at most."""
        self.rate = RateWindow()
        self.progress = Signal()
        """Pulsed whenever files became stored or failed."""

    def wake(self) -> None:
        """There are staged files."""
        self._woken += 1
        self._wake.set()

    def retry_now(self, version_inode: int) -> None:
        """Put the failed files of a version again at once: someone waits for them."""
        if self._store.restage(version_inode=version_inode):
            self.wake()

    async def run(self) -> None:
        """Work until cancelled. What is in flight then is put again by the next daemon."""
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._put_worker)
            nursery.start_soon(self._commit_results)
            nursery.start_soon(self._retry_failed)
            while True:
                await self._dispatch_batch()

    # pick

    async def _dispatch_batch(self) -> None:
        while self._file_count >= IN_FLIGHT_FILES:
            await self.progress.wait()
        await self._linger()
        self._wake = trio.Event()
        self._woken = 0
        try:
            with self._store.transaction():
                picked = self._store.take_staged(min(BATCH_FILES, IN_FLIGHT_FILES - self._file_count))
        except StateError as exc:
            log.warning("staged files are not put yet: %s", exc)
            await trio.sleep(RETRY_SECONDS_MIN)
            return
        if not picked:
            await self._wake.wait()
            return
        failpoint("put.picked")
        uploads: list[_Upload] = []
        routes: dict[int, Route] = {}
        good: dict[Digest, set[str]] | None = None
        for inode, version_inode, summary in picked:
            while True:
                try:
                    if good is None:
                        good = self._catalog.good_backends_of({summary.digest for _, _, summary in picked})
                    await self._pick(inode, version_inode, summary, uploads, routes, good.get(summary.digest, set()))
                    break
                except StateError as exc:  # with nothing changed
                    self._complaints.warning("not picked", f"a staged file is not put yet: {exc}")
                    await trio.sleep(RETRY_SECONDS_MIN)
        try:
            # What is stored already needs no transaction of its own: publish looks again, in its own.
            if any(upload.missing for upload in uploads):
                await self._writer.run(lambda transaction: self._begin(transaction, uploads))
                failpoint("put.intended")
        except StateError as exc:
            for upload in uploads:
                upload.error = exc
        settled = [upload for upload in uploads if upload.error is not None or not upload.missing]
        await self._settle(settled)
        for upload in uploads:
            if upload not in settled:
                for backend_id in sorted(upload.missing):
                    await self._puts.send((upload, backend_id))

    async def _linger(self) -> None:
        """Files that come one after another share commits: the first of them waits for the next, while they come."""
        with trio.move_on_after(LINGER_SECONDS_MAX):
            seen = -1
            while seen < self._woken < BATCH_FILES:
                seen = self._woken
                await trio.sleep(LINGER_SECONDS)

    async def _pick(
        self,
        inode: int,
        version_inode: int,
        summary: BlobSummary,
        uploads: list[_Upload],
        routes: dict[int, Route],
        good: set[str],
    ) -> None:
        """`uploads` and `routes` are those of the batch so far; `good` are the backends that have these bytes."""
        try:
            route = routes.get(version_inode) or await self.route(version_inode)
            routes[version_inode] = route
        except NotFound:
            # Its version is gone; the file is not, if it was moved to another one since it was picked.
            node = self._store.node(inode)
            if node is not None and node.version_inode != version_inode:
                self._store.move_state(inode, summary.digest, state="staged")
                self.wake()
            return
        except ConfigError as exc:
            self._store.move_state(inode, summary.digest, state="failed", error=to_text(exc))
            self.progress.pulse()
            return
        running = self._uploads.get(summary.digest)
        wanted = set(route.backend_ids)
        if running is not None:
            if wanted <= running.missing | set(running.stored):
                self._file_count += 1
                running.inodes.append(inode)
            else:
                running.followers.append(inode)
            return
        stored = good & wanted
        upload = _Upload(summary, [inode], wanted - stored, list(stored), changes=self._files.watch(inode))
        self._file_count += 1
        self._uploads[summary.digest] = upload
        uploads.append(upload)

    async def route(self, version_inode: int) -> Route:
        """Where the files of a version go. Raises NotFound, ConfigError."""
        labels = await self._labels.labels(version_inode)
        return self._router.route(labels.retention_class, labels.producer)

    def _begin(self, transaction: Transaction, uploads: list[_Upload]) -> None:
        for upload in uploads:
            good = transaction.good_backends(upload.summary.digest) & upload.missing
            upload.stored.extend(good)
            upload.missing -= good
        pairs = [(upload.summary.digest, backend_id) for upload in uploads for backend_id in upload.missing]
        deleting = transaction.being_deleted(pairs)
        for upload in uploads:
            upload.deleting = {backend_id for digest, backend_id in deleting if digest == upload.summary.digest}
        transaction.add_intents((pair for pair in pairs if pair not in deleting), owner=self._owner)

    # put

    def lose(self, inode: int) -> None:
        """The bytes that a file was staged with changed, or went. A put that no other file waits for ends."""
        for digest, upload in self._uploads.items():
            if inode in upload.inodes and not any(self._waits(each, digest) for each in upload.inodes):
                upload.is_wanted = False
                for put in upload.puts:
                    put.cancel()

    def _waits(self, inode: int, digest: Digest) -> bool:
        node = self._store.node(inode)
        summary = self._store.summary(inode) if node is not None and node.nlink else None
        return summary is not None and summary.digest == digest

    async def _put_worker(self) -> None:
        while True:
            upload, backend_id = await self._put_queue.receive()
            error = await self._put(upload, backend_id)
            # What failed for now is tried again, and goes on from what it left.
            is_over = error is None or (
                not (error.temporary and upload.is_wanted)
                and await self._leftovers.remove(upload.summary.digest, backend_id)
            )
            await self._results.send(_Result(upload, backend_id, error, is_over))

    async def _put(self, upload: _Upload, backend_id: str) -> CastoreError | None:
        if upload.is_wanted:
            with trio.CancelScope() as scope:
                upload.puts.add(scope)
                try:
                    if backend_id in upload.deleting:
                        await self._wait_deleted(upload.summary.digest, backend_id)
                    source = FileSource(self._files.path(upload.inodes[0]), upload.summary)
                    await self._backends[backend_id].put(upload.summary.digest, source)
                except (StorageError, StateError) as exc:
                    return exc
                finally:
                    upload.puts.discard(scope)
                if not self._files.changed_since(upload.inodes[0], upload.changes):
                    failpoint("put.stored")
                    return None
        # Also when all was put: the source checks what it reads against short checksums, which can be forged.
        return SourceChanged("the file was changed or removed while it was put")

    async def _wait_deleted(self, digest: Digest, backend_id: str) -> None:
        """Until garbage collection has deleted the object, or died; then there is an intent.

        Raises DeletionUnderWay when that takes long, and StateError.
        """
        end = trio.current_time() + DELETION_SECONDS
        while True:
            try:
                return await self._writer.run(
                    lambda transaction: transaction.add_intents([(digest, backend_id)], owner=self._owner)
                )
            except DeletionUnderWay:
                if trio.current_time() > end:
                    raise
            backend = self._backends[backend_id]
            if await take_over(self._writer, backend, digest, self._gc_lock, owner=self._owner):
                return
            await trio.sleep(DELETION_POLL_SECONDS)

    # commit

    async def _commit_results(self) -> None:
        while True:
            results = [await self._result_queue.receive()]
            while len(results) < IN_FLIGHT_FILES:
                try:
                    results.append(self._result_queue.receive_nowait())
                except trio.WouldBlock:
                    break
            commit_error: CastoreError | None = None
            try:
                await self._writer.run(_location_work(results))
                failpoint("put.located")
            except StateError as exc:
                commit_error = exc
            for result in results:
                upload = result.upload
                put = (upload.summary.digest, result.backend_id)
                if result.is_over:
                    self._broken_off.pop(put, None)
                else:
                    self._broken_off[put] = upload.inodes
                    self._failing.set()
                upload.missing.discard(result.backend_id)
                upload.stored.append(result.backend_id)
                upload.error = result.error or commit_error or upload.error
            await self._settle(list({result.upload: None for result in results if not result.upload.missing}))
            self.progress.pulse()

    async def _settle(self, uploads: list[_Upload]) -> None:
        """All backends answered: the files are stored, or failed with the reason."""
        if not uploads:
            return
        while True:
            try:
                with self._store.transaction():
                    failed = [self._note(upload) for upload in uploads]
                break
            except StateError as exc:
                log.warning("what was put is not noted yet: %s", exc)
                await trio.sleep(RETRY_SECONDS_MIN)
        failpoint("put.settled")
        # No checkpoint since the notes: nobody joined these uploads after them.
        for upload, is_failed in zip(uploads, failed, strict=True):
            digest = upload.summary.digest
            del self._uploads[digest]
            self._files.unwatch(upload.inodes[0])
            self._file_count -= len(upload.inodes)
            if upload.error is None:
                self._retry_seconds = 0.0
                self.rate.add(len(upload.inodes), len(upload.inodes) * upload.summary.size_bytes)
            elif is_failed:
                self._complaints.warning(type(upload.error).__name__, f"put of {digest} failed: {upload.error}")
                if upload.error.temporary:
                    self._back_off()
        self.progress.pulse()

    def _note(self, upload: _Upload) -> bool:
        """Bring the states of an upload's files into the workspace; whether some file failed by it."""
        digest, error = upload.summary.digest, upload.error
        failed = False
        again = list(upload.followers)
        for number, inode in enumerate(upload.inodes):
            if error is None:
                self._store.move_state(inode, digest, state="stored")
            elif isinstance(error, SourceChanged) and (
                number or self._files.changed_since(upload.inodes[0], upload.changes)
            ):
                # Not the fault of other files with these bytes; nor of the first, if a user wrote to it.
                again.append(inode)
            else:
                # A file that changed or went meanwhile does not match: nobody is interested in that put any more.
                failed |= self._store.move_state(inode, digest, state="failed", error=to_text(error))
        for inode in again:
            self._store.move_state(inode, digest, state="staged")
            self.wake()
        return failed

    async def _retry_failed(self) -> None:
        while True:
            await self._failing.wait()
            await trio.sleep(self._retry_seconds or RETRY_SECONDS_MIN)
            self._failing = trio.Event()
            try:
                if self._store.restage_temporary(TEMPORARY_NAMES):
                    self.wake()
                await self._forget_unwanted()
            except StateError as exc:
                log.warning("failed puts are not tried again yet: %s", exc)
                self._failing.set()

    async def _forget_unwanted(self) -> None:
        """Remove what broken-off puts left whose files were discarded or changed before the next try."""
        away: set[str] = set()
        for put, inodes in list(self._broken_off.items()):
            digest, backend_id = put
            if backend_id in away or digest in self._uploads or any(self._waits(each, digest) for each in inodes):
                continue
            is_removed = await self._leftovers.remove(digest, backend_id)
            if digest in self._uploads:
                continue
            if is_removed:
                # A put that begins from now on notes its intent after this, in the one thread that writes.
                self._broken_off.pop(put, None)
                await self._drop_intent(put)
            else:
                away.add(backend_id)
        if away:
            self._back_off()

    async def _drop_intent(self, put: tuple[Digest, str]) -> None:
        await self._writer.run(lambda transaction: transaction.drop_intents([put]))

    def _back_off(self) -> None:
        self._retry_seconds = min(max(RETRY_SECONDS_MIN, self._retry_seconds * 2), RETRY_SECONDS_MAX)
        self._failing.set()


def _location_work(results: list[_Result]) -> Callable[[Transaction], None]:
    stored = [(result.upload.summary, result.backend_id) for result in results if result.error is None]
    failed = [(each.upload.summary.digest, each.backend_id) for each in results if each.error and each.is_over]

    def work(transaction: Transaction) -> None:
        record_stored(transaction, stored)
        transaction.drop_intents(failed)

    return work
