"""Every stored event against the schema of its type in docs/events/. Used after each test that made a catalog."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from castore.api.event_feed import document
from castore.catalog.event_log import EventReader
from castore.errors import CastoreError

SCHEMAS = Path(__file__).resolve().parents[1] / "docs/events"
_PAGE_EVENTS = 1000


@cache
def validator(event_type: str) -> Draft202012Validator:
    """The schema of a type, itself checked. Raises FileNotFoundError when the type has none."""
    schema = json.loads((SCHEMAS / f"{event_type}.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def check_event(event: dict[str, Any]) -> None:
    """Raise ValidationError unless a CloudEvents document is as its schema says."""
    validator(event["type"]).validate(event)


def check_catalog(path: Path) -> int:
    """Check every event of a catalog; returns how many there are."""
    count = after = 0
    with EventReader(path) as reader:
        source = reader.catalog_id()
        while True:
            page, after = reader.events_after(after, _PAGE_EVENTS)
            for stored in page:
                check_event(document(stored, source))
            count += len(page)
            if len(page) < _PAGE_EVENTS:
                return count


def catalogs_below(root: Path) -> Iterator[Path]:
    """Every catalog that a test left below its folder, those aside that it spoilt on purpose."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not os.path.ismount(os.path.join(folder, name))]
        if "catalog.db" in files:
            with suppress(CastoreError):
                with EventReader(Path(folder, "catalog.db")) as reader:
                    reader.last_sequence()
                yield Path(folder, "catalog.db")
