"""`castore catalog rebuild` and `backup` on the command line: a lost host comes back, and what they refuse to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from castore.digest import MANIFEST_ALGORITHM, Digest
from castore.failpoint import VARIABLE
from castore.storage.layout import key_of
from tests.mount.disaster import drill, drill_with_litestream, publish
from tests.mount.store import MountedStore, wait_until
from tests.places import PLACES, Place


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_a_lost_host_comes_back(tmp_path: Path, place: Place) -> None:
    """The drill of scripts/disaster-drill, short."""
    found = drill(tmp_path, place, 4)
    assert found["packages"] == 4


def test_a_lost_host_comes_back_from_a_replica_of_its_catalog(tmp_path: Path, place: Place) -> None:
    """The same with litestream: nothing of the catalog is made anew."""
    found = drill_with_litestream(tmp_path, place, 2, f"file://{tmp_path}/replica")
    assert found["litestream_things_compared"] > 50


@pytest.fixture
def unmounted(tmp_path: Path) -> MountedStore:
    """A store with three packages and no daemon."""
    made = MountedStore(tmp_path)
    try:
        made.mount()
        publish(made, 3)
        made.umount()
    finally:
        made.close()
    return made


def lose_catalog(store: MountedStore) -> None:
    for path in store.state.glob("catalog.db*"):
        path.unlink()


def test_what_has_rows_is_not_overwritten(unmounted: MountedStore) -> None:
    before = (unmounted.state / "catalog.db").read_bytes()
    done = unmounted.run("catalog", "rebuild", "--backend", "local")
    assert done.returncode == 2
    assert "and a rebuild overwrites nothing; move it away, or add what it lacks with --add" in done.stderr
    assert (unmounted.state / "catalog.db").read_bytes() == before
    done = unmounted.run("catalog", "rebuild", "--backend", "local", "--add", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["known"] == 3


def test_a_backup_that_is_older_gets_what_came_since(unmounted: MountedStore) -> None:
    unmounted.castore("catalog", "backup", str(unmounted.root / "backup.db"))
    source = unmounted.root / "source"
    source.mkdir()
    (source / "a").write_text("new")
    unmounted.castore("package", "import", str(source), "newer/1")
    lose_catalog(unmounted)
    (unmounted.root / "backup.db").rename(unmounted.state / "catalog.db")
    assert "newer" not in unmounted.castore("package", "list")
    done = json.loads(unmounted.castore("catalog", "rebuild", "--backend", "local", "--add", "--json").splitlines()[-1])
    assert (done["added"], done["known"]) == (1, 3)
    assert "newer/1" in unmounted.castore("package", "list")
    unmounted.castore("catalog", "check")
    unmounted.castore("storage", "verify")


def test_what_a_rebuilt_package_needs_is_not_collected(unmounted: MountedStore) -> None:
    """Though a collection that was killed had marked it before the package came back."""
    before = unmounted.root / "before"
    shutil.copytree(unmounted.objects, before)
    collect = ("storage", "gc", "--delete", "--grace", "0s")
    refs = [package["ref"] for package in json.loads(unmounted.castore("package", "list", "--json"))["packages"]]
    unmounted.castore("package", "delete", "--yes", *refs)
    done = subprocess.run(
        [sys.executable, "-m", "castore.cli", "--config", str(unmounted.root / "castore.toml"), *collect],
        env=os.environ | {VARIABLE: "gc.marked"},
        check=False,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    shutil.copytree(before, unmounted.objects, dirs_exist_ok=True)
    unmounted.castore("catalog", "rebuild", "--backend", "local", "--add")
    unmounted.castore(*collect)
    unmounted.castore("storage", "verify")
    unmounted.castore("catalog", "check")
    assert len(json.loads(unmounted.castore("package", "list", "--json"))["packages"]) == len(refs)


def test_what_is_damaged_is_named_and_the_rest_comes_back(unmounted: MountedStore) -> None:
    packages = json.loads(unmounted.castore("package", "list", "--json"))["packages"]
    digest = Digest.parse(
        json.loads(unmounted.castore("package", "show", packages[0]["ref"], "--json"))["manifest_digest"]
    )
    path = unmounted.objects / key_of(digest)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    lose_catalog(unmounted)
    done = unmounted.run("catalog", "rebuild", "--backend", "local")
    assert done.returncode == 1
    assert f"refused: {digest}: its bytes have another digest, {MANIFEST_ALGORITHM}:" in done.stdout
    assert len(json.loads(unmounted.castore("package", "list", "--json"))["packages"]) == 2
    unmounted.castore("catalog", "check")


def test_a_daemon_keeps_it_from_running(tmp_path: Path) -> None:
    store = MountedStore(tmp_path)
    try:
        store.mount()
        done = store.run("catalog", "rebuild", "--backend", "local")
        assert done.returncode == 2
        assert "another daemon" in done.stderr
        assert "unmount it" in done.stderr
    finally:
        store.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_one_that_is_ended_goes_on(unmounted: MountedStore, number: signal.Signals) -> None:
    """Until it is whole there is no catalog; then there is all of it."""
    lose_catalog(unmounted)
    command = [sys.executable, "-m", "castore.cli", "--config", str(unmounted.config)]
    running = subprocess.Popen(
        [*command, "catalog", "rebuild", "--backend", "local"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    building = unmounted.state / "catalog.db.rebuilding"
    wait_until(lambda: building.exists() or running.poll() is not None, "the catalog that is built")
    running.send_signal(number)
    running.communicate()
    whole = (unmounted.state / "catalog.db").exists()
    assert whole is (running.returncode == 0)
    unmounted.castore("catalog", "rebuild", "--backend", "local", *(["--add"] if whole else []))
    assert len(json.loads(unmounted.castore("package", "list", "--json"))["packages"]) == 3
    unmounted.castore("catalog", "check")
    assert not building.exists()
    assert not (unmounted.state / "rebuild").exists()


def test_staged_files_survive_a_lost_catalog(tmp_path: Path) -> None:
    """Only catalog.db is lost: what lies in ingest/ is there still, under numbers that no package gets."""
    store = MountedStore(tmp_path)
    try:
        store.mount()
        publish(store, 1)
        staged = store.mnt / "ingest/package-0/2.0"
        staged.mkdir()
        (staged / "a").write_text("staged")
        store.umount()
        lose_catalog(store)
        store.castore("catalog", "rebuild", "--backend", "local")
        store.mount()
        assert (staged / "a").read_text() == "staged"
        store.publish("package-0/2.0")
        assert (store.mnt / "packages/package-0/latest/a").read_text() == "staged"
        assert (store.mnt / "packages/package-0/1.0/empty").exists()
        store.umount()
        store.castore("catalog", "check")
    finally:
        store.close()


def test_backups_beside_a_daemon_that_writes(tmp_path: Path) -> None:
    """Each is sound, and none waits for the writing to end."""
    store = MountedStore(tmp_path)
    try:
        store.mount()
        publishing = threading.Thread(target=publish, args=(store, 6))
        publishing.start()
        counts: list[int] = []
        while publishing.is_alive() or not counts:
            made = json.loads(store.castore("catalog", "backup", str(tmp_path / "backup.db"), "--json"))
            counts.append(made["package_count"])
            assert ": sound; " in store.castore("catalog", "check", str(tmp_path / "backup.db"))
        publishing.join()
        store.castore("catalog", "backup", str(tmp_path / "backup.db"))
        store.umount()
    finally:
        store.close()
    assert counts == sorted(counts)
    lose_catalog(store)
    (tmp_path / "backup.db").rename(store.state / "catalog.db")
    assert len(json.loads(store.castore("package", "list", "--json"))["packages"]) == 6


def test_refusals(unmounted: MountedStore) -> None:
    for arguments, says in (
        (["--backend", "nowhere"], "--backend nowhere: no such backend is configured; there are local"),
        (["--backend", "local", "--add"], "there is no catalog to add to; leave out --add"),
    ):
        lose_catalog(unmounted)
        done = unmounted.run("catalog", "rebuild", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
    shutil.rmtree(unmounted.objects)
    done = unmounted.run("catalog", "rebuild", "--backend", "local")
    assert done.returncode == 2
    assert "given up: " in done.stderr
    assert not (unmounted.state / "catalog.db").exists()
