"""What verify reads of the catalog: the locations of a backend, in order of digest. It never writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from castore.catalog.reader import CatalogReader
from castore.catalog.records import LocationStatus
from castore.digest import Digest

_SLICES: Final = 256
"""Queries that count all digests, one after the other: some 100 ms each for 10 million, so that a Ctrl-C is heard."""
_FROM: Final = (
    "FROM blobs JOIN storage_locations USING (blob_id) WHERE backend_id = ? AND status <> 'deleting' AND digest < ?"
)


@dataclass(frozen=True, slots=True)
class DigestRange:
    """All digests with low <= raw digest < high. `ALL_DIGESTS` is every one."""

    low: bytes
    high: bytes

    def slices(self) -> Iterator[DigestRange]:
        """The range in about equal pieces."""
        low, high = (int.from_bytes(end[:8].ljust(8, b"\0")) for end in (self.low, self.high))
        ends = [self.low, *((low + (high - low) * n // _SLICES).to_bytes(8) for n in range(1, _SLICES)), self.high]
        return (DigestRange(ends[n], ends[n + 1]) for n in range(_SLICES))


ALL_DIGESTS: Final = DigestRange(b"", b"\xff" * 33)


@dataclass(frozen=True, slots=True)
class LocationRow:
    """A location to verify, as it was when it was read from the catalog."""

    blob_id: int
    digest: Digest
    size_bytes: int
    backend_id: str
    status: LocationStatus
    stored_at_ns: int


class ScrubReader(CatalogReader):
    """A connection for one task of a scrub."""

    def locations_after(
        self, backend_id: str, last: Digest | None, within: DigestRange, limit: int
    ) -> list[LocationRow]:
        """Up to `limit` locations of a backend behind the digest `last`, ascending, without those being deleted."""
        after = (within.low, "") if last is None else (last.raw, last.algorithm)
        rows = self._rows(
            f"SELECT blob_id, algorithm, digest, size_bytes, status, stored_at_ns {_FROM} "
            "AND (digest, algorithm) > (?, ?) ORDER BY digest, algorithm LIMIT ?",
            (backend_id, within.high, *after, limit),
        )
        return [
            LocationRow(row[0], Digest(row[1], row[2]), row[3], backend_id, LocationStatus(row[4]), row[5])
            for row in rows
        ]

    def totals_within(self, backend_id: str, within: DigestRange) -> tuple[int, int]:
        """(locations, bytes) of a backend in a range of digests, without those being deleted."""
        row = self._one(
            f"SELECT count(*), coalesce(sum(size_bytes), 0) {_FROM} AND digest >= ?",
            backend_id,
            within.high,
            within.low,
        )
        return row[0], row[1]
