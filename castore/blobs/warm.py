"""Fetches what the disk cache lacks of many blobs, ahead of any reader. Knows neither packages nor paths.

It works beside mounts that fill the same folder: blocks that are there by now are checked, and not fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import trio

from castore.blobs.cache_files import segment_bytes
from castore.blobs.disk_cache import CacheStalledError, DiskCache
from castore.blobs.fetch import BlockFetcher
from castore.catalog.reader import CatalogReader
from castore.catalog.records import Blob
from castore.errors import BlockUnreadable, CastoreError, StateError

WORKERS: Final = 16
"""Gets at a time: for small blobs the time is that of the answers, not of the bytes."""

LARGE_BYTES: Final = 1024 * 1024
LARGE_GETS: Final = 4
"""Of these, gets of more than LARGE_BYTES: four segments fill a fast link, in 32 MiB of memory."""

_STORE_TRIES: Final = 50
_STORE_WAIT_S: Final = 0.1
"""While another process makes room, which takes it well below a second."""


@dataclass(slots=True)
class _Room:
    """What a fetcher fills."""

    size_bytes: int
    target: memoryview | None


@dataclass(slots=True)
class Warmed:
    """How far it is. `done_bytes` are in the cache now, `fetched_bytes` of them were not before."""

    done_bytes: int = 0
    done_blobs: int = 0
    fetched_bytes: int = 0
    unreadable: int = 0
    """Blobs of which some block has no good copy."""


class Warmer:
    """Warms blobs; `warmed` counts while it runs."""

    def __init__(self, catalog: CatalogReader, fetcher: BlockFetcher, cache: DiskCache) -> None:
        self.warmed = Warmed()
        self.unreadable: set[int] = set()
        """The numbers of blobs of which some block has no good copy."""
        self._catalog = catalog
        self._fetcher = fetcher
        self._cache = cache
        self._large = trio.CapacityLimiter(LARGE_GETS)

    async def run(self, blob_ids: Iterable[int]) -> None:
        """Fetch and store all that is missing, a segment at a time. Unreadable blobs are noted and left.

        Raises StorageError when a backend that may have the bytes cannot be asked, StateError when the cache cannot be
        written.
        """
        segments = self._segments(blob_ids)
        errors: list[CastoreError] = []
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work, segments, errors, nursery.cancel_scope)
        if errors:
            raise errors[0]

    async def _work(
        self, segments: Iterator[tuple[Blob, int, int]], errors: list[CastoreError], scope: trio.CancelScope
    ) -> None:
        try:
            for blob, first, size_bytes in segments:
                if size_bytes > LARGE_BYTES:
                    async with self._large:
                        await self._warm(blob, first, size_bytes)
                else:
                    await self._warm(blob, first, size_bytes)
        except CastoreError as exc:
            # Raised outside, so that it is not part of a group.
            errors.append(exc)
            scope.cancel()

    async def _warm(self, blob: Blob, first: int, size_bytes: int) -> None:
        summary, size = blob.summary, blob.summary.block_size_bytes
        target = memoryview(bytearray(size_bytes))
        try:
            missing = await self._cache.fill(summary, first, target)
        except CacheStalledError:
            raise StateError("the disk of the cache does not answer") from None
        if missing:
            try:
                await self._fetcher.fill(blob, first, _Room(size_bytes, target), missing=missing)
            except BlockUnreadable:
                self.unreadable.add(blob.blob_id)
                self.warmed.unreadable = len(self.unreadable)
                return
            for start, end in missing:
                run = target[(start - first) * size : (end - first) * size]
                await self._store(blob, start, run)
                self.warmed.fetched_bytes += len(run)
        self.warmed.done_bytes += size_bytes
        if first * size + size_bytes == summary.size_bytes:
            self.warmed.done_blobs += 1

    async def _store(self, blob: Blob, first: int, data: memoryview) -> None:
        for _ in range(_STORE_TRIES):
            try:
                if await self._cache.store(blob.summary, first, data):
                    return
            except OSError as exc:
                raise StateError(f"the disk cache cannot be written: {exc.strerror}") from exc
            await trio.sleep(_STORE_WAIT_S)
        raise StateError("the disk cache has no room: its file system is nearly full, or another process fills it")

    def _segments(self, blob_ids: Iterable[int]) -> Iterator[tuple[Blob, int, int]]:
        """(blob, first block, bytes) of each piece that one file of the cache holds."""
        for blob_id in blob_ids:
            blob = self._catalog.blob(blob_id)
            if blob is None:
                continue  # its package was deleted meanwhile
            size, step = blob.summary.block_size_bytes, segment_bytes(blob.summary.block_size_bytes)
            for start in range(0, blob.summary.size_bytes, step):
                yield blob, start // size, min(step, blob.summary.size_bytes - start)
