"""`castore events`: prints stored events, and those that come. Stores and delivers none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.output import format_time_ns, json_line, printable
from castore.cli.session import Session, common_options
from castore.errors import ConfigError

if TYPE_CHECKING:
    from castore.catalog.event_log import EventReader, StoredEvent
    from castore.events import Event

_POLL_SECONDS: Final = 0.25
"""Between two looks for new events: one costs some microseconds."""
_PAGE_EVENTS: Final = 500
_NS: Final = 10**9

SINCE_RULE: Final = 'a sequence number, a time such as "2026-01-31T12:00Z", or a duration such as "1h"'


@click.command("events")
@click.option(
    "--since",
    metavar="SEQ_OR_TIME",
    help=f"Only events behind this: {SINCE_RULE}.  [default: all; with --follow, new ones]",
)
@click.option("--follow", is_flag=True, help="Go on with events as they come, until interrupted.")
@click.option("--type", "event_type", metavar="TYPE", default="", help="Only events of this type.")
@click.option("--json", "as_json", is_flag=True, help="Print one CloudEvents document in a line for each event.")
@common_options
@click.pass_obj
def command(session: Session, since: str | None, follow: bool, event_type: str, as_json: bool) -> None:
    """Show what happened, in order: packages published, locations verified or failed."""
    from castore.catalog.event_log import EventReader
    from castore.events import cloud_event

    with EventReader(session.config().store.catalog_path) as reader:
        source = reader.catalog_id()
        after, since_ns = _start(reader, since, follow)
        for stored in _read(reader, after, since_ns, event_type, follow):
            if as_json:
                click.echo(json_line(cloud_event(stored.event, source=source, sequence=stored.sequence)))
            else:
                click.echo(_line(stored))


def _start(reader: EventReader, since: str | None, follow: bool) -> tuple[int, int]:
    """The sequence to begin behind, and the earliest time. Raises ConfigError."""
    from castore.config_values import parse_duration

    if since is None:
        return (reader.last_sequence() if follow else 0), 0
    if since.isascii() and since.isdigit() and len(since) <= 20:
        return min(int(since), 2**63 - 1), 0
    try:
        since_ns = time.time_ns() - round(parse_duration(since) * _NS)
    except ValueError:
        try:
            # Without a zone it is local time, as it is shown.
            since_ns = round(datetime.fromisoformat(since).timestamp() * _NS)
        except (ValueError, OverflowError, OSError) as exc:
            raise ConfigError(f"--since {since!r}: expected {SINCE_RULE}") from exc
    since_ns = max(-(2**63), min(since_ns, 2**63 - 1))
    return reader.sequence_before(since_ns), since_ns


def _read(reader: EventReader, after: int, since_ns: int, event_type: str, follow: bool) -> Iterator[StoredEvent]:
    while True:
        if reader.has_news():
            found = None
            while found is None or len(found) == _PAGE_EVENTS:
                found, after = reader.events_after(after, _PAGE_EVENTS, event_type=event_type, since_ns=since_ns)
                yield from found
        if not follow:
            return
        time.sleep(_POLL_SECONDS)


def _line(stored: StoredEvent) -> str:
    event = stored.event
    words = [str(stored.sequence), format_time_ns(event.time_ns), event.type, printable(event.subject), _words(event)]
    return "  ".join(word for word in words if word)


def _words(event: Event) -> str:
    """What a person wants to know of the data of any type."""
    data: dict[str, Any] = event.data
    if "status" in data:
        reason = f" ({data['reason']})" if data.get("reason") else ""
        return printable(f"{data['status']}{reason} in {data.get('backend_id')}")
    if "file_count" in data:
        return printable(f"{data['file_count']} files in {', '.join(data.get('backend_ids', []))}")
    return ""
