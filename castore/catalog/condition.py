"""What health asks of the catalog: cheap for any number of blobs, as it looks at failed locations only."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from castore.catalog.reader import CatalogReader
from castore.catalog.uses import packages_of

FAILED_LOOKED_AT: Final = 1000
"""Failed locations that are looked at one by one: some 20 ms. Beyond, only their number is known."""
PACKAGES_LISTED: Final = 20
"""Packages named in a health document."""


@dataclass(frozen=True, slots=True)
class FailedLocations:
    """What is known of the locations whose status is `failed`.

    `lost_count` counts blobs of published packages without a good location anywhere, `cut_off_count` those that have
    one only in backends that cannot be reached; of the first FAILED_LOOKED_AT failed locations. `packages` are some of
    those that failed locations touch, `lost_packages` some of those that lost or cut-off blobs touch.
    """

    count: int
    lost_count: int
    cut_off_count: int
    packages: tuple[str, ...]
    lost_packages: tuple[str, ...]


class ConditionReader(CatalogReader):
    """A connection for the questions of health."""

    def backend_ids(self) -> set[str]:
        """The backends that some location is in, those that are being emptied left out."""
        # One seek for each backend and status: DISTINCT would read all of the index.
        rows = self._rows(
            "WITH RECURSIVE statuses(status) AS (VALUES ('stored'), ('verified'), ('failed')), "
            "seek(status, id) AS (SELECT status, (SELECT min(backend_id) FROM storage_locations AS l "
            "  WHERE l.status = statuses.status) FROM statuses UNION ALL "
            "SELECT status, (SELECT min(backend_id) FROM storage_locations AS l "
            "  WHERE l.status = seek.status AND l.backend_id > seek.id) FROM seek WHERE id IS NOT NULL) "
            "SELECT DISTINCT id FROM seek WHERE id IS NOT NULL"
        )
        return {row[0] for row in rows}

    def oldest_proof_ns(self, backend_id: str) -> int:
        """When the good location that was verified or stored longest ago was; 0 when the backend has none."""
        row = self._one(
            "SELECT coalesce(min(max(stored_at_ns, verified_at_ns)), 0) FROM storage_locations "
            "WHERE backend_id = ? AND status IN ('stored', 'verified')",
            backend_id,
        )
        return int(row[0])

    def failed_locations(self, reachable: Collection[str]) -> FailedLocations:
        """The failed locations, and what they mean while only the backends `reachable` can be read."""
        count = self._one("SELECT count(*) FROM storage_locations WHERE status = 'failed'")[0]
        rows = self._rows(
            "SELECT blob_id, (SELECT json_group_array(backend_id) FROM storage_locations AS other "
            "WHERE other.blob_id = failed.blob_id AND other.status IN ('stored', 'verified')) FROM "
            "(SELECT DISTINCT blob_id FROM (SELECT blob_id FROM storage_locations WHERE status = 'failed' LIMIT ?)) "
            "AS failed ORDER BY blob_id",
            (FAILED_LOOKED_AT,),
        )
        lost = cut_off = 0
        touched: set[str] = set()
        gone: set[str] = set()
        for blob_id, good in list(rows):
            elsewhere = set(json.loads(good))
            unreadable = not elsewhere & set(reachable)
            if not unreadable and len(touched) > PACKAGES_LISTED:
                continue
            packages = packages_of(self._execute, blob_id, PACKAGES_LISTED + 1)
            touched.update(packages)
            if packages and unreadable:
                gone.update(packages[: PACKAGES_LISTED + 1 - len(gone)])
                lost += not elsewhere
                cut_off += bool(elsewhere)
        return FailedLocations(count, lost, cut_off, _some(touched), _some(gone))

    def sole_in(self, unreachable: Collection[str]) -> dict[str, frozenset[str]]:
        """Some packages, as NAME/VERSION, that were published to backends of `unreachable` alone, and to which.

        All that such a package has is there, its manifest at least nowhere else.
        """
        # Few routes, many packages: the backends of each route are compared once.
        routes = [row[0] for row in self._rows("SELECT DISTINCT backend_ids FROM packages")]
        found: dict[str, frozenset[str]] = {}
        for route in routes:
            backends = frozenset(json.loads(route))
            if backends <= set(unreachable):
                rows = self._rows(
                    "SELECT name || '/' || version FROM packages WHERE backend_ids = ? ORDER BY package_id LIMIT ?",
                    (route, PACKAGES_LISTED),
                )
                found |= {row[0]: backends for row in rows}
        return found


def _some(packages: set[str]) -> tuple[str, ...]:
    return tuple(sorted(packages)[:PACKAGES_LISTED])
