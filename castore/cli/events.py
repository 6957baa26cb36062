"""`castore events`: prints stored events, and those that come; or delivers them, in the place of a writing mount."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli import events_deliver
from castore.cli.output import format_time_ns, json_line, printable
from castore.cli.session import Session, common_options
from castore.errors import ConfigError
from castore.events import LOCATION_DELETED

if TYPE_CHECKING:
    from castore.api.event_feed import Start
    from castore.catalog.event_log import EventReader, StoredEvent
    from castore.events import Event

_POLL_SECONDS: Final = 0.25
"""Between two looks for new events: one costs some microseconds."""
_PAGE_EVENTS: Final = 500


@click.command("events")
@click.option(
    "--since",
    metavar="SEQ_OR_TIME",
    help="Only events behind this sequence number, or from this time on: ISO 8601, or how long ago, such as 1h.  "
    "[default: all; with --follow, new ones]",
)
@click.option("--follow", is_flag=True, help="Go on with events as they come, until interrupted.")
@click.option("--type", "event_type", metavar="TYPE", default="", help="Only events of this type.")
@click.option(
    "--deliver",
    is_flag=True,
    help="Print none, and deliver what waits to [events.file] and [events.webhook], as a writing mount does by itself.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one CloudEvents document in a line for each event.")
@common_options
@click.pass_obj
def command(session: Session, since: str | None, follow: bool, event_type: str, deliver: bool, as_json: bool) -> None:
    """Show what happened, in order: packages published, locations stored, verified or failed.

    Example: castore events --since 1h --follow
    """
    from castore.api.event_feed import document
    from castore.catalog.event_log import EventReader

    if deliver:
        if since is not None or event_type:
            raise click.UsageError("--deliver goes on where it was: --since and --type are not for it.")
        events_deliver.deliver(session.config(), follow=follow, as_json=as_json)
        return
    with EventReader(session.config().store.catalog_path) as reader:
        source = reader.catalog_id()
        for stored in _read(reader, _start(reader, since, follow), event_type, follow):
            if as_json:
                click.echo(json_line(document(stored, source)))
            else:
                click.echo(_line(stored))


def _start(reader: EventReader, since: str | None, follow: bool) -> Start:
    """Where to begin. Raises ConfigError."""
    from castore.api.event_feed import SINCE_RULE, Start, parse_start

    if since is None:
        return Start(reader.last_sequence() if follow else 0)
    try:
        return parse_start(reader, since)
    except ValueError as exc:
        raise ConfigError(f"--since {since!r}: expected {SINCE_RULE}") from exc


def _read(reader: EventReader, start: Start, event_type: str, follow: bool) -> Iterator[StoredEvent]:
    after = start.after
    while True:
        if reader.has_news():
            found = None
            while found is None or len(found) == _PAGE_EVENTS:
                # Looked at first: what goes between the two is in the page, or told of the next time.
                first = reader.first_sequence()
                if after and first > after + 1:
                    click.echo(f"events {after + 1} to {first - 1} are not kept any more (events.keep)", err=True)
                    after = first - 1
                found, after = reader.events_after(after, _PAGE_EVENTS, event_type=event_type, since_ns=start.since_ns)
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
    backend_id = data.get("backend_id")
    if "restorable_until_ns" in data:
        return f"{data['file_count']} files, can be restored until {format_time_ns(data['restorable_until_ns'])}"
    if event.type == LOCATION_DELETED:
        verb = "forgotten" if data["reason"] == "retired" else "deleted"
        return printable(f"{verb} ({data['reason']}) in {backend_id}")
    if data.get("reason"):
        return printable(f"failed ({data['reason']}) in {backend_id}")
    if "tag" in data:
        return f"-> {data['version']}" if data["version"] else "removed"
    if "status" in data:
        return printable(f"{data['status']} in {backend_id}")
    if "source_backend_id" in data:
        source_id = data["source_backend_id"]
        return printable(f"copied from {source_id} to {backend_id}" if source_id else f"stored in {backend_id}")
    if "file_count" in data:
        where = f" in {', '.join(data['backend_ids'])}" if "backend_ids" in data else ""
        return printable(f"{data['file_count']} files{where}")
    return ""
