"""Fetches small files ahead of those who read a tree file by file, beside the reads. Which ones is decided elsewhere.

Reads only leave a note here: the catalog is asked, and flights begin, in a task of its own, after they are answered.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Final

import trio

from castore.blobs.flights import Flights
from castore.blobs.memory import KnownBlob, Span
from castore.blobs.siblings import (
    SIBLING_BYTES,
    WINDOW_MAX_FILES,
    Following,
    Place,
    Probes,
    Sibling,
    Stretch,
)
from castore.catalog.records import Blob
from castore.errors import CastoreError

STRETCHES_MAX: Final = 32
"""Places in trees that are read file by file at a time; beyond it, the one that was not read for longest goes."""

STRETCH_SECONDS: Final = 2.0
"""Without a read for so long, a stretch ends, and what was fetched for it counts as unread: others need the room."""

SIBLING_GETS: Final = 16
"""Files on their way that nobody waits for yet."""

_LISTED: Final = 2 * WINDOW_MAX_FILES
"""Files that are asked for at a time, once a stretch is read one after the other."""

_LISTED_FIRST: Final = 8
"""And at its beginning: enough to see whether the next files are those that are read next, by several processes too."""

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Reading:
    """A stretch and what was sent for of it and is not read, by rank."""

    stretch: Stretch
    ahead: dict[int, Span] = field(default_factory=dict)
    used_at: float = 0.0
    is_stream: bool = False


class SiblingFlights:
    """Watches reads of small files and sends for those that come next. `run` has to run for it to do anything.

    `known_of` gives the spans of a blob.
    """

    def __init__(self, flights: Flights, following: Following, known_of: Callable[[Blob], KnownBlob]) -> None:
        self._flights = flights
        self._following = following
        self._known_of = known_of
        self._probes = Probes()
        self._read_count = 0
        self._readings: OrderedDict[_Reading, None] = OrderedDict()
        """The one that was read last comes last."""
        self._owner: dict[int, _Reading] = {}
        """By the numbers of its files."""
        self._flying: list[Span] = []
        self._asked: deque[Callable[[], None]] = deque()
        self._has_work = trio.Event()

    def read(self, place: Place, waited: bool, fetched: bool) -> None:
        """A file was read for the first time by some handle. `waited`: it was not in memory yet; `fetched`: what of it
        is in memory came from a backend.
        """
        self._read_count += 1
        reading = self._owner.get(place.number)
        if reading is None:
            if waited and fetched:
                self._begin(place)
            return
        stretch = reading.stretch
        rank = stretch.rank(place.number)
        reading.ahead.pop(rank, None)
        reading.used_at = trio.current_time()
        self._readings.move_to_end(reading)
        window = stretch.observe(rank, self._read_count, fetched=fetched)
        if window:
            self._ask(lambda: self._refill(reading, rank, window))
        elif stretch.is_in_doubt and waited and fetched:
            self._begin(place, reading)

    async def run(self) -> None:
        """Do what reads ask for, until cancelled."""
        try:
            while True:
                with trio.move_on_after(STRETCH_SECONDS if self._readings else inf):
                    await self._has_work.wait()
                self._has_work = trio.Event()
                self._end_idle()
                while self._asked:
                    self._asked.popleft()()
                    await trio.lowlevel.checkpoint()
        finally:
            while self._readings:
                self._end(next(iter(self._readings)))

    def _ask(self, work: Callable[[], None]) -> None:
        self._asked.append(work)
        self._has_work.set()

    def _begin(self, place: Place, doubtful: _Reading | None = None) -> None:
        """Perhaps, a stretch begins with this file: as far as its place in the one at hand has proved nothing."""
        order = self._probes.next_order()
        if order is None or (doubtful is not None and doubtful.stretch.order is order):
            return
        reading = _Reading(Stretch(place, order, self._read_count), used_at=trio.current_time())
        self._ask(lambda: self._list_first(reading, place))

    def _list_first(self, reading: _Reading, place: Place) -> None:
        while len(self._readings) >= STRETCHES_MAX:
            self._end(next(iter(self._readings)))
        self._readings[reading] = None
        self._owner[place.number] = reading
        self._list(reading, _LISTED_FIRST)

    def _list(self, reading: _Reading, limit: int) -> None:
        """Ask for the files after the last one, up to one that somebody else reads on from."""
        stretch = reading.stretch
        try:
            following = self._following(stretch.last, stretch.order, limit, SIBLING_BYTES)
        except CastoreError as exc:
            _log.debug("nothing is fetched ahead: %s", exc)  # what is wrong with the catalog is said by its readers
            following = []
        stretch.is_whole = len(following) < limit
        for sibling in following:
            owner = self._owner.get(sibling.place.number)
            if owner is not None and (owner is reading or owner.stretch.is_sequential):
                stretch.is_whole = True
                return
            self._owner[sibling.place.number] = reading
            stretch.add(sibling)

    def _refill(self, reading: _Reading, rank: int, window: int) -> None:
        """Send for what is missing of the files after one."""
        if reading not in self._readings:
            return
        stretch, flights = reading.stretch, self._flights
        if not reading.is_stream:
            self._probes.worked(stretch.order)
            reading.is_stream = True
            flights.streams += 1
        if any(_is_temporary(span) for span in reading.ahead.values()):
            stretch.reset()
            self._give_up(reading, list(reading.ahead))
            return
        for number in stretch.forget_behind(rank):
            if self._owner.get(number) is reading:
                del self._owner[number]
        self._give_up(reading, [number for number in reading.ahead if number < stretch.first])
        if rank + window >= stretch.end and not stretch.is_whole:
            self._list(reading, _LISTED)
        self._flying = [span for span in self._flying if not span.done.is_set()]
        for number, sibling in list(stretch.next_files(rank, window)):
            if not self._send(reading, number, sibling):
                break

    def _send(self, reading: _Reading, rank: int, sibling: Sibling) -> bool:
        """Send for a file, unless it is there. False when there is no room."""
        flights, known = self._flights, self._known_of(sibling.blob)
        if 0 in known.spans:
            reading.stretch.take(rank)
            return True
        blocks = -(-known.size_bytes // known.block_size)
        needed = blocks * known.block_size
        ahead = sum(span.end for span in reading.ahead.values()) * known.block_size
        if len(self._flying) >= SIBLING_GETS or flights.room_bytes() < needed or flights.share_bytes() < ahead + needed:
            return False
        span = flights.start(sibling.blob, known, 0, blocks, prefetched=True)
        flights.stats.prefetched += blocks
        reading.stretch.take(rank)
        reading.ahead[rank] = span
        self._flying.append(span)
        return True

    def _give_up(self, reading: _Reading, ranks: list[int]) -> None:
        for rank in ranks:
            self._flights.memory.give_up(reading.ahead.pop(rank))

    def _end_idle(self) -> None:
        before = trio.current_time() - STRETCH_SECONDS
        while self._readings and next(iter(self._readings)).used_at < before:
            self._end(next(iter(self._readings)))

    def _end(self, reading: _Reading) -> None:
        del self._readings[reading]
        for number in reading.stretch.numbers():
            if self._owner.get(number) is reading:
                del self._owner[number]
        self._give_up(reading, list(reading.ahead))
        if reading.is_stream:
            self._flights.streams -= 1


def _is_temporary(span: Span) -> bool:
    return isinstance(span.error, CastoreError) and span.error.temporary
