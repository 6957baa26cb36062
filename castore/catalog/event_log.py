"""Reading the stored events in order, from any point on, and noticing new ones cheaply. It never writes or deletes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from castore.catalog.reader import CatalogReader
from castore.catalog.records import rows_as_written
from castore.events import Event

_LATE_NS: Final = 600 * 10**9
"""An event's time is taken before its transaction, so an earlier row may have a later time: by less than this."""


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as the catalog has it; `sequence` ascends in the order of commits."""

    sequence: int
    event: Event


class EventReader(CatalogReader):
    """A connection that follows the events."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._seen_version = -1

    def has_news(self) -> bool:
        """Whether the catalog may have changed since this was last asked; true at first. Costs some microseconds."""
        # https://www.sqlite.org/pragma.html#pragma_data_version
        version = self._one("PRAGMA data_version")[0]
        known, self._seen_version = self._seen_version, version
        return bool(version != known)

    def last_sequence(self) -> int:
        """The sequence of the newest event that there ever was, 0 when there was none."""
        row = self._one("SELECT seq FROM sqlite_sequence WHERE name = 'events'")
        return 0 if row is None else int(row[0])

    def newest_event(self) -> tuple[int, str] | None:
        """Sequence and id of the newest event that is kept."""
        row = self._one("SELECT sequence, event_id FROM events ORDER BY sequence DESC LIMIT 1")
        return None if row is None else (int(row[0]), str(row[1]))

    def event_id(self, sequence: int) -> str:
        """The id of an event, '' when there is none of that sequence."""
        row = self._one("SELECT event_id FROM events WHERE sequence = ?", sequence)
        return "" if row is None else str(row[0])

    def first_sequence(self) -> int:
        """The sequence of the oldest event that is kept; when there is none, that of the next one to come."""
        row = self._one("SELECT min(sequence) FROM events")
        return self.last_sequence() + 1 if row[0] is None else int(row[0])

    def events_after(
        self, after: int, limit: int, *, event_type: str = "", since_ns: int = 0
    ) -> tuple[list[StoredEvent], int]:
        """Up to `limit` events behind the sequence `after`, of one type if given, none from before `since_ns`.

        Also the sequence to go on behind: that of the last event looked at, whether it was asked for or not.
        """
        last = self.last_sequence()
        rows = self._rows(
            "SELECT sequence, event_id, type, subject, time_ns, data FROM events WHERE sequence > ? AND sequence <= ? "
            "AND time_ns >= ? AND (? = '' OR type = ?) ORDER BY sequence LIMIT ?",
            (after, last, since_ns, event_type, event_type, limit),
        )
        with rows_as_written():
            found = [
                StoredEvent(
                    row[0], Event(type=row[2], subject=row[3], data=json.loads(row[5]), event_id=row[1], time_ns=row[4])
                )
                for row in rows
            ]
        return found, found[-1].sequence if len(found) == limit else max(after, last)

    def sequence_before(self, time_ns: int) -> int:
        """A sequence behind which every event from `time_ns` on is found, and few others."""
        low, high = 0, self.last_sequence()
        # Invariant: all events up to `low` are older. Sequences may have gaps: the next one at or above is looked at.
        while low < high:
            middle = (low + high + 1) // 2
            row = self._one(
                "SELECT sequence, time_ns FROM events WHERE sequence >= ? ORDER BY sequence LIMIT 1", middle
            )
            if row is not None and row[1] < time_ns - _LATE_NS:
                low = max(middle, row[0])
            else:
                high = middle - 1
        return low
