"""Where the right bytes of a blob may still be: another backend, the disk cache, a file. Each is read whole and hashed
before it counts. Puts nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from castore.blobs.disk_cache import CacheStalledError, DiskCache
from castore.catalog.reader import CatalogReader
from castore.catalog.records import GOOD_STATUSES, Blob, LocationStatus
from castore.catalog.scrub import LocationRow
from castore.digest import Digest, new_hasher
from castore.errors import StorageError
from castore.registry.locations import Finding
from castore.storage.spi import StorageBackend
from castore.verify.aside import Aside
from castore.verify.reading import PIECE_BYTES, ObjectReader
from castore.verify.scrub import finding_of

FILES_AT_ONCE: Final = 4
"""Reads of files and of the disk cache at a time, each with a buffer of PIECE_BYTES."""


@dataclass(frozen=True, slots=True)
class GoodCopy:
    """Where the bytes came from. `backend_id` is None unless `kind` is `backend`."""

    kind: str
    """`backend`, `cache` or `directory`."""
    backend_id: str | None = None


class Said:
    """What was met on the way to a good copy.

    `findings` are what re-reading other locations showed: those that are bad, for whoever records it. `errors` are why
    some could not be asked.
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.errors: list[str] = []


class GoodCopies:
    """Finds the bytes of a blob and keeps them aside, checked as a whole. For many tasks at once."""

    def __init__(
        self, catalog: CatalogReader, backends: Mapping[str, StorageBackend], *, cache: DiskCache | None = None
    ) -> None:
        self._catalog = catalog
        self._readers = {backend_id: ObjectReader(backend) for backend_id, backend in backends.items()}
        self._cache = cache
        self._turn = trio.CapacityLimiter(FILES_AT_ONCE)

    async def elsewhere(self, blob: Blob, not_in: str, aside: Aside, said: Said) -> GoodCopy | None:
        """From another backend that has a good location: what was verified first. Else from the disk cache."""
        locations = [
            location
            for location in self._catalog.locations(blob.blob_id)
            if location.backend_id != not_in
            and location.backend_id in self._readers
            and location.status in GOOD_STATUSES
        ]
        order = list(self._readers)
        locations.sort(key=lambda one: (one.status is not LocationStatus.VERIFIED, order.index(one.backend_id)))
        for location in locations:
            try:
                reading = await self._readers[location.backend_id].judge(
                    location.digest, blob.summary.size_bytes, keep=aside.keep
                )
            except StorageError as exc:
                said.errors.append(str(exc))
                continue
            if reading.reason is None:
                return GoodCopy("backend", location.backend_id)
            row = LocationRow(
                blob.blob_id,
                location.digest,
                blob.summary.size_bytes,
                location.backend_id,
                location.status,
                location.stored_at_ns,
            )
            said.findings.append(finding_of(row, reading, 0))
        if self._cache is not None and await self._from_cache(self._cache, blob, aside):
            return GoodCopy("cache")
        return None

    async def _from_cache(self, cache: DiskCache, blob: Blob, aside: Aside) -> bool:
        summary = blob.summary
        hasher = new_hasher(summary.digest.algorithm)
        blocks = max(1, PIECE_BYTES // summary.block_size_bytes)

        def take(offset: int, piece: memoryview) -> None:
            hasher.update(piece)
            aside.keep(offset, piece)

        async with self._turn:
            for offset in range(0, summary.size_bytes, blocks * summary.block_size_bytes):
                length = min(blocks * summary.block_size_bytes, summary.size_bytes - offset)
                piece = memoryview(bytearray(length))
                try:
                    if await cache.fill(summary, offset // summary.block_size_bytes, piece):
                        return False
                except CacheStalledError:
                    return False
                await trio.to_thread.run_sync(take, offset, piece)
        return Digest(summary.digest.algorithm, hasher.digest()) == summary.digest

    async def in_file(self, path: Path, blob: Blob, aside: Aside) -> GoodCopy | None:
        """From a file, if it is the blob's bytes. Raises OSError when it cannot be read, or kept aside."""
        digest, size_bytes = await self.digest_of(path, blob.summary.digest.algorithm, aside, blob.summary.size_bytes)
        good = digest == blob.summary.digest and size_bytes == blob.summary.size_bytes
        return GoodCopy("directory") if good else None

    async def digest_of(
        self, path: Path, algorithm: str, aside: Aside | None = None, max_bytes: int = 1 << 62
    ) -> tuple[Digest, int]:
        """The digest and the size of a file; of one that is longer than `max_bytes`, those of a part of it.

        Raises OSError.
        """
        hasher = new_hasher(algorithm)
        size_bytes = 0
        async with self._turn:
            descriptor = await trio.to_thread.run_sync(
                os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            )
            try:
                buffer = memoryview(bytearray(PIECE_BYTES))

                def step() -> int:
                    count = os.preadv(descriptor, [buffer], size_bytes)
                    if size_bytes + count <= max_bytes:
                        hasher.update(buffer[:count])
                        if aside is not None:
                            aside.keep(size_bytes, buffer[:count])
                    return count

                while size_bytes <= max_bytes and (count := await trio.to_thread.run_sync(step)):
                    size_bytes += count
            finally:
                os.close(descriptor)
        return Digest(algorithm, hasher.digest()), size_bytes
