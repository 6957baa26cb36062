"""What was delivered where, and which events may go. Sends nothing, and decides nothing of when.

A sink's row is made by whoever delivers first. All events up to its `sequence` are delivered there, or not wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from castore.catalog.event_log import EventReader
from castore.catalog.uses import Execute

PRUNE_EVENTS: Final = 2000
"""Events that one transaction takes away: some 20 ms of the write lock, which no publish notices."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How far a sink has come. `failing_since_ns` and `error` are those of attempts since; 0 and '' while all is well.

    `lost_count` events went undelivered, the last of them at `lost_at_ns`.
    """

    sink: str
    sequence: int
    delivered_at_ns: int
    failing_since_ns: int
    error: str
    lost_count: int
    lost_at_ns: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Events behind a sequence: how many, and the time of the first, 0 when there is none."""

    count: int
    oldest_ns: int


class DeliveryReader(EventReader):
    """A connection for whoever delivers events, or watches that."""

    def deliveries(self) -> dict[str, Delivery]:
        """The sinks that something was ever delivered to, by name."""
        rows = self._rows(
            "SELECT sink, sequence, delivered_at_ns, failing_since_ns, error, lost_count, lost_at_ns "
            "FROM event_deliveries ORDER BY sink"
        )
        return {row[0]: Delivery(*row) for row in rows}

    def waiting(self, after: int) -> Waiting:
        """What is behind a sequence. Costs the same for any number of events."""
        row = self._one("SELECT sequence, time_ns FROM events WHERE sequence > ? ORDER BY sequence LIMIT 1", after)
        # Nothing is taken out of the middle.
        return Waiting(0, 0) if row is None else Waiting(self.last_sequence() - row[0] + 1, row[1])


def begin_delivery(execute: Execute, sink: str, sequence: int) -> None:
    """Make a sink's row, unless it has one."""
    execute("INSERT OR IGNORE INTO event_deliveries VALUES (?, ?, 0, 0, '', 0, 0)", (sink, sequence))


def set_delivered(execute: Execute, sink: str, sequence: int, now_ns: int) -> None:
    """All up to `sequence` is delivered."""
    execute(
        "UPDATE event_deliveries SET sequence = max(sequence, ?), delivered_at_ns = ?, failing_since_ns = 0, "
        "error = '' WHERE sink = ?",
        (sequence, now_ns, sink),
    )


def set_failing(execute: Execute, sink: str, error: str, now_ns: int) -> None:
    """The last attempt failed."""
    execute(
        "UPDATE event_deliveries SET failing_since_ns = iif(failing_since_ns = 0, ?, failing_since_ns), error = ? "
        "WHERE sink = ?",
        (now_ns, error, sink),
    )


def keep_deliveries(execute: Execute, sinks: Collection[str]) -> None:
    """Forget all other sinks: one that is configured again begins anew."""
    for (sink,) in execute("SELECT sink FROM event_deliveries").fetchall():
        if sink not in sinks:
            execute("DELETE FROM event_deliveries WHERE sink = ?", (sink,))


def give_up(execute: Execute, upto: int, wanted: Mapping[str, Callable[[str], bool]], now_ns: int) -> dict[str, int]:
    """No sink waits for events up to `upto` any more; how many that it wanted each of them loses by it."""
    lost = {}
    for sink, wants in wanted.items():
        counts = execute(
            "SELECT type, count(*) FROM events WHERE sequence <= ? AND sequence > "
            "(SELECT sequence FROM event_deliveries WHERE sink = ?) GROUP BY type",
            (upto, sink),
        ).fetchall()
        count = sum(number for event_type, number in counts if wants(event_type))
        if counts:
            execute(
                "UPDATE event_deliveries SET sequence = ?, lost_count = lost_count + ?, "
                "lost_at_ns = iif(?, ?, lost_at_ns) WHERE sink = ?",
                (upto, count, count > 0, now_ns, sink),
            )
        if count:
            lost[sink] = count
    return lost


def prune_events(execute: Execute, upto: int) -> int:
    """Take away the oldest some thousand events up to `upto` that every sink has; how many there were."""
    cursor = execute(
        "DELETE FROM events WHERE sequence <= (SELECT max(sequence) FROM "
        "(SELECT sequence FROM events WHERE sequence <= min(:upto, "
        "  (SELECT coalesce(min(sequence), :upto) FROM event_deliveries)) ORDER BY sequence LIMIT :most))",
        {"upto": upto, "most": PRUNE_EVENTS},
    )
    return int(cursor.rowcount)
