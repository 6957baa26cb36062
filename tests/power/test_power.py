"""What survives a power cut, with state, staging and objects on a disk that forgets. What a kill leaves: test_crash."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.power.machine import Machine

FILES = {"small": b"small", "dir/large": os.urandom(300_000), "dir/empty": b""}


def copy_in(machine: Machine, ref: str, files: dict[str, bytes]) -> Path:
    box = machine.mnt / "ingest" / ref
    for name, data in files.items():
        (box / name).parent.mkdir(parents=True, exist_ok=True)
        (box / name).write_bytes(data)
    return box


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def wrong(top: Path, files: dict[str, bytes]) -> list[str]:
    """The files below `top` that are not there, or not as they should be."""
    found = []
    for name, data in files.items():
        try:
            if (top / name).read_bytes() != data:
                found.append(f"{top / name}: other bytes")
        except OSError as exc:
            found.append(f"{top / name}: {exc.strerror}")
    return found


def broken_promises(machine: Machine) -> list[str]:
    """Use the store, cut the power, start again; what was promised and is not kept."""
    machine.start_disk()
    init = machine.castore("init")
    assert init.returncode == 0, init.stderr
    assert machine.start().returncode == 0
    # A name that is new, and one that the catalog has seen.
    for ref in ("power/1", "power/2"):
        copy_in(machine, ref, FILES | {"which": ref.encode()})
        done = machine.castore("package", "publish", ref)
        assert done.returncode == 0, done.stderr
    synced = copy_in(machine, "other/1", {"file": b"x" * 5000, "dir/deep": b"deep"})
    for name in ("file", "dir/deep"):
        sync(synced / name)
    machine.cut_power()
    machine.start_disk()
    done = machine.start()
    if done.returncode:
        return [done.stderr.strip() or done.stdout.strip()]
    broken = wrong(machine.mnt / "ingest/other/1", {"file": b"x" * 5000, "dir/deep": b"deep"})
    for ref in ("power/1", "power/2"):
        broken += wrong(machine.mnt / "packages" / ref, FILES | {"which": ref.encode()})
    verify = machine.castore("storage", "verify", "--json")
    if verify.returncode:
        broken.append(f"storage verify: {verify.stdout}{verify.stderr}")
    manifests = list((machine.disk / "objects/manifest-sha256").glob("*/*/*"))
    if len(manifests) != 2:
        broken.append(f"{len(manifests)} manifests")
    mark = machine.disk / "objects/CASTORE-OBJECTS.txt"
    if not mark.exists() or "castore" not in mark.read_text():
        broken.append("nobody can tell what the folder of objects is")
    return broken


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_was_promised_is_kept(tmp_path: Path, seed: int | None) -> None:
    with Machine(tmp_path / "machine", seed=seed) as machine:
        assert broken_promises(machine) == []


def kind_of(path: str) -> str:
    """A pattern for all synced paths of the same purpose."""
    path = re.sub(r"\.castore-put-[0-9a-f]{16}", ".castore-put-*", path)
    path = re.sub(r"/(manifest-sha256|sha256)/[0-9a-f]{2}(?![0-9a-f])", r"/\1/??", path)
    path = re.sub(r"\?\?/[0-9a-f]{2}(?![0-9a-f])", "??/??", path)
    return re.sub(r"/data/[0-9a-f]+$", "/data/[0-9a-f]*", path)


OBJECTS = ("/objects/{0}", "/objects/{0}/??", "/objects/{0}/??/??", "/objects/{0}/??/??/.castore-put-*")
NEEDED = (
    "/",
    "/objects",
    "/objects/CASTORE-OBJECTS.txt",
    *(pattern.format(name) for name in ("sha256", "manifest-sha256") for pattern in OBJECTS),
    "/state",
    "/state/catalog.db",
    "/state/catalog.db-wal",
    "/state/staging",
    "/state/staging/data",
    "/state/staging/data/[0-9a-f]*",
    "/state/staging/workspace.db",
    "/state/staging/workspace.db-wal",
)
SQLITES_OWN = {"/state/catalog.db-journal", "/state/staging/workspace.db-journal"}
"""Of the moment in which a database is made, before anything is promised: SQLite's rollback until it is in WAL mode."""


def test_what_is_synced(tmp_path: Path) -> None:
    with Machine(tmp_path / "machine") as machine:
        assert broken_promises(machine) == []
        kinds = {kind_of(path) for path in machine.synced()}
        # The database of small files is a cache: no promise rests on it.
        assert {kind for kind in kinds if not kind.startswith("/state/tiny.db")} == {*NEEDED, *SQLITES_OWN}


@pytest.mark.parametrize("pattern", NEEDED)
def test_each_sync_is_needed(tmp_path: Path, pattern: str) -> None:
    with Machine(tmp_path / "machine", deaf=pattern) as machine:
        assert broken_promises(machine) != []
