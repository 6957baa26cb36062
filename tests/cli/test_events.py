"""`castore events`: from any point on, followed across processes, as text and as CloudEvents."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from castore.catalog.records import FailureReason
from castore.catalog.writer import CatalogWriter, Transaction
from castore.events import PACKAGE_PUBLISHED, Event
from castore.registry.locations import record_bad_read
from tests.cli.conftest import WAIT_SECONDS, Cli
from tests.event_schemas import check_event
from tests.published import summary_of

_NS = 10**9


def published(number: int, *, time_ns: int | None = None) -> Event:
    data = {
        "name": "p",
        "version": str(number),
        "producer": "tests",
        "retention_class": "standard",
        "publisher_uid": 0,
        "backend_ids": ["local"],
        "file_count": number,
        "size_bytes": 0,
        "manifest_digest": f"manifest-sha256:{'0' * 64}",
    }
    return Event(
        type=PACKAGE_PUBLISHED, subject=f"p/{number}", data=data, time_ns=time.time_ns() if time_ns is None else time_ns
    )


@pytest.fixture
def catalog(cli: Cli, tmp_path: Path) -> Path:
    cli("init", "--state-dir", tmp_path / "state")
    return tmp_path / "state/catalog.db"


def add(catalog: Path, *events: Event) -> None:
    def work(transaction: Transaction) -> None:
        for event in events:
            transaction.add_event(event)

    writer = CatalogWriter(catalog)
    writer.run_sync(work)
    writer.close()


def subjects(text: str) -> list[str]:
    found: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    for event in found:
        check_event(event)
    return [event["subject"] for event in found]


def test_all_in_order(cli: Cli, catalog: Path) -> None:
    assert cli("events").stdout == ""
    add(catalog, *(published(number) for number in range(1, 1203)))
    assert subjects(cli("events", "--json").stdout) == [f"p/{number}" for number in range(1, 1203)]
    lines = cli("events").stdout.splitlines()
    assert len(lines) == 1202
    number, when, kind, subject, words = lines[6].split("  ")
    assert (number, kind, subject, words) == ("7", "v1.package.published", "p/7", "7 files in local")
    assert abs(datetime.fromisoformat(when).timestamp() - time.time()) < 60


def test_a_failed_location_is_said_in_words(cli: Cli, catalog: Path) -> None:
    summary = summary_of(b"x")
    writer = CatalogWriter(catalog)
    writer.run_sync(lambda transaction: transaction.add_locations([(summary, "local")]))
    failed = writer.run_sync(
        lambda transaction: record_bad_read(transaction, summary.digest, "local", FailureReason.SIZE_MISMATCH)
    )
    again = writer.run_sync(
        lambda transaction: record_bad_read(transaction, summary.digest, "local", FailureReason.MISSING)
    )
    writer.close()
    assert (failed, again) == (True, False)
    (line,) = cli("events").stdout.splitlines()
    assert line.endswith(f"  v1.storage.location_failed  {summary.digest}  failed (size_mismatch) in local")
    event = json.loads(cli("events", "--json").stdout)
    assert event["data"] == {
        "backend_id": "local",
        "digest": str(summary.digest),
        "size_bytes": 1,
        "reason": "size_mismatch",
        "packages": [],
    }


def test_since_a_sequence(cli: Cli, catalog: Path) -> None:
    add(catalog, *(published(number) for number in range(1, 5)))
    assert subjects(cli("events", "--json", "--since", "2").stdout) == ["p/3", "p/4"]
    last = json.loads(cli("events", "--json").stdout.splitlines()[1])["sequence"]
    assert subjects(cli("events", "--json", "--since", last).stdout) == ["p/3", "p/4"]
    assert cli("events", "--since", "4").stdout == ""
    assert cli("events", "--since", "9" * 20).stdout == ""


def test_since_a_time(cli: Cli, catalog: Path) -> None:
    first = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())
    add(catalog, *(published(number, time_ns=(first + number * 3600) * _NS) for number in range(48)))
    # Its time was taken before those of the others, its transaction came later.
    add(catalog, published(48, time_ns=(first + 47 * 3600 - 5) * _NS), published(49))
    everything = subjects(cli("events", "--json", "--since", "2023-12-31").stdout)
    assert len(everything) == 50
    assert subjects(cli("events", "--json", "--since", "2024-01-02T12:00:00Z").stdout) == [
        f"p/{number}" for number in range(36, 50)
    ]
    assert subjects(cli("events", "--json", "--since", "2024-01-02T23:00:00Z").stdout) == ["p/47", "p/49"]
    assert subjects(cli("events", "--json", "--since", "1h").stdout) == ["p/49"]
    assert cli("events", "--since", "2199-01-01").stdout == ""


@pytest.mark.parametrize("since", ["yesterday", "-1", "", "12 parsecs", "2024-13-01"])
def test_what_since_does_not_take(cli: Cli, catalog: Path, since: str) -> None:
    line = cli.error("events", "--since", since)
    assert line.startswith(f"--since {since!r}: expected a sequence number, a time such as ")


def test_of_one_type(cli: Cli, catalog: Path) -> None:
    add(catalog, published(1))
    assert len(cli("events", "--type", "v1.package.published").stdout.splitlines()) == 1
    assert cli("events", "--type", "v1.other").stdout == ""


def test_follow(cli: Cli, catalog: Path) -> None:
    """What other processes commit is shown as it comes, each event once, until interrupted."""
    add(catalog, published(1), published(2))
    with cli.start("events", "--follow", "--since", "1", "--json", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert subjects(process.stdout.readline()) == ["p/2"]
        for number in (3, 4, 5):
            add(catalog, published(number))
            assert subjects(process.stdout.readline()) == [f"p/{number}"]
        process.send_signal(2)
        assert process.wait(WAIT_SECONDS) == 130
        assert process.stdout.read() == ""


def test_events_that_are_not_kept_any_more(cli: Cli, catalog: Path) -> None:
    """A reader who is behind is told what it misses, once, and goes on with what there is."""
    add(catalog, *(published(number) for number in range(1, 6)))
    forget(catalog, 3)
    shown = cli("events", "--json", "--since", "1")
    assert (subjects(shown.stdout), shown.stderr) == (["p/4", "p/5"], f"events 2 to 3 {GONE}")
    shown = cli("events", "--json")
    assert (subjects(shown.stdout), shown.stderr) == (["p/4", "p/5"], ""), "all there are"
    assert cli("events", "--since", "3").stderr == ""
    forget(catalog, 5)
    shown = cli("events", "--since", "3")
    assert (shown.stdout, shown.stderr) == ("", f"events 4 to 5 {GONE}")
    assert cli("events", "--since", "5").stderr == ""
    add(catalog, published(6))
    assert subjects(cli("events", "--json", "--since", "5").stdout) == ["p/6"]


def test_follow_while_events_go(cli: Cli, catalog: Path) -> None:
    add(catalog, published(1), published(2))
    command = ("events", "--follow", "--since", "1", "--json")
    with cli.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert subjects(process.stdout.readline()) == ["p/2"]
        forget(catalog, 2)
        add(catalog, published(3))
        assert subjects(process.stdout.readline()) == ["p/3"]
        process.send_signal(signal.SIGSTOP)  # it is not looking
        add(catalog, published(4))
        forget(catalog, 4)
        add(catalog, published(5))
        process.send_signal(signal.SIGCONT)
        assert subjects(process.stdout.readline()) == ["p/5"]
        process.send_signal(2)
        rest, said = process.communicate(timeout=WAIT_SECONDS)
        assert (rest, said.rstrip()) == ("", f"events 4 to 4 {GONE}".rstrip())


GONE = "are not kept any more (events.keep)\n"


def forget(catalog: Path, upto: int) -> None:
    writer = CatalogWriter(catalog)
    writer.run_sync(lambda transaction: transaction.prune_events(upto))
    writer.close()


def test_follow_begins_with_what_is_new(cli: Cli, catalog: Path) -> None:
    add(catalog, published(1))
    with cli.start("events", "--follow", "--json", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # It shows that it has begun by showing an event: one of those that come until then.
        number = 1
        shown = ""
        while not shown:
            number += 1
            add(catalog, published(number))
            shown = _line_within(process, 1.0)
        assert 2 <= int(subjects(shown)[0].removeprefix("p/")) <= number
        process.terminate()
        process.wait(WAIT_SECONDS)


def _line_within(process: subprocess.Popen[str], seconds: float) -> str:
    assert process.stdout is not None
    return process.stdout.readline() if select.select([process.stdout], [], [], seconds)[0] else ""
