"""Inode numbers for new entries, leased from the catalog in ranges. Nothing else is numbered here."""

from __future__ import annotations

from typing import Final

import trio

from castore.catalog.writer import CatalogWriter
from castore.errors import CatalogBusy

LEASE: Final = 1 << 20
"""Numbers taken at a time: a million creates per durable commit, out of 2^61."""


class InodeNumbers:
    """Hands out numbers that are unique over the whole store and all its processes."""

    def __init__(self, writer: CatalogWriter) -> None:
        self._writer = writer
        self._next = 0
        self._end = 0
        self._low = trio.Event()

    async def refill(self) -> None:
        """Take a new range when less than half a lease is left. Raises CatalogBusy or StateError."""
        if self._end - self._next > LEASE // 2:
            return
        # A leftover of the old range is dropped: ranges need not be adjacent.
        start = await self._writer.run(lambda transaction: transaction.lease_inodes(LEASE))
        self._next, self._end = start, start + LEASE
        self._low = trio.Event()

    def take(self) -> int:
        """The next number. Raises CatalogBusy when the lease ran out because the catalog cannot be written."""
        if self._next >= self._end:
            raise CatalogBusy("no inode numbers are left because the catalog cannot be written; try again")
        self._next += 1
        if self._end - self._next <= LEASE // 2:
            self._low.set()
        return self._next - 1

    async def wanted(self) -> None:
        """Until it is time for `refill`."""
        await self._low.wait()
