"""`castore serve`: the HTTP API without a mount."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from castore import __version__
from tests.cli.conftest import WAIT_SECONDS, Cli
from tests.mount.store import wait_until
from tests.places import Place
from tests.published import PublishedStore

Get = Callable[[str], tuple[int, Any]]


def get(url: str) -> tuple[int, Any]:
    """Status and document."""
    try:
        with urllib.request.urlopen(url, timeout=WAIT_SECONDS) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


@pytest.fixture
def store(cli: Cli, tmp_path: Path, place: Place) -> PublishedStore:
    """A store with one package."""
    cli.environ["CASTORE_CONFIG"] = str(tmp_path / "castore.toml")
    store = PublishedStore(tmp_path, place, "main")

    async def fill() -> None:
        await store.create()
        await store.publish("demo/1", {b"a": b"a"})
        await store.aclose()

    trio.run(fill)
    return store


@contextlib.contextmanager
def serving(cli: Cli, *arguments: str, number: int = signal.SIGTERM) -> Iterator[str]:
    """The URL of a server; ended by a signal, cleanly."""
    with cli.start("serve", "--json", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate(timeout=WAIT_SECONDS)
            yield json.loads(line)["url"]
        finally:
            process.send_signal(number)
            _, said = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, said) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_health_and_events(cli: Cli, store: PublishedStore, number: int) -> None:
    with serving(cli, number=number) as url:
        status, health = get(f"{url}/health")
        assert (status, health["status"], health["version"]) == (200, "pass", __version__)
        assert "staging:utilization" not in health["checks"]
        assert get(f"{url}/livez") == get(f"{url}/readyz") == (200, {"status": "pass"})
        assert get(f"{url}/v1/events") == (200, [])
        cli("storage", "verify")
        _, events = get(f"{url}/v1/events")
        assert [event["data"]["status"] for event in events] == ["verified", "verified"]


def test_health_follows_the_backends(cli: Cli, store: PublishedStore) -> None:
    with serving(cli) as url:
        assert get(f"{url}/health")[0] == 200
        with store.place.unreachable("main"):
            wait_until(lambda: get(f"{url}/health")[0] == 503, "the health fails")
            assert get(f"{url}/readyz")[0] == 200
        wait_until(lambda: get(f"{url}/health")[0] == 200, "the health is good again")


def test_listen(cli: Cli, store: PublishedStore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = cli.error("serve", "--listen", f"127.0.0.1:{port}")
        assert line == f"http.listen: cannot listen at 127.0.0.1:{port}: Address already in use"
    with serving(cli, "--listen", "[::1]:0") as url:
        assert url.startswith("http://[::1]:")
        assert get(f"{url}/livez")[0] == 200
    line = cli.error("serve", "--listen", "8750")
    assert line == '--listen 8750: expected "HOST:PORT" or "[IPV6]:PORT", the port from 0 to 65535'


def test_without_a_store(cli: Cli) -> None:
    assert "there is no catalog; run `castore init`" in cli.error("serve")
