"""`castore status`, with and without a daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from castore.catalog.records import FailureReason
from castore.catalog.writer import CatalogWriter
from castore.digest import BlobHasher
from tests.cli.conftest import Cli
from tests.mount.store import MountedStore

WRITING = """
import sys, threading
file = open(sys.argv[1], "wb", buffering=0)
file.write(b"y" * 1024)
print("written", flush=True)
threading.Event().wait()
"""


def test_of_a_daemon(cli: Cli, store: MountedStore) -> None:
    document = json.loads(cli("status", "--json", "--config", store.config).stdout)
    assert document["state_dir"] == str(store.state)
    assert document["mounts"] == [{"mountpoint": str(store.mnt), "read_only": False}]
    assert document["daemon"]["mountpoint"] == str(store.mnt)
    assert document["daemon"]["pid"] == store.pid
    assert document["catalog"] is None
    lines = [line.split(maxsplit=1) for line in cli("status", "--config", store.config).stdout.splitlines()]
    assert ["mountpoint", str(store.mnt)] in lines
    assert ["pid", str(store.pid)] in lines


def test_the_queue(cli: Cli, store: MountedStore) -> None:
    box = store.ingest("queue/1")
    (box / "stored").write_bytes(b"x" * 2048)
    store.wait_stored(box / "stored")
    rate = store.status()["rate"]
    assert 0 < rate["files_per_s"] <= 1
    assert rate["bytes_per_s"] == pytest.approx(2048 * rate["files_per_s"], rel=0.1)
    with subprocess.Popen([sys.executable, "-c", WRITING, box / "open"], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        try:
            writer.stdout.readline()
            document = json.loads(cli("status", "--json", "--config", store.config).stdout)["daemon"]
            lines = dict(
                line.split(maxsplit=1)
                for line in cli("status", "--config", store.config).stdout.splitlines()
                if line.startswith(("queue", "rate", "eta"))
            )
        finally:
            writer.kill()
    assert document["queue"]["receiving"] == {"file_count": 1, "size_bytes": 1024}
    assert document["queue"]["stored"] == {"file_count": 1, "size_bytes": 2048}
    assert document["eta_s"] == 0
    assert lines["queue"] == "receiving 1 (1.0 KiB), staged 0, uploading 0, stored 1 (2.0 KiB), failed 0"
    assert lines["rate"].endswith("/s")
    assert "files/s, " in lines["rate"]


def test_without_a_daemon(cli: Cli, tmp_path: Path) -> None:
    cli("init", "--state-dir", tmp_path / "state")
    assert cli("status").stdout.splitlines() == [
        f"no daemon is running for {tmp_path}/state",
        "nothing is mounted",
        "packages: 0, 0 B",
    ]
    document = json.loads(cli("status", "--json").stdout)
    assert document == {
        "state_dir": f"{tmp_path}/state",
        "mounts": [],
        "daemon": None,
        "catalog": {"package_count": 0, "size_bytes": 0, "locations": []},
    }


def test_of_a_dead_mount(cli: Cli, store: MountedStore) -> None:
    store.kill()
    lines = cli("status", "--config", store.config).stdout.splitlines()
    assert lines[:2] == [f"no daemon is running for {store.state}", f"mounted at {store.mnt}"]


def test_failed_locations_are_something_bad(cli: Cli, tmp_path: Path) -> None:
    cli("init", "--state-dir", tmp_path / "state")
    hasher = BlobHasher()
    hasher.update(b"x" * 1536)
    summary = hasher.finish()
    writer = CatalogWriter(tmp_path / "state/catalog.db")
    writer.run_sync(lambda transaction: transaction.add_locations([(summary, "local")]))
    assert cli("status").stdout.splitlines()[-2:] == [
        "BACKEND  STATUS  OBJECTS     SIZE",
        "local    stored        1  1.5 KiB",
    ]
    writer.run_sync(
        lambda transaction: transaction.fail_location(summary.digest, "local", FailureReason.DIGEST_MISMATCH)
    )
    writer.close()
    assert "local    failed        1  1.5 KiB" in cli("status", code=1).stdout
    document = json.loads(cli("status", "--json", code=1).stdout)
    assert document["catalog"]["locations"] == [
        {"backend_id": "local", "status": "failed", "count": 1, "size_bytes": 1536}
    ]


def test_a_daemon_that_hangs(cli: Cli, store: MountedStore) -> None:
    os.kill(store.pid, signal.SIGSTOP)
    assert "does not answer in time" in cli.error("status", "--config", store.config)
