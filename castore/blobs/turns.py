"""Whose turn it is to be filled: the one bound on the memory of all flights together. Fetches nothing.

A flight waits for its turn before it has a buffer, in one line for each place that bytes come from: a backend that
hangs keeps nobody waiting who asks another one, or the disk cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio

from castore.blobs.buffers import Buffers

BUFFER_BYTES: Final = 160 * 1024 * 1024
"""Of all buffers: on their way, kept, waiting for the disk cache or to be taken by the kernel. With it the daemon stays
below 300 MB, however many read."""

LINE_BYTES: Final = 48 * 1024 * 1024
"""Of these, on their way from one place: what is prefetched, and half as much that somebody waits for; or what 32 gets
of 1 MiB need at a time, and half as much that waits for one of these."""


class Room(Protocol):
    """What is filled. `target` is None until it is its turn for the first time."""

    size_bytes: int
    target: memoryview | None


@dataclass(eq=False, slots=True)
class _Waiting:
    room: Room
    turn: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True)
class _Line:
    taken_bytes: int = 0
    waiting: deque[_Waiting] = field(default_factory=deque)


class Turns:
    """Gives turns, first come, first served in each line.

    A line that nobody is in the way of always moves on: whatever is held elsewhere, one flight of it has its turn. So
    no read waits for memory for ever, since every flight ends. `let_go` forgets something that is kept; False when
    nothing is.
    """

    def __init__(self, buffers: Buffers, let_go: Callable[[], bool]) -> None:
        self._buffers = buffers
        self._let_go = let_go
        self._lines: dict[str, _Line] = {}

    @property
    def is_waited_for(self) -> bool:
        """Whether some flight waits for its turn."""
        return any(line.waiting for line in self._lines.values())

    def spare_bytes(self) -> int:
        """What is left, with nothing let go."""
        return max(0, BUFFER_BYTES - self._buffers.used_bytes())

    async def enter(self, name: str, room: Room) -> None:
        """Wait for a turn in the line of that name; the room has a buffer then. `leave` has to follow."""
        if self.enter_nowait(name, room):
            return
        line, waiting = self._lines[name], _Waiting(room)
        line.waiting.append(waiting)
        try:
            await waiting.turn.wait()
        except trio.Cancelled:
            line.waiting.remove(waiting)  # whose turn has come is not cancelled here any more
            raise

    def enter_nowait(self, name: str, room: Room) -> bool:
        """As `enter`, when nobody has to wait for it; else False, and nothing has changed."""
        line = self._lines.get(name)
        if line is None:
            line = self._lines[name] = _Line()
        return not line.waiting and self._grant(line, room)

    def leave(self, name: str, room: Room) -> None:
        """The turn is over."""
        self._lines[name].taken_bytes -= room.size_bytes
        for line in self._lines.values():
            while line.waiting and self._grant(line, line.waiting[0].room):
                line.waiting.popleft().turn.set()

    def _grant(self, line: _Line, room: Room) -> bool:
        if line.taken_bytes and line.taken_bytes + room.size_bytes > LINE_BYTES:
            return False
        has_room = room.target is not None or self._makes_room(room.size_bytes)
        if line.taken_bytes and not has_room:
            return False
        if room.target is None:
            room.target = self._buffers.take(room.size_bytes)
        line.taken_bytes += room.size_bytes
        return True

    def _makes_room(self, size_bytes: int) -> bool:
        """Whether so many bytes more may be used, perhaps when what is kept goes."""
        while self._buffers.used_bytes() + size_bytes > BUFFER_BYTES:
            if not self._let_go():
                return False
        return True
