"""`castore serve`: the HTTP API without a mount."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from tests.api.exposition import samples
from tests.cli.conftest import WAIT_SECONDS, Cli
from tests.mount.store import MountedStore, wait_until
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


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=WAIT_SECONDS) as answer:
        return str(answer.read().decode())


def test_the_queue_is_that_of_the_mount(cli: Cli, tmp_path: Path) -> None:
    """As the daemon says it; that none runs, or that it does not answer, is said too.

    The mount finds its address taken and goes on without: what it cannot tell is told here.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = MountedStore(tmp_path, port=port)
    cli.environ["CASTORE_CONFIG"] = str(store.config)
    waiting = 'castore_queue_files{state="receiving"}'
    with serving(cli) as url:
        assert "No writing mount of this store runs, so nothing comes in." in read(url)
        metrics = samples(read(f"{url}/metrics"))
        assert (metrics["castore_other_mount"], waiting in metrics) == (0, False)
        assert get(f"{url}/health")[1]["checks"]["mount:running"][0]["observedValue"] == 0
        try:
            store.mount()
            with (store.ingest("demo/1") / "file").open("wb") as file:
                file.write(b"half a file")
                file.flush()
                wait_until(lambda: samples(read(f"{url}/metrics")).get(waiting) == 1, "a file is being written")
                assert samples(read(f"{url}/metrics"))["castore_other_mount"] == 1
                page = read(url)
                assert f"of the mount at {store.mnt}" in page
                assert re.search(r"demo/1</span>.*0 of 1", page)
                checks = get(f"{url}/health")[1]["checks"]
                assert (checks["mount:running"][0]["observedValue"], checks["queue:waiting"][0]["observedValue"]) == (
                    1,
                    1,
                )
            os.kill(store.pid, signal.SIGSTOP)
            try:
                wait_until(lambda: "It is not known: the daemon of" in read(url), "it is said that it hangs")
                check = get(f"{url}/health")[1]["checks"]["mount:running"][0]
                assert (check["status"], "does not answer in time" in check["output"]) == ("warn", True)
            finally:
                os.kill(store.pid, signal.SIGCONT)
            wait_until(lambda: "of the mount at" in read(url), "it answers again")
        finally:
            store.close()


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
