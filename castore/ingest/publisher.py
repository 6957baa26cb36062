"""Publish: an ingest version becomes a package, whole or not at all. Waiting for puts, then one transaction.

Order, and what a crash leaves: the version is frozen; its manifest file is written; the workspace notes the publish;
the manifest's intents are committed and it is put in every backend of the route; one catalog transaction makes package,
entries and event (the moment of truth); the workspace forgets the version. Before that moment recovery deletes the
manifest, after it recovery finishes forgetting.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from castore.catalog import sharing, tagging
from castore.catalog.records import Kind
from castore.catalog.workspace import Publishing, WorkspaceStore
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import MANIFEST_ALGORITHM, BlobSummary, Digest
from castore.errors import (
    CastoreError,
    Frozen,
    InvalidName,
    NotFound,
    PackageExists,
    PublishBusy,
    StorageError,
    from_text,
)
from castore.failpoint import failpoint
from castore.ingest.draft import Draft, published_event, write_draft
from castore.ingest.files import StagedFiles
from castore.ingest.labels import LabelReader, Labels
from castore.ingest.staged_file import StagedFile
from castore.ingest.tree import IngestTree
from castore.ingest.uploader import Uploader
from castore.registry.locations import record_stored
from castore.registry.names import is_valid_version
from castore.registry.routing import Route
from castore.seldom import SeldomLog
from castore.storage.source import FileSource
from castore.storage.spi import StorageBackend

log = logging.getLogger(__name__)

UNFINISHED: Final = ("staged", "uploading", "receiving")
FORGET_BATCH: Final = 250
"""Nodes forgotten in one go after a publish: 9 ms of the loop. With 2000 it was 56 ms."""
MANIFEST_SECONDS: Final = 1.0
MANIFEST_BYTES_PER_S: Final = 4 << 20
"""What the manifest's put may take when all of `wait_seconds` went by before, and the time for its bytes beside that:
writing the manifest of some hundred thousand files takes longer than a rename waits for puts."""
UNDO_SECONDS: Final = 2.0
"""What removing the manifest of a failed publish may take, with the kernel's locks held; else the next try or start
does."""
POLL_SECONDS: Final = 0.25
"""How often progress is reported while waiting."""


@dataclass(frozen=True, slots=True)
class PublishProgress:
    """How much of a version is stored."""

    stored_files: int
    total_files: int
    stored_bytes: int
    total_bytes: int


Report = Callable[[PublishProgress], Awaitable[None]]


async def _silent(_: PublishProgress) -> None:
    return


class Publisher:
    """Publishes versions of one ingest tree."""

    def __init__(
        self,
        store: WorkspaceStore,
        *,
        tree: IngestTree,
        files: StagedFiles,
        uploader: Uploader,
        labels: LabelReader,
        writer: CatalogWriter,
        backends: Mapping[str, StorageBackend],
        manifests: Path,
        owner: str,
        keep_owner: bool,
        on_published: Callable[[list[int]], Awaitable[None]],
    ) -> None:
        self._store = store
        self._tree = tree
        self._files = files
        self._uploader = uploader
        self._labels = labels
        self._writer = writer
        self._backends = backends
        self._manifests = manifests
        self._owner = owner
        self._keep_owner = keep_owner
        self._on_published = on_published
        self._complaints = SeldomLog(log)

    # waiting

    def progress(self, version_inode: int) -> PublishProgress:
        """How much of a version is stored now."""
        counts = self._store.state_counts(version_inode)
        stored = [count for count in counts if count.state == "stored"]
        return PublishProgress(
            sum(count.file_count for count in stored),
            sum(count.file_count for count in counts),
            sum(count.size_bytes for count in stored),
            sum(count.size_bytes for count in counts),
        )

    async def wait_stored(self, version_inode: int, *, report: Report = _silent) -> None:
        """Until every closed file of a version is stored; files open for writing are not waited for.

        Failed files are tried once more. Raises the error of the first that fails again, NotFound when the
        version goes away, DeadlineExceeded never: the caller bounds it.
        """
        self._uploader.retry_now(version_inode)
        tell = self._teller(version_inode, report)
        while self._tree.find(version_inode) is not None:
            try:
                self._check_failed(version_inode)
            except CastoreError as exc:
                self._store.update_node(version_inode, error=str(exc))
                raise
            if not self._unfinished(version_inode):
                return
            await tell()
            await self._next_change()
        raise NotFound("the version is gone from ingest/")

    def _unfinished(self, version_inode: int) -> bool:
        if self._store.any_in_state(version_inode, "staged", "uploading") is not None:
            return True
        # A receiving file that nobody writes is being hashed, or waits for that.
        receiving = self._store.count_in_state(version_inode, "receiving")
        return receiving > sum(file.is_dirty for file in self._writers(version_inode))

    def _check_failed(self, version_inode: int) -> None:
        failed = self._store.any_in_state(version_inode, "failed")
        if failed is not None:
            raise from_text(failed[1])

    async def _next_change(self) -> None:
        with trio.move_on_after(POLL_SECONDS):
            await self._uploader.progress.wait()

    def _teller(self, version_inode: int, report: Report) -> Callable[[], Awaitable[None]]:
        """Reports how much is stored whenever it is called, once in POLL_SECONDS at most.

        To count takes the loop 60 ms for 100,000 files, and whoever waits is woken by every file of the mount.
        """
        due = 0.0

        async def tell() -> None:
            nonlocal due
            if report is not _silent and trio.current_time() >= due:
                await report(self.progress(version_inode))
                due = trio.current_time() + POLL_SECONDS

        return tell

    async def _wait_publishable(self, version_inode: int, report: Report) -> None:
        self._uploader.retry_now(version_inode)
        tell = self._teller(version_inode, report)
        while True:
            if self._tree.find(version_inode) is None:
                raise NotFound("the version is gone from ingest/")
            self._check_writers(version_inode)
            try:
                self._check_failed(version_inode)
            except CastoreError as exc:
                if exc.temporary:
                    raise PublishBusy(self._busy_reason(version_inode, exc)) from exc
                raise
            if self._store.any_in_state(version_inode, *UNFINISHED) is None and not self._writers(version_inode):
                return
            await tell()
            with trio.move_on_after(POLL_SECONDS):
                async with trio.open_nursery() as nursery:
                    for signal in (self._uploader.progress, self._files.released):
                        nursery.start_soon(_wait_then_cancel, signal.wait, nursery.cancel_scope)

    def _writers(self, version_inode: int) -> list[StagedFile]:
        """The files of a version that are open for writing and still have a name."""
        return [
            file
            for file in self._files.open_in(version_inode)
            if file.writers and (node := self._store.node(file.inode)) is not None and node.nlink
        ]

    def _check_writers(self, version_inode: int) -> None:
        """A file that is open for writing and was not closed since its last change makes publish busy at once."""
        if any(file.is_dirty and not file.is_flushed for file in self._writers(version_inode)):
            raise PublishBusy("a file is open for writing")

    # publishing

    async def publish(
        self,
        version_inode: int,
        name: str,
        version: bytes,
        *,
        wait_seconds: float,
        report: Report = _silent,
        shares_inodes: bool = False,
    ) -> None:
        """Publish an ingest version as NAME/VERSION; returns when G1 holds.

        With `shares_inodes`, files may have other inode numbers than in ingest/: see `castore.catalog.sharing`.

        Raises PackageExists, PublishBusy (open for writing; or not stored within `wait_seconds`; or being published by
        someone else), InvalidName (another NAME), NameTooLong, SumsMismatch, StorageError, StateError. On every error
        the ingest tree is as before, and the reason is the version's error.
        """
        self._store.update_node(version_inode, error="")
        try:
            if not is_valid_version(version):
                raise InvalidName(f"not a package VERSION: {version!r}")
            with self._files.room.leaving(version_inode):
                await self._publish(version_inode, name, version.decode(), wait_seconds, report, shares_inodes)
        except CastoreError as exc:
            self._store.update_node(version_inode, error=str(exc))
            raise

    async def _publish(
        self, version_inode: int, name: str, version: str, wait_seconds: float, report: Report, shares_inodes: bool
    ) -> None:
        deadline = trio.current_time() + wait_seconds
        await self.check_absent(name, version)
        place = self._place(version_inode)
        if place[0] != name:
            raise InvalidName(f"a version of another package cannot be published as {name}/{version}")
        with trio.move_on_at(deadline) as waiting:
            try:
                await self._wait_publishable(version_inode, report)
            except NotFound:
                # Perhaps someone else published it meanwhile: then that is the answer.
                await self.check_absent(name, version)
                raise
        if waiting.cancelled_caught:
            raise PublishBusy(self._busy_reason(version_inode))
        labels = await self._labels.labels(version_inode)
        route = await self._uploader.route(version_inode)
        async with self._frozen(version_inode, place):
            draft = self._draft(version_inode, name, version, labels, route, shares_inodes)
            await self._undo_earlier(draft)
            try:
                manifest = await self._put_manifest(draft, deadline)
                failpoint("publish.put")
                await self._commit(draft, manifest)
                failpoint("publish.committed")
            except BaseException:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + UNDO_SECONDS) as undoing:
                    await self._undo(draft)
                if undoing.cancelled_caught:
                    what = f"the manifest of unpublished {name}/{version} may stay until the next try or start"
                    self._complaints.warning("manifest may stay", what)
                raise
            self._tree.hand_over(version_inode)
        try:
            with trio.CancelScope(shield=True):
                await self.forget(version_inode, manifest.digest.raw)
        except (CastoreError, OSError) as exc:
            # It is published all the same, and seen as such: what remains in staging goes at the next start.
            log.error("%s/%s is published, but its staging is not cleared: %s", name, version, exc)

    async def check_absent(self, name: str, version: str) -> None:
        """Raise PackageExists when that version is published, or a tag has its name."""
        await self._writer.run(lambda transaction: _check_absent(transaction, name, version))

    def _place(self, version_inode: int) -> tuple[str, str]:
        """(NAME, VERSION) in ingest/. Raises NotFound also when the directory is no version any more."""
        if not self._tree.get(version_inode).is_version:
            raise NotFound("the version was moved into another one")
        return self._tree.version_path(version_inode)

    def _busy_reason(self, version_inode: int, error: CastoreError | None = None) -> str:
        """What a version waits for, and the `error` that holds it up where there is one."""
        now = self.progress(version_inode)
        if now.stored_files == now.total_files:
            return "a file is open for writing"
        files, size = now.total_files - now.stored_files, now.total_bytes - now.stored_bytes
        why = f": {error}" if error else ""
        return f"{files} of {now.total_files} files ({size} bytes) are not stored yet{why}; try again"

    @asynccontextmanager
    async def _frozen(self, version_inode: int, place: tuple[str, str]) -> AsyncIterator[None]:
        # No checkpoint between this look and the freeze. A command's publish holds no lock of the kernel: its version
        # may have been renamed while it waited.
        if self._place(version_inode) != place:
            raise NotFound(f"ingest/{'/'.join(place)} was renamed while it was about to be published")
        if self._store.any_in_state(version_inode, *UNFINISHED, "failed") or self._writers(version_inode):
            raise PublishBusy("files changed while the package was about to be published; try again")
        root = self._tree.get(version_inode)
        try:
            self._tree.check_writable(root)
        except Frozen as exc:
            raise PublishBusy("the package is being published by someone else") from exc
        self._tree.freeze(version_inode)
        failpoint("publish.frozen")
        try:
            yield
        finally:
            self._tree.thaw(version_inode)

    def _draft(
        self, version_inode: int, name: str, version: str, labels: Labels, route: Route, shares_inodes: bool
    ) -> Draft:
        self._store.settle_cookies(version_inode)
        root = self._tree.get(version_inode)
        return Draft(
            name=name,
            version=version,
            name_node=self._tree.get(self._tree.parent(version_inode)),
            root=root,
            owner=None if self._keep_owner else (root.uid, root.gid),
            labels=labels,
            backend_ids=route.backend_ids,
            published_at_ns=time.time_ns(),
            shares_inodes=shares_inodes,
        )

    async def _put_manifest(self, draft: Draft, deadline: float) -> BlobSummary:
        path = self._manifests / f"{draft.root.inode:x}"
        try:
            summary = await trio.to_thread.run_sync(write_draft, path, draft, self._store.path, self._files.path)
            failpoint("publish.drafted")
            self._store.begin_publishing(Publishing(draft.root.inode, draft.name, draft.version, summary.digest.raw))
            failpoint("publish.noted")
            # The note must not be lost by a power cut that keeps the manifest.
            await self._files.sync_names()
            pairs = [(summary.digest, backend_id) for backend_id in draft.backend_ids]
            await self._writer.run(lambda transaction: transaction.add_intents(pairs, owner=self._owner))
            failpoint("publish.intended")
            slow, seconds = "", MANIFEST_SECONDS + summary.size_bytes / MANIFEST_BYTES_PER_S
            with trio.move_on_at(max(deadline, trio.current_time() + seconds)):
                for slow in draft.backend_ids:
                    await self._backends[slow].put(summary.digest, FileSource(path, summary))
                return summary
            raise PublishBusy(f"the package's manifest was not stored in backend {slow} in time; try again")
        except StorageError as exc:
            if exc.temporary:
                raise PublishBusy(f"the package's manifest is not stored: {exc}; try again") from exc
            raise
        finally:
            path.unlink(missing_ok=True)

    async def _commit(self, draft: Draft, manifest: BlobSummary) -> None:
        names = self._store.names(draft.name)
        if names is None:
            raise PublishBusy(f"ingest/{draft.name} was renamed or removed meanwhile; try again")
        inode, latest_inode = names

        def work(transaction: Transaction) -> int:
            _check_absent(transaction, draft.name, draft.version)
            for backend_id in draft.backend_ids:
                lost = transaction.unstored_file(draft.root.inode, backend_id)
                if lost:
                    return lost
            record_stored(transaction, [(manifest, backend_id) for backend_id in draft.backend_ids])
            parent_id = transaction.add_package_name(
                draft.name,
                inode=inode,
                latest_inode=latest_inode,
                uid=draft.name_node.uid,
                gid=draft.name_node.gid,
                mode=draft.name_node.mode & 0o777,
                now_ns=draft.published_at_ns,
                version=draft.version,
            )
            file_count, size_bytes = transaction.version_totals(draft.root.inode)
            transaction.strengthen_checksums(draft.root.inode)
            shared = sharing.equal_files(transaction, draft.root.inode, draft.owner) if draft.shares_inodes else []
            transaction.copy_entries(
                draft.root.inode,
                parent_id=parent_id,
                name=draft.version,
                now_ns=draft.published_at_ns,
                owner=draft.owner,
            )
            sharing.share_inodes(transaction, shared)
            transaction.add_package(
                name=draft.name,
                version=draft.version,
                root_id=draft.root.inode,
                producer=draft.labels.producer,
                retention_class=draft.labels.retention_class,
                publisher_uid=draft.labels.uid,
                published_at_ns=draft.published_at_ns,
                file_count=file_count,
                size_bytes=size_bytes,
                manifest=manifest,
                backend_ids=draft.backend_ids,
            )
            transaction.add_event(published_event(draft, manifest.digest, file_count, size_bytes))
            return 0

        if await self._writer.run(work, workspace=self._store.path):
            # A location went bad or was deleted since: the bytes are still staged, put them again.
            self._store.restage(version_inode=draft.root.inode, state="stored")
            self._uploader.wake()
            raise PublishBusy("a stored file has to be stored again; try again")

    # afterwards

    async def forget(self, version_inode: int, manifest: bytes) -> None:
        """The version is in the catalog: drop its rows and staged bytes. Also what recovery does."""
        self._tree.hand_over(version_inode)
        link = self._store.parent_of(version_inode)
        if link is not None:
            with self._store.transaction():
                self._store.delete_link(*link)
                self._store.touch(link[0], time.time_ns())
            failpoint("publish.unlinked")
        while nodes := self._store.remove_version(version_inode, FORGET_BATCH):
            self._files.publish((node, summary) for node, summary in nodes if node.kind is Kind.FILE)
            await self._on_published([node.inode for node, _ in nodes])
            await trio.lowlevel.checkpoint()
        self._store.end_publishing(version_inode, manifest)
        failpoint("publish.forgotten")
        self._tree.forget(version_inode)

    async def _undo_earlier(self, draft: Draft) -> None:
        """Before a version leaves one more manifest, those of its tries that failed go: it has one at most that is to
        be removed. Raises PublishBusy while a backend that has one is away; one that refuses for good keeps nobody.
        """
        with trio.move_on_after(UNDO_SECONDS):
            error = await self._undo(draft)
            if error is None or not error.temporary:
                return
            raise PublishBusy(f"the manifest of an earlier try is not removed: {error}; try again") from error
        raise PublishBusy("the manifest of an earlier try was not removed in time; try again")

    async def _undo(self, draft: Draft) -> StorageError | None:
        error = None
        for note in self._store.publishings():
            if note.version_inode == draft.root.inode:
                error = await self.undo(note, draft.backend_ids) or error
        return error

    async def undo(self, publishing: Publishing, backend_ids: tuple[str, ...]) -> StorageError | None:
        """A publish did not come to its transaction: its manifest must not be found by a rebuild.

        When a backend cannot delete now, that is returned; the note stays, and the next try or start has it removed.
        """
        digest = Digest(MANIFEST_ALGORITHM, publishing.manifest)
        errors: list[StorageError] = []

        async def remove(backend_id: str) -> None:
            try:
                await self._backends[backend_id].abandon(digest)
                await self._backends[backend_id].delete(digest)
            except StorageError as exc:
                errors.append(exc)

        # One that does not answer keeps it from no other.
        async with trio.open_nursery() as nursery:
            for backend_id in backend_ids:
                nursery.start_soon(remove, backend_id)
        if errors:
            what = f"the manifest of unpublished {publishing.name}/{publishing.version} stays: {errors[0]}"
            self._complaints.warning("manifest stays", what)
            return errors[0]
        pairs = [(digest, backend_id) for backend_id in backend_ids]
        await self._writer.run(lambda transaction: transaction.drop_intents(pairs))
        self._store.end_publishing(publishing.version_inode, publishing.manifest)
        return None


def _check_absent(transaction: Transaction, name: str, version: str) -> None:
    if transaction.package_exists(name, version):
        raise PackageExists(f"{name}/{version} is published already")
    if tagging.tag(transaction, name, version) is not None:
        raise PackageExists(f"{version} is a tag of {name}, so no version can have that name")


async def _wait_then_cancel(wait: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()
