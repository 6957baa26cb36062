"""The rules for locations: what is known of one and its event change together. Objects are read and put elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from castore.catalog.records import FailureReason, LocationStatus
from castore.catalog.writer import Transaction
from castore.digest import BlobSummary, Digest
from castore.events import LOCATION_FAILED, LOCATION_REPAIRED, LOCATION_STORED, LOCATION_VERIFIED, Event

PACKAGES_NAMED: Final = 20
"""Packages that an event names at most: enough to act on, and a bound for a blob that is in every package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What re-reading one location showed. `reason` is None when the bytes are those of the digest.

    `observed_digest` is that of the bytes that are there, None when there are none. `seen_status` and
    `seen_stored_at_ns` are the location's from before the reading.
    """

    digest: Digest
    backend_id: str
    size_bytes: int
    reason: FailureReason | None
    observed_digest: Digest | None
    duration_ms: int
    seen_status: LocationStatus
    seen_stored_at_ns: int

    @property
    def status(self) -> LocationStatus:
        """What the location becomes."""
        return LocationStatus.VERIFIED if self.reason is None else LocationStatus.FAILED


def record_finding(transaction: Transaction, finding: Finding) -> dict[str, Any] | None:
    """Write the status and the event of a finding; the event's data is returned.

    None, and nothing is written, when the location changed while it was read: what is known of it now is newer.
    """
    if not transaction.conclude_location(
        finding.digest,
        finding.backend_id,
        status=finding.status,
        reason=finding.reason,
        seen=(finding.seen_status, finding.seen_stored_at_ns),
    ):
        return None
    digest = finding.digest
    data = {
        "backend_id": finding.backend_id,
        "digest": str(digest),
        "size_bytes": finding.size_bytes,
        "status": str(finding.status),
        "reason": None if finding.reason is None else str(finding.reason),
        "observed_digest": None if finding.observed_digest is None else str(finding.observed_digest),
        "packages": list(transaction.packages_of(digest, PACKAGES_NAMED)),
        "duration_ms": finding.duration_ms,
    }
    transaction.add_event(Event(type=LOCATION_VERIFIED, subject=str(digest), data=data))
    return data


def record_bad_read(transaction: Transaction, digest: Digest, backend_id: str, reason: FailureReason) -> bool:
    """A read met missing or wrong bytes in a location that counted as good: it becomes `failed`, with the event.

    False, and nothing is written, when the location is failed already or gone.
    """
    if not transaction.fail_location(digest, backend_id, reason):
        return False
    # A read looks at some blocks only: it knows neither the digest of the whole nor how long that takes.
    data = {
        "backend_id": backend_id,
        "digest": str(digest),
        "size_bytes": transaction.size_bytes(digest),
        "reason": str(reason),
        "packages": list(transaction.packages_of(digest, PACKAGES_NAMED)),
    }
    transaction.add_event(Event(type=LOCATION_FAILED, subject=str(digest), data=data))
    return True


def record_stored(transaction: Transaction, stored: Collection[tuple[BlobSummary, str]]) -> None:
    """Puts of what came in were acknowledged: each (blob, backend id) becomes `stored`, with its event."""
    transaction.add_locations(stored)
    # No packages: the one that this is for comes later, and asking for others would cost as much as all the rest.
    transaction.add_events(
        _stored_event(summary.digest, backend_id, None, summary.size_bytes, [], None) for summary, backend_id in stored
    )


def record_copy(
    transaction: Transaction, digest: Digest, backend_id: str, *, source_id: str, size_bytes: int, duration_ms: int
) -> dict[str, Any] | None:
    """A blob was read from `source_id`, found right, and put in `backend_id`: the location, and its event's data.

    None, and no event, when it was good there already, is being deleted there, or nothing knows the blob any more.
    """
    if not transaction.add_copy(digest, backend_id):
        return None
    packages = list(transaction.packages_of(digest, PACKAGES_NAMED))
    event = _stored_event(digest, backend_id, source_id, size_bytes, packages, duration_ms)
    transaction.add_event(event)
    return event.data


def record_repair(
    transaction: Transaction,
    digest: Digest,
    backend_id: str,
    *,
    seen_stored_at_ns: int,
    size_bytes: int,
    reason: FailureReason,
    source: str,
    source_id: str | None,
    duration_ms: int,
) -> dict[str, Any] | None:
    """A failed location got its bytes again, and they were read back: it is `verified`, and its event's data.

    None, and nothing is written, when it was put anew, deleted or judged by others meanwhile.
    """
    if not transaction.repair_location(digest, backend_id, seen_stored_at_ns):
        return None
    data = {
        "backend_id": backend_id,
        "digest": str(digest),
        "size_bytes": size_bytes,
        "reason": str(reason),
        "source": source,
        "source_backend_id": source_id,
        "packages": list(transaction.packages_of(digest, PACKAGES_NAMED)),
        "duration_ms": duration_ms,
    }
    transaction.add_event(Event(type=LOCATION_REPAIRED, subject=str(digest), data=data))
    return data


def _stored_event(
    digest: Digest,
    backend_id: str,
    source_id: str | None,
    size_bytes: int,
    packages: list[str],
    duration_ms: int | None,
) -> Event:
    data = {
        "backend_id": backend_id,
        "source_backend_id": source_id,
        "digest": str(digest),
        "size_bytes": size_bytes,
        "packages": packages,
        "duration_ms": duration_ms,
    }
    return Event(type=LOCATION_STORED, subject=str(digest), data=data)
