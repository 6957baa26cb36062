"""A pulse that wakes everyone who waits, and is forgotten at once. It carries no value."""

from __future__ import annotations

import trio


class Signal:
    """`wait` returns at the next `pulse`. Look at the state first, then wait, with no checkpoint in between."""

    def __init__(self) -> None:
        self._waiting = trio.lowlevel.ParkingLot()

    def pulse(self) -> None:
        """Wake everyone."""
        self._waiting.unpark_all()

    async def wait(self) -> None:
        """Until the next pulse."""
        await self._waiting.park()
