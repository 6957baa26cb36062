"""How the small files of a tree are read, and which of them that makes worth fetching ahead. No bytes, no packages.

Files are read in the order of their numbers, as `find` and `tar` do, or in that of their names, as a shell's `*` does.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from castore.catalog.records import Blob

SIBLING_BYTES: Final = 256 * 1024
"""The largest file that is fetched for its siblings' sake. With 5 ms from request to answer, one reader is 2 to 3 times
as fast with files of up to this size. A larger one is read in several requests, and what takes time is its bytes."""

WINDOW_MIN_FILES: Final = 4
WINDOW_MAX_FILES: Final = 32
"""A reader gets as many files ahead as it has read of late, within these: at most half of what is fetched is wasted."""

_SEQUENTIAL: Final = 2
"""The score from which files are read one after the other: with the third file in a row."""

_SCORE_MAX: Final = 3
"""So that one stray read ends nothing, and two do; several processes that share a list read a little out of order."""

_LATELY: Final = 64
"""Reads of small files, whoever made them, after which a file does not count as just read any more. So many processes
may read side by side; and who reads half of a folder at random comes upon the neighbours of files that it read before.
"""

_DRY: Final = 8
"""Files in a row that no backend had to give, after which nothing is fetched ahead until one has to again."""

_BEHIND: Final = 2 * WINDOW_MAX_FILES
"""Files behind the foremost one that are remembered. What was fetched and is not read by then is given up."""

_PROBES_BY_ORDER: Final = 4
_PROBES_MAX: Final = 16
"""Reads in a row that may begin a stretch, though none was followed by its next file: for as many processes that read
side by side. In between, the other order is tried. Beyond it, only each _PROBES_MAX-th read may."""


class Order(enum.Enum):
    """In which order files follow each other."""

    NUMBER = enum.auto()
    NAME = enum.auto()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file is: its folder, and its number and name, by which it is ordered there."""

    folder: int
    number: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Sibling:
    """A file that follows another one."""

    place: Place
    blob: Blob


Following = Callable[[Place, Order, int, int], list[Sibling]]
"""`following(place, order, limit, largest_bytes)`: the files that follow one, none of them empty or larger: about
`limit` of them, those of its folder, then those of the next folders. Asked once for many files. Fewer than `limit`: no
more follow. Raises StateError."""


class Stretch:
    """Files that follow each other, as far as is known, by rank; and which of them were read.

    The first one was the read number `at` of all reads.
    """

    __slots__ = ("_dry", "_numbers", "_ranks", "_read", "_score", "_waiting", "first", "is_whole", "last", "order")

    def __init__(self, first: Place, order: Order, at: int) -> None:
        self.order = order
        self.last = first
        self.is_whole = False
        """Whether nothing follows `last`."""
        self.first = 0
        """The lowest rank that is remembered."""
        self._numbers = deque([first.number])
        self._ranks = {first.number: 0}
        self._read = {0: at}
        self._waiting: dict[int, Sibling] = {}
        self._score = 0
        self._dry = 0

    @property
    def end(self) -> int:
        """The rank after the last one."""
        return self.first + len(self._numbers)

    @property
    def is_sequential(self) -> bool:
        """Whether the reads of late follow each other."""
        return self._score >= _SEQUENTIAL

    @property
    def is_in_doubt(self) -> bool:
        """Whether no reads of late follow each other."""
        return not self._score

    def add(self, sibling: Sibling) -> None:
        """The file after the last one."""
        self._waiting[self.end] = sibling
        self._ranks[sibling.place.number] = self.end
        self._numbers.append(sibling.place.number)
        self.last = sibling.place

    def rank(self, number: int) -> int:
        """Of a file of this stretch."""
        return self._ranks[number]

    def reset(self) -> None:
        """Prefetch has to be earned anew."""
        self._score = 0

    def observe(self, rank: int, at: int, *, fetched: bool) -> int:
        """Note the read number `at`, and whether a backend gave the bytes. Returns how many files after it are worth
        having: 0 for a stray, while the reads are not sequential, and where no backend is asked.
        """
        self._waiting.pop(rank, None)
        if rank in self._read:
            return 0
        touches = at - max(self._read.get(rank - 1, -_LATELY), self._read.get(rank + 1, -_LATELY)) < _LATELY
        self._read[rank] = at
        self._score = min(self._score + 1, _SCORE_MAX) if touches else max(self._score - 1, 0)
        self._dry = 0 if fetched else self._dry + 1
        if not touches or not self.is_sequential or self._dry >= _DRY:
            return 0
        lately = sum(1 for number in range(rank - WINDOW_MAX_FILES + 1, rank + 1) if number in self._read)
        return max(lately, WINDOW_MIN_FILES)

    def next_files(self, rank: int, window: int) -> Iterator[tuple[int, Sibling]]:
        """Those of the `window` files after one that are neither read nor taken."""
        for number in range(rank + 1, min(rank + 1 + window, self.end)):
            sibling = self._waiting.get(number)
            if sibling is not None:
                yield number, sibling

    def take(self, rank: int) -> None:
        """The file is sent for, or need not be."""
        del self._waiting[rank]

    def forget_behind(self, rank: int) -> list[int]:
        """Forget what lies far behind; the numbers of these files. Ranks stay as they are."""
        numbers: list[int] = []
        while self.first < rank - _BEHIND:
            number = self._numbers.popleft()
            del self._ranks[number]
            self._read.pop(self.first, None)
            self._waiting.pop(self.first, None)
            self.first += 1
            numbers.append(number)
        return numbers

    def numbers(self) -> list[int]:
        """Of all its files."""
        return list(self._numbers)


class Probes:
    """Which reads may begin a stretch, and in which order: less often as long as it comes to nothing."""

    __slots__ = ("_order", "_tries")

    def __init__(self) -> None:
        self._order = Order.NUMBER
        self._tries = 0

    def next_order(self) -> Order | None:
        """The order to ask for at this read; None: nothing is asked for."""
        self._tries += 1
        turn = (self._tries - 1) // _PROBES_BY_ORDER
        if self._tries > _PROBES_MAX:
            turn, rest = divmod(self._tries, _PROBES_MAX)
            if rest:
                return None
        other = Order.NAME if self._order is Order.NUMBER else Order.NUMBER
        return other if turn % 2 else self._order

    def worked(self, order: Order) -> None:
        """Files are read one after the other in this order."""
        self._order = order
        self._tries = 0
