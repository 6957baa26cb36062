"""Opening blobs for reading: puts the parts of the read path together. Knows neither paths nor packages."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakValueDictionary

import trio

from castore.blobs.disk_cache import DiskCache
from castore.blobs.fetch import BadLocation, BlockFetcher
from castore.blobs.flights import Flights
from castore.blobs.idle import forget_when_idle
from castore.blobs.memory import MEMORY_BYTES, KnownBlob, SpanMemory
from castore.blobs.open_blob import OpenBlob
from castore.blobs.stats import ReadStats
from castore.catalog.reader import CatalogReader
from castore.catalog.records import Blob
from castore.digest import Digest
from castore.storage.spi import StorageBackend


class BlobReader:
    """Reads blobs from the backends that hold them, every block checked before it is given out.

    `backends` are in configuration order, each with deadlines of its own. `memory_bytes` bounds the blocks that are
    kept for the next read; nothing is allocated before it is needed. `on_bad_location(digest, backend_id, reason)` is
    awaited when a location that counted as good gives missing or wrong bytes, once in `REPORT_INTERVAL_S` for each.
    `cache` is looked at before a backend is asked, filled with what they gave, and run along.
    """

    def __init__(
        self,
        catalog: CatalogReader,
        backends: Mapping[str, StorageBackend],
        *,
        memory_bytes: int = MEMORY_BYTES,
        on_bad_location: BadLocation,
        cache: DiskCache | None = None,
    ) -> None:
        self.cache = cache
        self.stats = ReadStats() if cache is None else cache.stats
        self._memory = SpanMemory(memory_bytes, self.stats)
        fetcher = BlockFetcher(catalog, backends, stats=self.stats, on_bad_location=on_bad_location)
        self._flights = Flights(fetcher, self._memory, self.stats, cache)
        # By what the bytes and their checks are, never by blob_id: that may be given anew after its blob was deleted.
        self._known: WeakValueDictionary[tuple[Digest, int, str], KnownBlob] = WeakValueDictionary()

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory that are kept for the next read, at most `memory_bytes`."""
        return self._memory.kept_bytes

    @property
    def ahead_bytes(self) -> int:
        """Bytes on their way, and prefetched ones that are not yet read."""
        return self._memory.in_flight_bytes + self._memory.unread_bytes

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch what reads ask for, until cancelled. Before and after it only what is in memory can be read."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forget_when_idle, self._memory, self.stats)
            if self.cache is not None:
                nursery.start_soon(self.cache.run)
            await self._flights.run(task_status=task_status)

    def open(self, blob: Blob) -> OpenBlob:
        """A handle on the blob. Asks neither the catalog nor a backend; close it when done."""
        summary = blob.summary
        key = (summary.digest, summary.block_size_bytes, summary.checksum_algorithm)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = KnownBlob(summary.size_bytes, summary.block_size_bytes)
        return OpenBlob(blob, known, self._flights)
