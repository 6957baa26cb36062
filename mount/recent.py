"""What was found below published versions lately: it never changes, so the catalog need not be asked again.

Numbers, names and attributes alone. Which blob a file is stays with the catalog: a blob's number may be given anew.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import pyfuse3

Child = tuple[int, bytes, pyfuse3.EntryAttributes]
"""(readdir cookie, name, attributes)."""

INODES_KEPT: Final = 16_384
"""Inodes that are known to be published: 2 MB."""
CHILDREN_KEPT: Final = 8_192
"""Entries of directories that are listed again without the catalog: 4 MB."""


class Recent:
    """Inodes and pages of listings, the oldest out first.

    An inode number is given out once, and a published one is never in ingest/ again. A page of a package that was
    deleted since is what the kernel has, too: nobody gets there who was not there before.
    """

    def __init__(self) -> None:
        self._inodes: dict[int, None] = {}
        self._pages: OrderedDict[tuple[int, int], list[Child]] = OrderedDict()
        self._children = 0

    def add(self, inode: int) -> None:
        """An inode was found below a published version."""
        self._inodes[inode] = None
        if len(self._inodes) > INODES_KEPT:
            del self._inodes[next(iter(self._inodes))]

    def __contains__(self, inode: int) -> bool:
        return inode in self._inodes

    def clear(self) -> None:
        """Another catalog is read from now on: its numbers may stand for other things."""
        self._inodes.clear()
        self._pages.clear()
        self._children = 0

    def page(self, inode: int, after: int) -> list[Child] | None:
        """A page of a directory, as it was kept."""
        page = self._pages.get((inode, after))
        if page is not None:
            self._pages.move_to_end((inode, after))
        return page

    def keep(self, inode: int, after: int, page: list[Child]) -> None:
        """Keep the entries of a directory that come after a cookie. An empty page counts as one entry."""
        replaced = self._pages.pop((inode, after), None)
        self._children += max(1, len(page)) - (0 if replaced is None else max(1, len(replaced)))
        self._pages[inode, after] = page
        while self._children > CHILDREN_KEPT:
            _, gone = self._pages.popitem(last=False)
            self._children -= max(1, len(gone))
