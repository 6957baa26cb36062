"""Events as frozen values, and their CloudEvents 1.0 form. Storing and delivering them is not done here."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

PACKAGE_PUBLISHED: Final = "v1.package.published"
LOCATION_STORED: Final = "v1.storage.location_stored"
"""A backend acknowledged a put: of what came in, or of a copy. The location is new, or was `failed`."""
PACKAGE_DELETED: Final = "v1.package.deleted"
"""It is hidden, and can be restored for a while."""
PACKAGE_RESTORED: Final = "v1.package.restored"
PACKAGE_PURGED: Final = "v1.package.purged"
"""A deleted package is gone for good."""
PACKAGE_TAGGED: Final = "v1.package.tagged"
"""A tag was set, moved or removed, or `latest` was pinned or let go."""
LOCATION_DELETED: Final = "v1.storage.location_deleted"
"""Garbage collection deleted an object, or its backend was retired: there is no such location any more."""
LOCATION_VERIFIED: Final = "v1.storage.location_verified"
"""A location was re-read whole and judged, good or bad."""
LOCATION_FAILED: Final = "v1.storage.location_failed"
"""A read met missing or wrong bytes in a location that counted as good."""
LOCATION_REPAIRED: Final = "v1.storage.location_repaired"
"""The right bytes were put over missing or wrong ones, and read back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, not yet stored. `subject` is a digest or a NAME/VERSION."""

    type: str
    subject: str
    data: dict[str, Any]
    event_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    time_ns: int = field(default_factory=time.time_ns)


def cloud_event(event: Event, *, source: str, sequence: int) -> dict[str, Any]:
    """The JSON object of CloudEvents 1.0 (https://github.com/cloudevents/spec). `source` names the catalog.

    `sequence` is that of the catalog's row; the extension attribute of that name orders by text as the number does.
    """
    seconds, nanos = divmod(event.time_ns, 1_000_000_000)
    stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{nanos // 1000:06d}Z"
    return {
        "specversion": "1.0",
        "id": event.event_id,
        "source": f"urn:castore:{source}",
        "type": event.type,
        "subject": event.subject,
        "time": stamp,
        "datacontenttype": "application/json",
        "sequence": f"{sequence:020d}",
        "data": event.data,
    }


def data_json(event: Event) -> str:
    """The `data` member as compact JSON, as the catalog stores it."""
    return json.dumps(event.data, separators=(",", ":"), sort_keys=True)
