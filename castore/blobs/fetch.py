"""Blocks from the locations of a blob: received, checked, fetched again, failed over. Remembers no bytes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import trio

from castore.blobs.stats import ReadStats
from castore.catalog.reader import CatalogReader
from castore.catalog.records import GOOD_STATUSES, Blob, FailureReason, LocationStatus
from castore.digest import Digest, block_checksum
from castore.errors import (
    BlockUnreadable,
    CastoreError,
    ObjectMissing,
    ObjectTruncated,
    StorageDenied,
    StorageError,
)
from castore.storage.spi import StorageBackend

REPORT_INTERVAL_S: Final = 5.0
"""A bad location is reported once in this time, however many reads meet it: enough for the catalog to say so."""

_REPORTS_REMEMBERED: Final = 1024
"""Beyond that many bad locations at a time, one may be reported twice."""

_CHECK_AT_ONCE: Final = 16
"""Blocks checked before other tasks get a turn: 2 MiB, 0.2 ms with xxh3 and 1.5 ms with sha256."""

BadLocation = Callable[[Digest, str, FailureReason], Awaitable[None]]
"""Records that a location gives missing or wrong bytes. What it raises does not fail the read."""

_log = logging.getLogger(__name__)


class BlockFetcher:
    """Fills buffers with checked blocks.

    The catalog is asked for the locations each time, so what verify, repair or another process found counts at once.
    """

    def __init__(
        self,
        catalog: CatalogReader,
        backends: Mapping[str, StorageBackend],
        *,
        stats: ReadStats,
        on_bad_location: BadLocation,
    ) -> None:
        self._catalog = catalog
        self._backends = backends
        self._stats = stats
        self._on_bad_location = on_bad_location
        self._reported: dict[tuple[Digest, str], float] = {}

    async def fill(self, blob: Blob, first: int, buffer: bytearray) -> None:
        """Receive the blocks from index `first` on into `buffer`, which ends where a block does. All are checked.

        Locations are tried in order: good ones as the configuration orders their backends, then failed ones, whose
        bytes may have been repaired. Each gets a second chance at the blocks that came wrong; what is right is kept.

        Raises, when no location gives good bytes for some block, the error of the first location that may still have
        them: a temporary one, else StorageDenied. With no such location, BlockUnreadable.
        """
        size = blob.summary.block_size_bytes
        wanted = [(first, first + -(-len(buffer) // size))]
        target = memoryview(buffer)
        said: list[str] = []
        hopeful: list[StorageError] = []
        for backend_id, status in self._candidates(blob, said):
            backend = self._backends[backend_id]
            try:
                wanted = await self._receive(backend, blob, first, target, wanted)
                if wanted:
                    wanted = await self._receive(backend, blob, first, target, wanted)
                if not wanted:
                    return
                reason = FailureReason.DIGEST_MISMATCH
            except ObjectMissing:
                reason = FailureReason.MISSING
            except ObjectTruncated:
                reason = FailureReason.SIZE_MISMATCH
            except StorageError as exc:
                said.append(f"{backend_id}: {exc}")
                hopeful += [exc] if exc.temporary or isinstance(exc, StorageDenied) else []
                continue
            said.append(f"{backend_id}: {reason}")
            if status in GOOD_STATUSES:
                await self._report(blob.summary.digest, backend_id, reason)
        if hopeful:
            raise max(hopeful, key=lambda error: error.temporary)
        where = "; ".join(said) or "no location"
        raise BlockUnreadable(f"{blob.summary.digest}: no good copy of block {wanted[0][0]}: {where}")

    def _candidates(self, blob: Blob, said: list[str]) -> list[tuple[str, LocationStatus]]:
        # The digest is compared because a blob_id may be given anew after its blob was deleted.
        known = {
            location.backend_id: location.status
            for location in self._catalog.locations(blob.blob_id)
            if location.digest == blob.summary.digest and location.status is not LocationStatus.DELETING
        }
        said.extend(f"{backend_id}: not configured" for backend_id in known if backend_id not in self._backends)
        ordered = [(backend_id, known[backend_id]) for backend_id in self._backends if backend_id in known]
        return sorted(ordered, key=lambda candidate: candidate[1] is LocationStatus.FAILED)

    async def _receive(
        self, backend: StorageBackend, blob: Blob, first: int, target: memoryview, runs: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Get runs of blocks into their places in `target`; the runs whose bytes are wrong are returned."""
        summary = blob.summary
        size = summary.block_size_bytes
        bad: list[tuple[int, int]] = []
        for start, end in runs:
            place = target[(start - first) * size : (end - first) * size]
            self._stats.gets += 1
            await backend.get(summary.digest, offset=start * size, length=len(place), into=place)
            self._stats.fetched_bytes += len(place)
            for index in range(start, end):
                if index > start and not (index - start) % _CHECK_AT_ONCE:
                    await trio.lowlevel.checkpoint()
                block = place[(index - start) * size : (index - start + 1) * size]
                if block_checksum(block, summary.checksum_algorithm) != summary.checksum(index):
                    self._stats.bad_blocks += 1
                    if bad and bad[-1][1] == index:
                        bad[-1] = (bad[-1][0], index + 1)
                    else:
                        bad.append((index, index + 1))
        return bad

    async def _report(self, digest: Digest, backend_id: str, reason: FailureReason) -> None:
        key, now = (digest, backend_id), trio.current_time()
        if now - self._reported.get(key, -REPORT_INTERVAL_S) < REPORT_INTERVAL_S:
            return
        self._reported.pop(key, None)
        if len(self._reported) >= _REPORTS_REMEMBERED:
            del self._reported[next(iter(self._reported))]
        self._reported[key] = now
        try:
            await self._on_bad_location(digest, backend_id, reason)
        except CastoreError as exc:
            # The bytes of another location are as good as before. The next read reports it again.
            self._reported.pop(key, None)
            _log.warning("%s at %s is %s, which could not be recorded: %s", digest, backend_id, reason, exc)
