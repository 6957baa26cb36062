"""What metrics and the status page ask of the catalog: counts, and the first rows of what may be many. Never writes."""

from __future__ import annotations

import json
from dataclasses import dataclass

from castore.catalog.condition import ConditionReader
from castore.catalog.event_log import StoredEvent
from castore.catalog.records import FailureReason, LocationStatus, Use, rows_as_written
from castore.digest import Digest
from castore.events import Event


@dataclass(frozen=True, slots=True)
class BackendCoverage:
    """How much of what a backend holds was re-read, and when."""

    backend_id: str
    stored_count: int
    """Good locations that were not re-read since they were stored."""
    verified_count: int
    verified_since: tuple[int, ...]
    """Of these, how many were verified since each of the times asked for."""
    oldest_proof_ns: int
    """When the good location that was verified or stored longest ago was; 0 when there is none."""


@dataclass(frozen=True, slots=True)
class FailedLocation:
    """A location with missing or wrong bytes, and some of the files that it is for."""

    digest: Digest
    backend_id: str
    reason: str
    judged_at_ns: int
    """When verify looked at it; 0 when a read found it."""
    uses: tuple[Use, ...]
    use_count: int


@dataclass(frozen=True, slots=True)
class PublishedPackage:
    """What a list of packages says of one."""

    ref: str
    published_at_ns: int
    file_count: int
    size_bytes: int
    producer: str
    backend_ids: tuple[str, ...]


class OverviewReader(ConditionReader):
    """A connection for these questions."""

    def coverage(self, since_ns: tuple[int, ...]) -> list[BackendCoverage]:
        """For each backend that has locations, how many were verified since each of some times, latest first."""
        return [self._coverage(backend_id, since_ns) for backend_id in sorted(self.backend_ids())]

    def _coverage(self, backend_id: str, since_ns: tuple[int, ...]) -> BackendCoverage:
        verified_count = self._count(backend_id, LocationStatus.VERIFIED)
        return BackendCoverage(
            backend_id=backend_id,
            stored_count=self._count(backend_id, LocationStatus.STORED),
            verified_count=verified_count,
            verified_since=self._verified_since(backend_id, since_ns, verified_count),
            oldest_proof_ns=self.oldest_proof_ns(backend_id),
        )

    def _verified_since(self, backend_id: str, since_ns: tuple[int, ...], verified_count: int) -> tuple[int, ...]:
        """How many are verified since each time.

        The index on the time of verification has all that were ever re-read: 25 ms for each million. Those that failed
        since are few, and taken off. Where some were stored anew since, all rows are looked at: 0.4 s for each million.
        """
        looked_at, newer_ns = [0], 2**63 - 1
        for since in (*since_ns, 1):
            row = self._one(
                "SELECT count(*) FROM storage_locations WHERE backend_id = ? AND verified_at_ns BETWEEN ? AND ?",
                *(backend_id, since, newer_ns),
            )
            looked_at.append(looked_at[-1] + row[0])
            newer_ns = since - 1
        sums = ", ".join("coalesce(sum(verified_at_ns >= ?), 0)" for _ in (*since_ns, 1))
        bad = self._one(
            f"SELECT {sums} FROM storage_locations WHERE status IN ('failed', 'deleting') AND backend_id = ?",
            *(*since_ns, 1, backend_id),
        )
        good = [all_of_them - bad_ones for all_of_them, bad_ones in zip(looked_at[1:], bad, strict=True)]
        if good[-1] != verified_count:
            good = self._one(
                f"SELECT {sums} FROM storage_locations NOT INDEXED WHERE backend_id = ? AND status = 'verified'",
                *(*since_ns, 1, backend_id),
            )
        return tuple(good[:-1])

    def _count(self, backend_id: str, status: LocationStatus) -> int:
        row = self._one(
            "SELECT count(*) FROM storage_locations WHERE status = ? AND backend_id = ?", status, backend_id
        )
        return int(row[0])

    def failures(self) -> list[tuple[str, FailureReason, int]]:
        """(backend_id, reason, number of failed locations), for every pair that occurs."""
        rows = self._rows(
            "SELECT backend_id, reason, count(*) FROM storage_locations WHERE status = 'failed' "
            "GROUP BY backend_id, reason ORDER BY backend_id, reason"
        )
        with rows_as_written():
            return [(row[0], FailureReason(row[1]), row[2]) for row in rows]

    def first_failed(self, limit: int, uses: int) -> list[FailedLocation]:
        """Up to `limit` failed locations by backend and age of their blob, each with up to `uses` of its files."""
        rows = self._rows(
            "SELECT blob_id, algorithm, digest, backend_id, reason, verified_at_ns "
            "FROM storage_locations JOIN blobs USING (blob_id) WHERE status = 'failed' "
            "ORDER BY backend_id, blob_id LIMIT ?",
            (limit,),
        )
        found = []
        for row in list(rows):
            some, count = self.paths_of(row[0], uses)
            with rows_as_written():
                found.append(FailedLocation(Digest(row[1], row[2]), row[3], row[4], row[5], tuple(some), count))
        return found

    def newest_packages(self, limit: int) -> list[PublishedPackage]:
        """Up to `limit` packages, the one published last first."""
        rows = self._rows(
            "SELECT name || '/' || version, published_at_ns, file_count, size_bytes, producer, backend_ids "
            "FROM packages ORDER BY package_id DESC LIMIT ?",
            (limit,),
        )
        return [
            PublishedPackage(
                ref=row[0],
                published_at_ns=row[1],
                file_count=row[2],
                size_bytes=row[3],
                producer=row[4],
                backend_ids=tuple(json.loads(row[5])),
            )
            for row in rows
        ]

    def newest_events(self, limit: int) -> list[StoredEvent]:
        """Up to `limit` events, the last one first."""
        rows = self._rows(
            "SELECT sequence, event_id, type, subject, time_ns, data FROM events ORDER BY sequence DESC LIMIT ?",
            (limit,),
        )
        return [
            StoredEvent(
                row[0], Event(type=row[2], subject=row[3], data=json.loads(row[5]), event_id=row[1], time_ns=row[4])
            )
            for row in rows
        ]
