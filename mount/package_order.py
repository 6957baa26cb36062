"""Which files of a package come after one: for what is fetched ahead of its reader. Reads the catalog, fetches nothing.

The files of a folder come before its folders, each of those with all that is below it; as `os.walk` goes.
"""

from __future__ import annotations

from typing import Final

from castore.blobs.siblings import Order, Place, Sibling
from castore.catalog.reader import CatalogReader

FOLDERS_MAX: Final = 16
"""Folders that are looked through for one answer: some 30 microseconds each."""

ROWS_MAX: Final = 1024
"""Entries that are looked at for one answer, where most are large files or no files: a millisecond."""


class PackageOrder:
    """The order of the files in packages, as a `castore.blobs.siblings.Following`."""

    def __init__(self, catalog: CatalogReader) -> None:
        self._catalog = catalog

    def following(self, place: Place, order: Order, limit: int, largest_bytes: int) -> list[Sibling]:
        """About `limit` files of 1 to `largest_bytes` after a place, in its folder and in the next ones.

        Fewer where the package ends, or nothing is found in the next folders. Raises StateError.
        """
        by_name = order is Order.NAME
        folder, after = place.folder, place.name if by_name else place.number
        found: list[Sibling] = []
        seen = 0
        for _ in range(FOLDERS_MAX):
            while rows := self._catalog.files_after(folder, after, limit, largest_bytes):
                seen += len(rows)
                found += [Sibling(Place(folder, number, name), blob) for number, name, blob in rows if blob is not None]
                if len(found) >= limit or seen >= ROWS_MAX:
                    return found
                after = rows[-1][1] if by_name else rows[-1][0]
            following = self._next_folder(folder, by_name=by_name)
            if following is None:
                break
            folder, after = following, b"" if by_name else 0
        return found

    def _next_folder(self, folder: int, *, by_name: bool) -> int | None:
        """The first one below it, or the next one beside it or beside one above it."""
        below = self._catalog.directory_after(folder, b"" if by_name else 0)
        entry = self._catalog.entry(folder)
        while below is None and entry is not None:
            above = self._catalog.entry(entry.parent_id)
            if above is None:
                return None  # it is the package itself: beside it are other versions
            below = self._catalog.directory_after(above.inode, entry.name if by_name else entry.entry_id)
            entry = above
        return below
