"""Opening blobs for reading: puts the parts of the read path together. Knows neither paths nor packages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from weakref import WeakSet, WeakValueDictionary

import trio

from castore.blobs.disk_cache import DiskCache
from castore.blobs.fetch import BadLocation, BlockFetcher
from castore.blobs.flights import Flights
from castore.blobs.idle import forget_when_idle
from castore.blobs.memory import MEMORY_BYTES, KnownBlob, SpanMemory
from castore.blobs.open_blob import OpenBlob
from castore.blobs.sibling_flights import SiblingFlights
from castore.blobs.siblings import SIBLING_BYTES, Following, Place
from castore.blobs.stats import ReadStats
from castore.catalog.reader import CatalogReader
from castore.catalog.records import Blob
from castore.digest import Digest
from castore.durations import Durations
from castore.storage.spi import StorageBackend


class BlobReader:
    """Reads blobs from the backends that hold them, every block checked before it is given out.

    `backends` are in configuration order, each with deadlines of its own. `memory_bytes` bounds the blocks that are
    kept for the next read; nothing is allocated before it is needed. `on_bad_location(digest, backend_id, reason)` is
    awaited when a location that counted as good gives missing or wrong bytes, once in `REPORT_INTERVAL_S` for each.
    `cache` is looked at before a backend is asked, filled with what they gave, and run along. `following` tells which
    files come after one, so that small files are fetched before they are asked for; without it, they are not.
    """

    def __init__(
        self,
        catalog: CatalogReader,
        backends: Mapping[str, StorageBackend],
        *,
        memory_bytes: int = MEMORY_BYTES,
        on_bad_location: BadLocation,
        cache: DiskCache | None = None,
        following: Following | None = None,
    ) -> None:
        self.cache = cache
        self.stats = ReadStats() if cache is None else cache.stats
        self._memory = SpanMemory(memory_bytes, self.stats)
        fetcher = BlockFetcher(catalog, backends, stats=self.stats, on_bad_location=on_bad_location)
        self._flights = Flights(fetcher, self._memory, self.stats, cache)
        # By what the bytes and their checks are, never by blob_id: that may be given anew after its blob was deleted.
        self._known: WeakValueDictionary[tuple[Digest, int, str], KnownBlob] = WeakValueDictionary()
        self._handles: WeakSet[OpenBlob] = WeakSet()
        self._siblings = None if following is None else SiblingFlights(self._flights, following, self._known_of)

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory that are kept for the next read, at most `memory_bytes`."""
        return self._memory.kept_bytes

    @property
    def waits(self) -> Durations:
        """How long reads waited that found not all in memory."""
        return self._flights.waits

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all buffers that anybody refers to: on their way, kept, waiting for the disk cache, being taken."""
        return self._flights.buffers.used_bytes()

    @property
    def ahead_bytes(self) -> int:
        """Bytes on their way, and prefetched ones that are not yet read."""
        return self._memory.in_flight_bytes + self._memory.unread_bytes

    @property
    def is_fetching(self) -> bool:
        """Whether bytes are on their way from a backend, asked for or ahead of it."""
        return self._memory.in_flight_bytes > 0

    def open_digests(self) -> set[Digest]:
        """The blobs that somebody has open."""
        return {handle.digest for handle in self._handles}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch what reads ask for, until cancelled. Before and after it only what is in memory can be read."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forget_when_idle, self._memory, self._flights.buffers, self.stats)
            if self.cache is not None:
                nursery.start_soon(self.cache.run)
            if self._siblings is not None:
                nursery.start_soon(self._siblings.run)
            await self._flights.run(task_status=task_status)

    def open(self, blob: Blob, place: Place | None = None) -> OpenBlob:
        """A handle on the blob. Asks neither the catalog nor a backend; close it when done.

        `place` is that of the file that is opened: the files after it may be fetched ahead.
        """
        on_first_read = None
        if self._siblings is not None and place is not None and blob.summary.size_bytes <= SIBLING_BYTES:
            on_first_read = partial(self._siblings.read, place)
        handle = OpenBlob(blob, self._known_of(blob), self._flights, on_first_read)
        self._handles.add(handle)
        return handle

    def _known_of(self, blob: Blob) -> KnownBlob:
        summary = blob.summary
        key = (summary.digest, summary.block_size_bytes, summary.checksum_algorithm)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = KnownBlob(summary.size_bytes, summary.block_size_bytes)
        return known
