"""The entries of a package with their paths, and what a package shares with others. It never writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from castore.catalog.reader import CatalogReader
from castore.catalog.records import Entry, Kind, LocationStatus, foreign_row, rows_as_written

_PAGE_ENTRIES: Final = 1000
"""Entries fetched by one query: keeps memory flat in a directory of any size."""

_BLOBS: Final = """
WITH RECURSIVE folder(inode) AS (
    SELECT :root UNION
    SELECT entries.inode FROM folder JOIN entries ON entries.parent_id = folder.inode WHERE kind = 1
), used(blob_id, name_count) AS (
    SELECT blob_id, count(*) FROM folder JOIN entries ON entries.parent_id = folder.inode
    WHERE blob_id <> 0 GROUP BY blob_id
)
"""


@dataclass(frozen=True, slots=True)
class Shared:
    """The blobs of a package: `blob_bytes` once each, and what of them other packages have, too."""

    blob_count: int
    blob_bytes: int
    shared_count: int
    shared_bytes: int


class TreeReader(CatalogReader):
    """A connection for commands that look at whole packages."""

    def walk(self, root_id: int) -> Iterator[tuple[bytes, Entry]]:
        """Every entry below a directory with its path, a directory before what is in it. Memory grows with depth.

        Raises StateError for a tree that is none: a directory with two names, or one inside of itself, has no end.
        """
        # One page of children for each directory on the way down.
        pending = [(b"", self._children(root_id))]
        while pending:
            prefix, children = pending[-1]
            entry = next(children, None)
            if entry is None:
                pending.pop()
                continue
            if entry.kind is Kind.DIRECTORY and (entry.inode != entry.entry_id or entry.inode == root_id):
                raise foreign_row(f"the directory {entry.entry_id} has another place, too")
            yield prefix + entry.name, entry
            if entry.kind is Kind.DIRECTORY:
                pending.append((prefix + entry.name + b"/", self._children(entry.inode)))

    def _children(self, parent_id: int) -> Iterator[Entry]:
        after = 0
        while page := self.children(parent_id, after, _PAGE_ENTRIES):
            yield from page
            after = page[-1].entry_id

    def shared(self, root_id: int) -> Shared:
        """How much of a package is stored once for several: names outside of it have the same blob."""
        rows = self._rows(
            f"{_BLOBS} SELECT count(*), coalesce(sum(size_bytes), 0), count(*) FILTER (WHERE is_shared), "
            "coalesce(sum(size_bytes) FILTER (WHERE is_shared), 0) FROM ("
            "  SELECT size_bytes, (SELECT count(*) FROM entries WHERE entries.blob_id = used.blob_id "
            "    AND entries.blob_id <> 0) > used.name_count AS is_shared "
            "  FROM used JOIN blobs USING (blob_id))",
            {"root": root_id},
        )
        return Shared(*next(rows))

    def location_states(self, root_id: int, manifest_blob_id: int) -> list[tuple[str, LocationStatus, int, int]]:
        """(backend_id, status, locations, bytes) of a package's blobs, its manifest among them."""
        rows = self._rows(
            f"{_BLOBS} SELECT backend_id, status, count(*), sum(size_bytes) FROM "
            "(SELECT blob_id FROM used UNION SELECT :manifest) JOIN storage_locations USING (blob_id) "
            "JOIN blobs USING (blob_id) GROUP BY backend_id, status ORDER BY backend_id, status",
            {"root": root_id, "manifest": manifest_blob_id},
        )
        with rows_as_written():
            return [(row[0], LocationStatus(row[1]), row[2], row[3]) for row in rows]
