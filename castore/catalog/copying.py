"""What replicate asks of the catalog: which blobs one backend has and another lacks. It never writes."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from castore.catalog.reader import CatalogReader
from castore.catalog.records import LocationStatus, rows_as_written
from castore.catalog.scrub import LocationRow
from castore.catalog.uses import FILES_BELOW
from castore.digest import MANIFEST_ALGORITHM, Digest

_SLICES: Final = 256
"""Queries that count all there is to copy, one after the other, so that a Ctrl-C is heard."""
_PAGE: Final = 1000
"""Rows counted by one query of a package."""

# What is being deleted in the target is left alone: whoever deletes it has proven that nothing needs it.
_COPYABLE: Final = """
FROM storage_locations AS here JOIN blobs USING (blob_id)
WHERE here.backend_id = :source AND here.status IN ('stored', 'verified') AND NOT EXISTS (
    SELECT 1 FROM storage_locations AS there WHERE there.blob_id = here.blob_id AND there.backend_id = :target
    AND there.status IN ('stored', 'verified', 'deleting'))
"""
_IN_A_FILE: Final = "EXISTS (SELECT 1 FROM entries WHERE entries.blob_id = here.blob_id AND entries.blob_id <> 0)"
_A_MANIFEST: Final = (
    "(EXISTS (SELECT 1 FROM packages WHERE manifest_blob_id = here.blob_id) "
    "OR EXISTS (SELECT 1 FROM deleted_packages WHERE manifest_blob_id = here.blob_id))"
)
_ROW: Final = "SELECT here.blob_id, algorithm, digest, size_bytes, status, stored_at_ns"

_PACKAGE: Final = "SELECT package_id, name || '/' || version, root_id, manifest_blob_id FROM packages"


@dataclass(frozen=True, slots=True)
class PackageCopy:
    """A package that is to be whole in a further backend, as its row says."""

    package_id: int
    ref: str
    root_id: int
    manifest_blob_id: int


class CopyReader(CatalogReader):
    """A connection for one task of a replication from the backend `source` to the backend `target`.

    What is copyable: good locations in `source` of blobs that packages need and `target` lacks. All of them, or those
    of one package.
    """

    def hold(self) -> None:
        """See the catalog as it is now, until `let_go` or `close`: meanwhile it cannot be tidied up."""
        self._execute("BEGIN")
        self._one("SELECT only FROM catalog_info")

    def let_go(self) -> None:
        """See every commit again."""
        self._execute("COMMIT")

    def copyable(
        self, source: str, target: str, package: PackageCopy | None, limit: int, *, manifests: bool
    ) -> Iterator[list[LocationRow]]:
        """The copyable locations of files, or those of manifests, in order of blob_id, up to `limit` at a time.

        Each page is asked for when it is wanted. One package costs 8 bytes for each of its files.
        """
        if package is not None:
            blob_ids = array("q", [package.manifest_blob_id]) if manifests else self._file_blobs(package)
            for first in range(0, len(blob_ids), limit):
                yield self._copyable_among(source, target, blob_ids[first : first + limit])
            return
        after = 0
        while page := self._copyable_after(source, target, after, limit, manifests):
            yield page
            after = page[-1].blob_id

    def copyable_totals(self, source: str, target: str, package: PackageCopy | None) -> Iterator[tuple[int, int]]:
        """(locations, bytes) of all that is copyable, files and manifests, in parts to be added up."""
        if package is not None:
            for manifests in (False, True):
                for page in self.copyable(source, target, package, _PAGE, manifests=manifests):
                    yield len(page), sum(row.size_bytes for row in page)
            return
        most = self._one("SELECT coalesce(max(blob_id), 0) FROM blobs")[0]
        step = most // _SLICES + 1
        for low in range(0, most + 1, step):
            rows = self._rows(
                f"SELECT count(*), coalesce(sum(size_bytes), 0) {_COPYABLE} AND here.blob_id >= :low "
                f"AND here.blob_id < :high AND ({_IN_A_FILE} OR {_A_MANIFEST})",
                {"source": source, "target": target, "low": low, "high": low + step},
            )
            yield from ((row[0], row[1]) for row in rows)

    def _copyable_after(self, source: str, target: str, after: int, limit: int, manifests: bool) -> list[LocationRow]:
        kind = "=" if manifests else "<>"
        # A blob that is in no package is staged and not published, or waits to be deleted.
        rows = self._rows(
            f"{_ROW} {_COPYABLE} AND here.blob_id > :after AND algorithm {kind} :manifest "
            f"AND {_A_MANIFEST if manifests else _IN_A_FILE} ORDER BY here.blob_id LIMIT :limit",
            {"source": source, "target": target, "after": after, "limit": limit, "manifest": MANIFEST_ALGORITHM},
        )
        return [_location(row, source) for row in rows]

    def _copyable_among(self, source: str, target: str, blob_ids: Iterable[int]) -> list[LocationRow]:
        rows = self._rows(
            f"{_ROW} {_COPYABLE} AND here.blob_id IN (SELECT value FROM json_each(:ids)) ORDER BY here.blob_id",
            {"source": source, "target": target, "ids": json.dumps(list(blob_ids))},
        )
        return [_location(row, source) for row in rows]

    def _file_blobs(self, package: PackageCopy) -> array[int]:
        return array("q", (row[0] for row in self._rows(FILES_BELOW, {"root": package.root_id})))

    # packages

    def package_copy(self, name: str, version: str) -> PackageCopy | None:
        """One package; `latest` is the version published last."""
        package = self.package(name, version)
        if package is None:
            return None
        row = self._one(f"{_PACKAGE} WHERE package_id = ?", package.package_id)
        return PackageCopy(*row)

    def packages_not_in(self, source: str, target: str, after: int, limit: int) -> list[PackageCopy]:
        """Up to `limit` packages of the backend `source` that count as not stored in `target`; by package_id."""
        rows = self._rows(
            f"{_PACKAGE} WHERE package_id > ? AND EXISTS (SELECT 1 FROM storage_locations AS location "
            "  WHERE location.blob_id = manifest_blob_id AND backend_id = ?) "
            "AND NOT EXISTS (SELECT 1 FROM json_each(backend_ids) WHERE value = ?) ORDER BY package_id LIMIT ?",
            (after, source, target, limit),
        )
        return [PackageCopy(*row) for row in rows]

    def lacking_count(self, package: PackageCopy, target: str) -> int:
        """How many blobs of a package, its manifest among them, have no good location in `target`."""
        row = self._rows(
            f"SELECT count(*) FROM ({FILES_BELOW} UNION SELECT :manifest) AS needed WHERE NOT EXISTS ("
            "  SELECT 1 FROM storage_locations AS there WHERE there.blob_id = needed.blob_id "
            "  AND backend_id = :target AND status IN ('stored', 'verified'))",
            {"root": package.root_id, "manifest": package.manifest_blob_id, "target": target},
        )
        return int(next(row)[0])


def _location(row: Any, backend_id: str) -> LocationRow:
    with rows_as_written():
        return LocationRow(row[0], Digest(row[1], row[2]), row[3], backend_id, LocationStatus(row[4]), row[5])
