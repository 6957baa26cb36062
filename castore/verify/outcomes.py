"""What a scrub found of each location, and its sums. No behaviour."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from castore.catalog.scrub import LocationRow
from castore.verify.reading import Reading


class Verdict(enum.StrEnum):
    """What became of one location."""

    VERIFIED = "verified"
    FAILED = "failed"
    CHANGED = "changed"
    """It was put anew, deleted or judged by others while it was read: nothing is recorded."""
    UNREACHABLE = "unreachable"
    """The backend did not give the object, nor say that it is missing: nothing is recorded."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One location, after it was looked at. `event` is the data of the event that was stored, None when none was."""

    row: LocationRow
    verdict: Verdict
    reading: Reading | None
    error: str
    duration_ms: int
    event: dict[str, Any] | None = None
    is_temporary: bool = False
    """Of an unreachable one: whether it may be there later."""


@dataclass(slots=True)
class Tally:
    """What a scrub has done so far; counts of locations, and bytes."""

    total_count: int | None = None
    """All that were chosen, once they have been counted."""
    total_bytes: int | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(map(str, Verdict), 0))
    """Locations by their verdict."""
    read_bytes: int = 0
    """Bytes that were read and hashed, those read a second time among them."""
    stopped: dict[str, str] = field(default_factory=dict)
    """Why a backend was given up, by its id."""

    @property
    def done_count(self) -> int:
        """Locations that were looked at."""
        return sum(self.counts.values())
