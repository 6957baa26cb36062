"""One writing daemon's ingest, put together: workspace, files, uploader, publisher. It decides nothing itself."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import trio

from castore.blobs.disk_cache import DiskCache
from castore.catalog.connection import create_workspace
from castore.catalog.reader import CatalogReader
from castore.catalog.workspace import Publishing, WorkspaceStore
from castore.catalog.writer import CatalogWriter
from castore.config import Config
from castore.errors import StateError
from castore.ingest.expiry import ExpiryWatch
from castore.ingest.files import StagedFiles
from castore.ingest.hashing import HashQueue
from castore.ingest.inode_numbers import InodeNumbers
from castore.ingest.labels import LabelReader
from castore.ingest.leftovers import Leftovers
from castore.ingest.publisher import Publisher
from castore.ingest.recovery import recover_bytes, recover_names
from castore.ingest.spare_files import SpareFiles
from castore.ingest.tree import IngestTree
from castore.ingest.uploader import Uploader
from castore.registry.routing import Router
from castore.storage.spi import StorageBackend

log = logging.getLogger(__name__)

REFILL_RETRY_SECONDS: Final = 1.0
"""Half a lease is left when refilling begins: there is time."""


class Ingest:
    """The ingest side of a daemon that holds the state directory's lock."""

    def __init__(
        self,
        config: Config,
        *,
        catalog: CatalogReader,
        writer: CatalogWriter,
        backends: Mapping[str, StorageBackend],
        on_published: Callable[[list[int]], Awaitable[None]],
        cache: DiskCache | None = None,
    ) -> None:
        staging = config.store.state_dir / "staging"
        self._manifests = staging / "manifests"
        for folder in (staging, staging / "data", staging / "spare", self._manifests):
            folder.mkdir(mode=0o700, exist_ok=True)
        workspace = staging / "workspace.db"
        create_workspace(workspace)
        self.store = WorkspaceStore(workspace)
        self._owner = str(uuid.uuid4())
        self._unfinished_publishes: list[Publishing] = []
        self._writer = writer
        self._hashes = HashQueue()
        self._block_digest = config.block_digest
        self._spares = SpareFiles(staging / "spare")
        self._router = Router(config.routing, frozenset(backends), source=config.source)
        self._numbers = InodeNumbers(writer)
        self.labels = LabelReader(self.store, default_retention_class=config.ingest.default_retention_class)
        self.files = StagedFiles(
            self.store,
            staging / "data",
            hashes=self._hashes,
            max_bytes=config.ingest.staging_max_bytes,
            max_bytes_per_user=config.ingest.max_bytes_per_user,
            block_digest=config.block_digest,
            on_staged=lambda: self.uploader.wake(),
            on_lost=lambda inode: self.uploader.lose(inode),
            cache=cache,
            spares=self._spares,
        )
        self.tree = IngestTree(
            self.store,
            catalog=catalog,
            numbers=self._numbers,
            files=self.files,
            on_routing_change=lambda _: self.uploader.wake(),
        )
        self.leftovers = Leftovers(
            self.store,
            writer=writer,
            backends=backends,
            route=lambda version_inode: self.uploader.route(version_inode),
            owner=self._owner,
            puts_dir=config.store.puts_dir,
        )
        self.uploader = Uploader(
            self.store,
            catalog=catalog,
            writer=writer,
            backends=backends,
            router=self._router,
            labels=self.labels,
            files=self.files,
            leftovers=self.leftovers,
            owner=self._owner,
            gc_lock=config.store.gc_lock_path,
        )
        self.expiry = ExpiryWatch(self.store, files=self.files, after_seconds=config.ingest.expire_after_seconds)
        self.publisher = Publisher(
            self.store,
            tree=self.tree,
            files=self.files,
            uploader=self.uploader,
            labels=self.labels,
            writer=writer,
            backends=backends,
            manifests=self._manifests,
            owner=self._owner,
            keep_owner=config.ingest.keep_owner,
            on_published=on_published,
        )

    async def recover(self) -> None:
        """Before serving: names, sizes and states as an earlier daemon left them, made right."""
        await self._numbers.refill()
        self._spares.clear()
        self._unfinished_publishes = await recover_names(
            self.store,
            files=self.files,
            writer=self._writer,
            publisher=self.publisher,
            manifests=self._manifests,
            block_digest=self._block_digest,
        )

    async def run(self) -> None:
        """The background work, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hashes.run)
            nursery.start_soon(self.files.run)
            nursery.start_soon(self._spares.run)
            nursery.start_soon(self.uploader.run)
            nursery.start_soon(self.leftovers.remove_of_the_dead)
            nursery.start_soon(self.expiry.run)
            await recover_bytes(
                self.store,
                self._unfinished_publishes,
                files=self.files,
                publisher=self.publisher,
                router=self._router,
            )
            while True:
                await self._numbers.wanted()
                try:
                    await self._numbers.refill()
                except StateError as exc:
                    log.warning("no new inode numbers yet: %s", exc)
                    await trio.sleep(REFILL_RETRY_SECONDS)

    def unfinished(self) -> tuple[int, int]:
        """(files, bytes) that are not stored yet, failed ones among them."""
        rest = [count for count in self.store.state_counts() if count.state != "stored"]
        return sum(count.file_count for count in rest), sum(count.size_bytes for count in rest)

    def waiting(self) -> tuple[int, int]:
        """(files, bytes) that are put, or wait for their turn: what goes on without being asked for."""
        rest = [count for count in self.store.state_counts() if count.state in ("staged", "uploading")]
        return sum(count.file_count for count in rest), sum(count.size_bytes for count in rest)

    def eta_seconds(self) -> float | None:
        """How long the queue takes at the rate of the last seconds; None when nothing moves."""
        seconds = self.uploader.rate.rate().seconds_for(*self.waiting())
        return None if seconds is None else round(seconds, 1)

    def close(self) -> None:
        """After `run` ended: close files and the workspace."""
        self.files.close()
        self.store.close()
