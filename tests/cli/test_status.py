"""`castore status`, with and without a daemon."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from castore.catalog.records import FailureReason
from castore.catalog.writer import CatalogWriter
from castore.digest import BlobHasher
from tests.cli.conftest import Cli
from tests.mount.store import MountedStore


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
