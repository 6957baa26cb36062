"""Blocks from the locations of a blob: received, checked, fetched again, failed over in time. Remembers no bytes."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Final

import trio

from castore.blobs.stats import ReadStats
from castore.blobs.turns import Room, Turns
from castore.catalog.reader import CatalogReader
from castore.catalog.records import GOOD_STATUSES, Blob, FailureReason, LocationStatus
from castore.digest import Digest, block_checksum
from castore.errors import (
    BlockUnreadable,
    CastoreError,
    NotConfigured,
    ObjectMissing,
    ObjectTruncated,
    StorageDenied,
    StorageError,
    StorageTimeout,
)
from castore.storage.spi import StorageBackend

FILL_SECONDS: Final = 60.0
"""From the beginning of a fetch to its bytes or its error, over all locations and tries. Above what one location takes
to fail, so that the error says why; below what a read through a mount may take, so that it is this one."""
PATIENCE_SECONDS: Final = 2.0
"""A location that has not given its bytes after so long, beside the time for them, is left for another good one. A
server that is well answers in a hundredth of that."""
PATIENCE_BYTES_PER_S: Final = 4 << 20
"""The slowest transfer that no other location is tried for: 8 MiB, the most of one get, have 4 s altogether."""
PATIENCE_GROWTH: Final = 4
"""When no location was quick enough, each is given so many times as long in the next round."""
LATE_SECONDS: Final = 30.0
"""A backend that was left is asked after the others for so long; then one fetch finds out how it is."""

REPORT_INTERVAL_S: Final = 5.0
"""A bad location is reported once in this time, however many reads meet it: enough for the catalog to say so."""

_REPORTS_REMEMBERED: Final = 1024
"""Beyond that many bad locations at a time, one may be reported twice."""

_CHECK_AT_ONCE: Final = 16
"""Blocks checked before other tasks get a turn: 2 MiB, 0.2 ms with xxh3 and 1.5 ms with sha256."""

BadLocation = Callable[[Digest, str, FailureReason], Awaitable[None]]
"""Records that a location gives missing or wrong bytes. What it raises does not fail the read."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Fetch:
    """What is to be fetched, what of it is still wanted, and what the locations said."""

    blob: Blob
    first: int
    room: Room
    turns: Turns | None
    wanted: list[tuple[int, int]]
    said: list[str] = field(default_factory=list)
    hopeful: list[StorageError] = field(default_factory=list)
    is_nowhere: bool = False
    """Whether there are locations, and none of them in a configured backend."""


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
        self._late_until: dict[str, float] = {}

    async def fill(
        self,
        blob: Blob,
        first: int,
        room: Room,
        *,
        turns: Turns | None = None,
        missing: list[tuple[int, int]] | None = None,
    ) -> str:
        """Receive the blocks from index `first` on into `room`, which ends where a block does. All are checked.

        With `turns`, one is waited for at each location, in the line of its backend; without, the room has a buffer.
        With `missing`, runs of blocks (first, end), only these: the others are there. Returns the id of the backend
        that gave the last of them.

        Locations are tried in order: good ones as the configuration orders their backends, then failed ones, whose
        bytes may have been repaired. Each gets a second chance at the blocks that came wrong; what is right is kept.
        As long as another good one may be asked, none is waited for longer than PATIENCE_SECONDS and the time for its
        bytes; those that were left are asked again with more patience. All of it ends within FILL_SECONDS.

        Raises, when no location gives good bytes for some block, the error of the first location that may still have
        them: a temporary one, else StorageDenied. With no such location, BlockUnreadable. StorageTimeout when the time
        is over.
        """
        size = blob.summary.block_size_bytes
        fetch = _Fetch(blob, first, room, turns, missing or [(first, first + -(-room.size_bytes // size))])
        with trio.move_on_after(FILL_SECONDS):
            backend_id = await self._ask_all(fetch)
            if backend_id is not None:
                return backend_id
            if fetch.hopeful:
                raise max(fetch.hopeful, key=lambda error: error.temporary)
            where = "; ".join(fetch.said) or "no location"
            kind = NotConfigured if fetch.is_nowhere else BlockUnreadable
            raise kind(f"{blob.summary.digest}: no good copy of block {fetch.wanted[0][0]}: {where}")
        what = f"{blob.summary.digest}: no good copy of block {fetch.wanted[0][0]} within {FILL_SECONDS:g} s"
        raise StorageTimeout("; ".join([what, *fetch.said]))

    async def _ask_all(self, fetch: _Fetch) -> str | None:
        """Ask one location after the other. The backend that gave the last of what is wanted; None: no more to ask."""
        candidates = self._candidates(fetch.blob, fetch.said)
        fetch.is_nowhere = not candidates and bool(fetch.said)
        good = [backend_id for backend_id, status in candidates if status in GOOD_STATUSES]
        patience_s = PATIENCE_SECONDS + fetch.room.size_bytes / PATIENCE_BYTES_PER_S
        while good:
            late: list[str] = []
            for number, backend_id in enumerate(good, 1):
                is_alone = not late and number == len(good)
                reason = None
                with trio.move_on_after(inf if is_alone else patience_s) as patience:
                    reason = await self._ask(backend_id, fetch)
                if not fetch.wanted:
                    return backend_id
                if patience.cancelled_caught:
                    late.append(backend_id)
                    self._late_until[backend_id] = trio.current_time() + LATE_SECONDS
                if reason is not None:
                    await self._report(fetch.blob.summary.digest, backend_id, reason)
            good, patience_s = late, patience_s * PATIENCE_GROWTH
        for backend_id, status in candidates:
            if status not in GOOD_STATUSES:
                await self._ask(backend_id, fetch)
                if not fetch.wanted:
                    return backend_id
        return None

    async def _ask(self, backend_id: str, fetch: _Fetch) -> FailureReason | None:
        """Receive what is wanted from one location. What is wrong with the location, if its answer proves it."""
        if backend_id in self._late_until:  # others need not find out at the same time
            self._late_until[backend_id] = trio.current_time() + LATE_SECONDS
        try:
            for _ in range(2):
                await self._receive(self._backends[backend_id], fetch)
                if not fetch.wanted:
                    self._late_until.pop(backend_id, None)
                    return None
            reason = FailureReason.DIGEST_MISMATCH
        except ObjectMissing:
            reason = FailureReason.MISSING
        except ObjectTruncated:
            reason = FailureReason.SIZE_MISMATCH
        except StorageError as exc:
            fetch.said.append(f"{backend_id}: {exc}")
            fetch.hopeful += [exc] if exc.temporary or isinstance(exc, StorageDenied) else []
            return None
        fetch.said.append(f"{backend_id}: {reason}")
        return reason

    def _candidates(self, blob: Blob, said: list[str]) -> list[tuple[str, LocationStatus]]:
        # The digest is compared because a blob_id may be given anew after its blob was deleted.
        known = {
            location.backend_id: location.status
            for location in self._catalog.locations(blob.blob_id)
            if location.digest == blob.summary.digest and location.status is not LocationStatus.DELETING
        }
        said.extend(f"{backend_id}: not configured" for backend_id in known if backend_id not in self._backends)
        ordered = [(backend_id, known[backend_id]) for backend_id in self._backends if backend_id in known]
        now = trio.current_time()
        return sorted(
            ordered,
            key=lambda candidate: (
                candidate[1] is LocationStatus.FAILED,
                self._late_until.get(candidate[0], now) > now,
            ),
        )

    async def _receive(self, backend: StorageBackend, fetch: _Fetch) -> None:
        """As `_receive_now`, when it is its turn."""
        if fetch.turns is None:
            await self._receive_now(backend, fetch)
            return
        await fetch.turns.enter(backend.backend_id, fetch.room)
        try:
            await self._receive_now(backend, fetch)
        finally:
            fetch.turns.leave(backend.backend_id, fetch.room)

    async def _receive_now(self, backend: StorageBackend, fetch: _Fetch) -> None:
        """Get the runs of blocks that are wanted into their places. Those whose bytes are wrong stay wanted."""
        target = fetch.room.target
        assert target is not None, "it has its turn"
        summary = fetch.blob.summary
        size = summary.block_size_bytes
        bad: list[tuple[int, int]] = []
        for start, end in fetch.wanted:
            place = target[(start - fetch.first) * size : (end - fetch.first) * size]
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
        fetch.wanted = bad

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
