"""Where a reader of events begins, and events as CloudEvents documents: alike for the command line and HTTP."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from castore.catalog.event_log import EventReader, StoredEvent
from castore.config_values import parse_duration
from castore.events import cloud_event

SINCE_RULE: Final = 'a sequence number, a time such as "2026-01-31T12:00Z", or a duration such as "1h"'

_NS: Final = 10**9
_INTEGER_MAX: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Start:
    """Events behind the sequence `after`, none from before `since_ns`."""

    after: int
    since_ns: int = 0


def parse_start(reader: EventReader, since: str) -> Start:
    """What `since` means, by SINCE_RULE. Raises ValueError for anything else.

    A sequence is that of the last event that is known already; a time without a zone is local.
    """
    if since.isascii() and since.isdigit() and len(since) <= 20:
        return Start(min(int(since), _INTEGER_MAX))
    try:
        since_ns = time.time_ns() - round(parse_duration(since) * _NS)
    except ValueError:
        try:
            since_ns = round(datetime.fromisoformat(since).timestamp() * _NS)
        except (OverflowError, OSError) as exc:
            raise ValueError("not a time") from exc
    since_ns = max(0, min(since_ns, _INTEGER_MAX))
    return Start(reader.sequence_before(since_ns), since_ns)


def document(stored: StoredEvent, source: str) -> dict[str, Any]:
    """The CloudEvents document of a stored event; `source` is the catalog's id."""
    return cloud_event(stored.event, source=source, sequence=stored.sequence)
