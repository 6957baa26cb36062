"""`castore events --deliver`: for hosts without a mount. What sinks do is tested in tests/api/."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import WAIT_SECONDS, Cli
from tests.cli.test_events import add, published
from tests.mount.store import wait_until


@pytest.fixture
def catalog(cli: Cli, tmp_path: Path) -> Path:
    cli("init", "--state-dir", tmp_path / "state")
    return tmp_path / "state/catalog.db"


def configure(cli: Cli, text: str) -> None:
    path = cli.home / ".config/castore/castore.toml"
    path.write_text(f"{path.read_text()}{text}")


def taken(cli: Cli) -> list[str]:
    path = cli.home / "events.jsonl"
    return [json.loads(line)["subject"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(cli: Cli, number: int) -> None:
    wait_until(lambda: taken(cli)[-1:] == [f"p/{number}"], f"p/{number} is delivered")


@contextmanager
def following(cli: Cli) -> Iterator[subprocess.Popen[str]]:
    with cli.start("events", "--deliver", "--follow", stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def test_nobody_to_deliver_to(cli: Cli, catalog: Path) -> None:
    line = cli.error("events", "--deliver")
    assert line.endswith("events: there is nobody to deliver to; set [events.file] or [events.webhook]")


def test_what_waits(cli: Cli, catalog: Path) -> None:
    configure(cli, f'[events.file]\npath = "{cli.home}/events.jsonl"\n')
    add(catalog, published(1), published(2))
    assert cli("events", "--deliver").stdout == "file: 2 events delivered\n"
    assert json.loads(cli("events", "--deliver", "--json").stdout) == {
        "sink": "file",
        "delivered_count": 0,
        "error": None,
    }
    assert taken(cli) == ["p/1", "p/2"]
    for wrong in (("--since", "1"), ("--type", "v1.package.published")):
        assert "--since and --type are not for it" in cli("events", "--deliver", *wrong, code=2).stderr


def test_what_comes(cli: Cli, catalog: Path) -> None:
    configure(cli, f'[events.file]\npath = "{cli.home}/events.jsonl"\n')
    for number, ending in ((1, signal.SIGTERM), (3, signal.SIGINT)):
        add(catalog, published(number))
        with following(cli) as process:
            wait_for(cli, number)
            line = cli.error("events", "--deliver")
            assert f"another delivery (pid {process.pid}) runs there" in line
            add(catalog, published(number + 1))
            wait_for(cli, number + 1)
            process.send_signal(ending)
            assert process.communicate(timeout=WAIT_SECONDS)[1] == ""
            assert process.returncode == 0
    assert taken(cli) == ["p/1", "p/2", "p/3", "p/4"]


def test_another_process_takes_over(cli: Cli, catalog: Path) -> None:
    """When the one that delivers is killed: from where it was, and no earlier."""
    configure(cli, f'[events.file]\npath = "{cli.home}/events.jsonl"\n')
    add(catalog, published(1))
    with following(cli) as first:
        wait_for(cli, 1)
        with following(cli) as second:
            assert second.stderr is not None
            waits = second.stderr.readline()
            assert f"another delivery (pid {first.pid}) runs there" in waits
            add(catalog, published(2))
            wait_for(cli, 2)
            first.kill()
            first.wait()
            add(catalog, published(3))
            wait_for(cli, 3)
            assert f"another delivery (pid {second.pid}) runs there" in cli.error("events", "--deliver")
    assert sorted(set(taken(cli))) == ["p/1", "p/2", "p/3"]


def test_a_sink_that_does_not_take_them(cli: Cli, catalog: Path) -> None:
    (cli.home / "secret").write_text("s3cret")
    configure(
        cli,
        f'[events.file]\npath = "{cli.home}/none/events.jsonl"\n'
        f'[events.webhook]\nurl = "http://127.0.0.1:9/T0PS3CRET"\nsecret_ref = "file:{cli.home}/secret"\n'
        'retry_max = "100ms"\n',
    )
    add(catalog, published(1))
    done = cli("events", "--deliver", code=2)
    assert done.stdout.startswith(
        f"file: 0 events delivered; {cli.home}/none/events.jsonl: No such file or directory\n"
    )
    assert done.stderr.splitlines()[-1].startswith("castore: error: not all events are delivered: ")
    assert "s3cret" not in (done.stdout + done.stderr).lower()
