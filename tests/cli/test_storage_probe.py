"""`castore storage probe`, as people and programs call it, and what is known of it afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from castore.catalog.reader import CatalogReader
from castore.config_backends import LocalSettings, S3Settings
from tests.cli.conftest import WAIT_SECONDS, Cli
from tests.places import LocalPlace, Place
from tests.published import PublishedStore
from tests.servers.seaweedfs import SeaweedFS

on_s3 = pytest.mark.parametrize("place", ["s3"], indirect=True)


@pytest.fixture
def store(tmp_path: Path, place: Place, cli: Cli) -> PublishedStore:
    """The store of the command line, with the backends `first` and `second`, and a package in both."""
    cli.environ["CASTORE_CONFIG"] = str(tmp_path / "castore.toml")
    store = PublishedStore(tmp_path, place, "first", "second")

    async def make() -> None:
        await store.create()
        await store.publish("demo/1", {b"a": b"a"})
        await store.aclose()

    trio.run(make)
    return store


@pytest.fixture
def in_memory(store: PublishedStore, cli: Cli) -> Iterator[str]:
    """The id of one more backend, which lacks what castore relies on: its objects lie in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="castore-tests-") as folder:
        with store.config_path.open("a") as file:
            file.write(f'[backends.memory]\ntype = "local"\npath = "{folder}/objects"\n')
        cli("init")
        yield "memory"


def findings(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {finding["name"]: finding for finding in document["findings"]}


@on_s3
def test_all_that_is_relied_on_is_given(cli: Cli, store: PublishedStore) -> None:
    done = cli("storage", "probe", "--backend", "first")
    server, header, *lines, last = done.stdout.splitlines()
    assert server.startswith("backend first: SeaweedFS")
    assert header.split() == ["RESULT", "NAME", "GIVEN", "QUESTION", "EXPECTED", "ANSWER"]
    assert [line for line in lines if line.split()[0] not in ("good", "-")] == []
    (line,) = (line for line in lines if line.split()[1] == "put-md5")
    assert line.endswith("400 BadDigest")
    assert last.endswith("relied on and not given: 0, not found out: 0")


@on_s3
def test_it_is_kept(cli: Cli, store: PublishedStore) -> None:
    before = time.time_ns()
    documents = json.loads(cli("storage", "probe", "--json").stdout)
    assert documents["errors"] == {}
    assert [document["backend_id"] for document in documents["backends"]] == ["first", "second"]
    with CatalogReader(store.catalog_path) as reader:
        kept = reader.probes()
    for document in documents["backends"]:
        probe = kept[document["backend_id"]]
        assert before < probe.probed_at_ns < time.time_ns()
        assert (probe.probed_at_ns, probe.server) == (document["probed_at_ns"], document["server"])
        assert list(probe.findings) == document["findings"]
        assert findings(document)["range"] == {
            "name": "range",
            "question": "6 ranges of an object",
            "expected": "206, just those bytes",
            "answer": "206, just those bytes",
            "enforced": "yes",
            "consequence": findings(document)["range"]["consequence"],
            "severity": "pass",
        }
    listed = json.loads(cli("storage", "backends", "--json").stdout)["backends"]
    assert [row["probed_at_ns"] for row in listed] == [kept["first"].probed_at_ns, kept["second"].probed_at_ns]


def test_what_is_missing(cli: Cli, in_memory: str) -> None:
    done = cli("storage", "probe", "--backend", in_memory, code=1)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FAIL"))
    assert line.split()[1:3] == ["durable", "no"]
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("!"))
    assert said.startswith("! durable: the file system below: tmpfs: everything stored here is lost")
    assert done.stdout.splitlines()[-1].endswith("relied on and not given: 1, not found out: 0")
    listed = {row["backend_id"]: row for row in json.loads(cli("storage", "backends", "--json").stdout)["backends"]}
    assert listed[in_memory]["probed_at_ns"] > 0
    assert listed["first"]["probed_at_ns"] == 0


def test_a_newer_probe_takes_the_place_of_an_older_one(cli: Cli, store: PublishedStore, in_memory: str) -> None:
    times = []
    for _ in range(2):
        cli("storage", "probe", "--backend", in_memory, code=1)
        with CatalogReader(store.catalog_path) as reader:
            (probe,) = reader.probes().values()
        times.append(probe.probed_at_ns)
    assert times[0] < times[1]


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_a_backend_that_cannot_be_asked(cli: Cli, store: PublishedStore, place: Place) -> None:
    with place.unreachable("first"):
        done = cli("storage", "probe", "--json", code=2)
    documents = json.loads(done.stdout)
    assert list(documents["errors"]) == ["first"]
    assert [document["backend_id"] for document in documents["backends"]] == ["second"]
    assert done.stderr.startswith("castore: error: backend first: probe: ") or isinstance(place, LocalPlace)
    assert done.stderr.count("\n") == 1
    with CatalogReader(store.catalog_path) as reader:
        assert list(reader.probes()) == ["second"]


def test_what_is_missing_comes_before_what_cannot_be_asked(
    cli: Cli, store: PublishedStore, in_memory: str, place: Place
) -> None:
    with place.unreachable("first"):
        cli("storage", "probe", code=1)


def test_backends_that_are_not_there(cli: Cli, store: PublishedStore) -> None:
    assert cli.error("storage", "probe", "--backend", "nowhere").startswith("--backend nowhere: no such backend")


@on_s3
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(cli: Cli, store: PublishedStore, s3_server: SeaweedFS, number: signal.Signals) -> None:
    settings = store.config.backends["first"]
    assert isinstance(settings, S3Settings)
    prefix = f"{settings.key_prefix}/probe/"
    client = s3_server.client()

    def left() -> int:
        return int(client.list_objects_v2(Bucket=settings.bucket, Prefix=prefix)["KeyCount"])

    process = cli.start("storage", "probe", "--backend", "first", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + WAIT_SECONDS
    while not left():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stderr.count("\n")) == (130, 1)
    assert stderr.startswith("castore: interrupted: what the probe made is removed")
    assert left() == 0
    client.close()
    with CatalogReader(store.catalog_path) as reader:
        assert reader.probes() == {}


def test_objects_of_a_disk_are_left_alone(cli: Cli, store: PublishedStore) -> None:
    settings = store.config.backends["first"]
    assert isinstance(settings, LocalSettings)
    before = sorted(settings.path.rglob("*"))
    cli("storage", "probe", "--backend", "first", code=1 if _in_memory(settings.path) else 0)
    assert sorted(settings.path.rglob("*")) == before
    cli("storage", "verify", "--backend", "first")


def _in_memory(path: Path) -> bool:
    kind = subprocess.run(["stat", "-f", "-c", "%T", path], capture_output=True, text=True, check=True).stdout
    return kind.strip() in ("tmpfs", "ramfs")
