"""What repair asks of the catalog: failed locations, and which of them some bytes would mend. It never writes."""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection
from typing import Any, Final

from castore.catalog.reader import CatalogReader
from castore.catalog.records import LocationStatus, rows_as_written
from castore.catalog.scrub import LocationRow
from castore.digest import Digest

_ROW: Final = "SELECT blob_id, algorithm, digest, size_bytes, backend_id, stored_at_ns"


class RepairReader(CatalogReader):
    """A connection for one task of a repair."""

    def failed_after(self, backend_id: str, after: int, limit: int) -> list[LocationRow]:
        """Up to `limit` failed locations of a backend with a blob_id above `after`, ascending."""
        rows = self._rows(
            f"{_ROW} FROM storage_locations CROSS JOIN blobs USING (blob_id) "
            "WHERE status = 'failed' AND backend_id = ? AND blob_id > ? ORDER BY blob_id LIMIT ?",
            (backend_id, after, limit),
        )
        return [_location(row) for row in rows]

    def failed_location(self, backend_id: str, blob_id: int) -> LocationRow | None:
        """A location that is failed."""
        row = self._one(
            f"{_ROW} FROM storage_locations JOIN blobs USING (blob_id) "
            "WHERE blob_id = ? AND backend_id = ? AND status = 'failed'",
            blob_id,
            backend_id,
        )
        return None if row is None else _location(row)

    def failed_totals(self, backend_ids: Collection[str]) -> tuple[int, int]:
        """(locations, bytes) that are failed in some backends."""
        row = self._one(
            "SELECT count(*), coalesce(sum(size_bytes), 0) FROM storage_locations CROSS JOIN blobs USING (blob_id) "
            "WHERE status = 'failed' AND backend_id IN (SELECT value FROM json_each(?))",
            json.dumps(list(backend_ids)),
        )
        return row[0], row[1]

    def failed_sizes(self, backend_ids: Collection[str]) -> array[int]:
        """Every size of a blob that is failed in one of the backends, ascending. 8 bytes for each."""
        rows = self._rows(
            "SELECT DISTINCT size_bytes FROM storage_locations CROSS JOIN blobs USING (blob_id) "
            "WHERE status = 'failed' AND backend_id IN (SELECT value FROM json_each(?)) ORDER BY size_bytes",
            (json.dumps(list(backend_ids)),),
        )
        return array("q", (row[0] for row in rows))

    def failed_with(self, raw: bytes, backend_ids: Collection[str]) -> list[LocationRow]:
        """The failed locations in some backends of what has that raw digest, as a blob or as a manifest."""
        rows = self._rows(
            f"{_ROW} FROM blobs CROSS JOIN storage_locations USING (blob_id) "
            "WHERE digest = ? AND status = 'failed' AND backend_id IN (SELECT value FROM json_each(?))",
            (raw, json.dumps(list(backend_ids))),
        )
        return [_location(row) for row in rows]


def _location(row: Any) -> LocationRow:
    with rows_as_written():
        return LocationRow(row[0], Digest(row[1], row[2]), row[3], row[4], LocationStatus.FAILED, row[5])
