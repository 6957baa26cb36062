"""Re-reads one object as a whole and says whether it is the blob it should be. Records nothing, knows no catalog."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from castore.catalog.records import FailureReason
from castore.digest import Digest, new_hasher
from castore.errors import ObjectMissing, ObjectTruncated, StorageError
from castore.storage.spi import Scanning, StorageBackend
from castore.verify.pace import Pace

PIECE_BYTES: Final = 4 * 1024 * 1024
"""One get: large enough that a remote store's latency is a small part of it; 8 MiB are no faster, and cost 33 MB."""
SCAN_BYTES: Final = 64 * 1024 * 1024
"""One scan, where a backend's own threads hash what they read: each costs 0.3 ms beside that, and no memory."""
PACED_SCAN_BYTES: Final = 8 * 1024 * 1024
"""The same below a rate or beside readers, who are made way for between two of them: 5 ms of a core."""
LARGE_BYTES: Final = 1024 * 1024
"""Objects above this size share a few buffers of PIECE_BYTES; smaller ones get one of their own size."""
LARGE_READS: Final = 4
"""Large objects read at a time: with two cores, hashing is busy with fewer; bounds the memory of a scrub to 32 MiB for
each backend: of each, a piece is hashed while the next one is fetched."""
SCANS_MIN: Final = 2
"""The same where the backend's own threads hash what they read; as many as cores, if these are more. Twice as many cost
3 % more processor time, and read a cold disk no faster."""
HASH_INLINE_BYTES: Final = 64 * 1024
"""A piece up to this size is hashed on the event loop: 40 microseconds, where a thread costs 60."""


Keep = Callable[[int, memoryview], None]
"""Is given pieces of an object and where they begin; must not hold on to them. May block."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an object was found to be. `reason` is None when it is the blob.

    The digest and the size are those of the bytes that are there; None when they cannot be told.
    """

    reason: FailureReason | None
    observed_digest: Digest | None
    observed_size_bytes: int | None


class ObjectReader:
    """Reads the objects of one backend, from many tasks at once, in bounded memory.

    Each piece waits for its turn by `pace`; `on_bytes` is told of each that was read and hashed.
    """

    def __init__(
        self,
        backend: StorageBackend,
        *,
        pace: Pace | None = None,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._backend = backend
        self._pace = pace or Pace()
        self._on_bytes = on_bytes
        self._scanning = backend if isinstance(backend, Scanning) and backend.scans else None
        self._large = trio.CapacityLimiter(max(SCANS_MIN, os.cpu_count() or 1) if self._scanning else LARGE_READS)
        self._buffers: list[bytearray] = []
        self._hashing = trio.CapacityLimiter(os.cpu_count() or 1)

    async def judge(self, digest: Digest, size_bytes: int, *, keep: Keep | None = None) -> Reading:
        """Re-read the object that should be `size_bytes` of `digest`; twice before it is said to be bad.

        `keep` is given every piece of an object of the right size, perhaps twice: what it has at last is the blob when
        the reading is good. Raises a StorageError other than ObjectMissing and ObjectTruncated when the backend does
        not tell, and what `keep` raises.
        """
        reading = await self._read(digest, size_bytes, keep)
        if reading.reason is not None:
            reading = await self._read(digest, size_bytes, keep)
        return reading

    async def _read(self, digest: Digest, size_bytes: int, keep: Keep | None) -> Reading:
        observed_size: int | None = None
        try:
            # The whole object, however long it is: an object with bytes appended begins with the right ones.
            observed_size = (await self._backend.head(digest)).size_bytes
            observed = await self._observe(digest, observed_size, keep if observed_size == size_bytes else None)
        except ObjectMissing:
            return Reading(FailureReason.MISSING, None, None)
        except ObjectTruncated:
            # The store says one size and gives fewer bytes.
            return Reading(FailureReason.SIZE_MISMATCH, None, None)
        reason = None
        if observed_size != size_bytes:
            reason = FailureReason.SIZE_MISMATCH
        elif observed != digest:
            reason = FailureReason.DIGEST_MISMATCH
        return Reading(reason, observed, observed_size)

    async def _observe(self, digest: Digest, size_bytes: int, keep: Keep | None) -> Digest:
        hasher = new_hasher(digest.algorithm)

        def take(offset: int, piece: memoryview) -> None:
            hasher.update(piece)
            if keep is not None:
                keep(offset, piece)

        if size_bytes <= LARGE_BYTES:
            if size_bytes:
                await self._hash(take, 0, await self._get(digest, 0, size_bytes, bytearray(size_bytes)))
        else:
            async with self._large:
                if self._scanning is not None and keep is None:
                    hasher = await self._scan(self._scanning, digest, size_bytes, hasher)
                else:
                    await self._observe_large(digest, size_bytes, take)
        return Digest(digest.algorithm, hasher.digest())

    async def _scan(self, scanning: Scanning, digest: Digest, size_bytes: int, hasher: Any) -> Any:
        """The backend's threads hash what they read; a hasher that has seen all of it."""
        most = SCAN_BYTES if self._pace.is_free else PACED_SCAN_BYTES
        for offset in range(0, size_bytes, most):
            length = min(most, size_bytes - offset)
            await self._pace.take(length)
            # Each try has a copy: of one that fails, or is given up, nothing is left.
            hasher = await scanning.scan(digest, offset=offset, length=length, begin=hasher.copy)
            self._on_bytes(length)
        return hasher

    async def _observe_large(self, digest: Digest, size_bytes: int, take: Keep) -> None:
        """One piece is hashed while the next one is fetched."""
        # Kept for the next large objects: fresh memory costs a page fault for every 4 KiB.
        buffers = [self._buffers.pop() if self._buffers else bytearray(PIECE_BYTES) for _ in range(2)]
        errors: list[StorageError | OSError] = []
        piece = memoryview(b"")

        async def fetch(offset: int) -> None:
            nonlocal piece
            try:
                piece = await self._get(digest, offset, min(PIECE_BYTES, size_bytes - offset), buffers[0])
            except StorageError as exc:
                errors.append(exc)

        async def work(offset: int, piece: memoryview) -> None:
            try:
                await self._hash(take, offset, piece)
            except OSError as exc:  # of whoever keeps it
                errors.append(exc)

        try:
            await fetch(0)
            for offset in range(0, size_bytes, PIECE_BYTES):
                if errors:
                    break
                buffers.reverse()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(work, offset, piece)
                    if offset + PIECE_BYTES < size_bytes:
                        nursery.start_soon(fetch, offset + PIECE_BYTES)
        finally:
            self._buffers += buffers
        if errors:  # raised here, so that it is not part of a group
            raise errors[0]

    async def _get(self, digest: Digest, offset: int, length: int, buffer: bytearray) -> memoryview:
        await self._pace.take(length)
        return await self._backend.get(digest, offset=offset, length=length, into=buffer)

    async def _hash(self, take: Keep, offset: int, piece: memoryview) -> None:
        if len(piece) <= HASH_INLINE_BYTES:
            take(offset, piece)
        else:
            await trio.to_thread.run_sync(take, offset, piece, limiter=self._hashing)
        self._on_bytes(len(piece))
