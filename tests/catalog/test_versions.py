"""Upgrades: a catalog of every version of the tables comes up to date in place, with a copy of it beforehand."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from pysqlite3 import dbapi2 as sqlite3

from castore.catalog.checking import CheckReader
from castore.catalog.connection import create_catalog, open_writer, read_catalog_id
from castore.catalog.package_tree import TreeReader
from castore.catalog.schema import SCHEMA_VERSION, catalog_migrations
from castore.errors import CatalogTooNew, StateError, StateLocked
from castore.failpoint import COMMAND_POINTS
from castore.state_lock import take_lock
from tests.catalog.versions import load, path_of
from tests.mount.small_disk import small_disk
from tests.mount.store import MountedStore

OLDER = range(1, SCHEMA_VERSION)
CATALOG_ID = "0b4f6f2e-6b0c-4c1e-8d43-2f9d1c7c1a11"


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as raw:
        return int(raw.execute("PRAGMA user_version").fetchone()[0])


def test_every_older_version_has_its_file() -> None:
    absent = [version for version in OLDER if not path_of(version).exists()]
    assert absent == [], "run `python -m tests.catalog.versions`, and add what it writes"


@pytest.mark.parametrize("version", OLDER)
def test_an_older_one_is_brought_up_to_date(tmp_path: Path, version: int) -> None:
    path = tmp_path / "catalog.db"
    load(version, path)
    with pytest.raises(StateError, match="of an older castore; run `castore init`"):
        open_writer(path)
    copy = create_catalog(path)
    assert copy == tmp_path / f"catalog.db.version-{version}"
    assert (version_of(path), version_of(copy)) == (SCHEMA_VERSION, version)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert read_catalog_id(copy) == CATALOG_ID
    with CheckReader(path) as reader:
        assert [trouble for result in reader.run(lambda *_: None) for trouble in result.kept] == []
    with TreeReader(path) as tree:
        assert tree.catalog_id() == CATALOG_ID
        package = tree.package("zlib", "latest")
        assert package is not None
        names = [name for name, _ in tree.walk(package.root_id)]
    assert sorted(names) == [b"empty", b"hard", b"lib", b"lib/\xff one", b"link"]
    assert create_catalog(path) is None


def test_the_copy_can_be_brought_up_to_date_itself(tmp_path: Path) -> None:
    """So a downgrade is: put the copy in the catalog's place."""
    load(1, tmp_path / "catalog.db")
    copy = create_catalog(tmp_path / "catalog.db")
    assert copy is not None
    (tmp_path / "catalog.db").unlink()
    copy.rename(tmp_path / "catalog.db")
    assert create_catalog(tmp_path / "catalog.db") == copy
    assert version_of(tmp_path / "catalog.db") == SCHEMA_VERSION


def test_an_older_copy_stays(tmp_path: Path) -> None:
    (tmp_path / "catalog.db.version-1").write_text("precious")
    load(1, tmp_path / "catalog.db")
    assert create_catalog(tmp_path / "catalog.db") == tmp_path / "catalog.db.version-1.1"
    assert (tmp_path / "catalog.db.version-1").read_text() == "precious"


def test_an_upgrade_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    """As a castore left it that committed each migration by itself, and the version last."""
    path = tmp_path / "catalog.db"
    load(1, path)
    names = [name for name, _ in catalog_migrations.steps]
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        catalog_migrations.apply(raw, stop_before=names[2])
    create_catalog(path)
    assert version_of(path) == SCHEMA_VERSION
    with CheckReader(path) as reader:
        assert not any(result.count for result in reader.run(lambda *_: None))


def castore(state_dir: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`castore ARGUMENTS` on a store there."""
    config = state_dir.parent / "castore.toml"
    config.write_text(
        f'[store]\nstate_dir = "{state_dir}"\n[backends.local]\ntype = "local"\npath = "{state_dir.parent}/objects"\n'
    )
    command = [sys.executable, "-m", "castore.cli", *arguments, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environ)


def schema_of(path: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as raw:
        return list(raw.execute("SELECT name, sql FROM sqlite_schema WHERE name <> 'sqlite_sequence' ORDER BY name"))


@pytest.mark.parametrize("point", [point for point in COMMAND_POINTS if point.startswith("upgrade.")])
def test_an_upgrade_that_was_killed(tmp_path: Path, point: str) -> None:
    """By SIGKILL: the catalog is of the version that it had, and whole; the next one does it."""
    state_dir, path = tmp_path / "state", tmp_path / "state/catalog.db"
    state_dir.mkdir()
    load(1, path)
    before = schema_of(path)
    (state_dir / ".catalog.db.version-1.abc.part").write_text("of a copy that was killed")
    assert castore(state_dir, "init", CASTORE_FAILPOINT=point).returncode == -signal.SIGKILL
    assert (version_of(path), schema_of(path)) == (1, before)
    assert castore(state_dir, "init").returncode == 0
    assert version_of(path) == SCHEMA_VERSION
    assert [version_of(copy) for copy in sorted(state_dir.glob("catalog.db.version-*"))] == [1, 1]
    assert not list(state_dir.glob(".*"))
    with CheckReader(path) as reader:
        assert not any(result.count for result in reader.run(lambda *_: None))


@pytest.mark.parametrize("free", [112 << 10, 160 << 10], ids=["for the copy", "for some of the change"])
def test_an_upgrade_on_a_full_disk(tmp_path: Path, free: int) -> None:
    """One line, nothing changed and nothing left; with room it goes on."""
    with small_disk(tmp_path / "disk") as disk:
        state_dir, path = disk.path / "state", disk.path / "state/catalog.db"
        state_dir.mkdir()
        load(1, path)
        castore(state_dir, "status")
        before = schema_of(path)
        disk.fill(but_bytes=free)
        refused = castore(state_dir, "init")
        [*_, said] = refused.stderr.splitlines()  # where the copy was made, that is said before
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr
        assert said.startswith(f"castore: error: {state_dir}/")
        assert "make room on its file system" in said or "No space left on device" in said
        disk.empty()
        assert (version_of(path), schema_of(path)) == (1, before)
        assert not [name for name in os.listdir(state_dir) if "version" in name]
        assert castore(state_dir, "init").returncode == 0
        assert version_of(path) == SCHEMA_VERSION


def test_nothing_is_mounted_meanwhile(tmp_path: Path) -> None:
    """A read-only mount has no lock; its tables are not changed below it. A dead one is nobody's."""
    store = MountedStore(tmp_path)
    try:
        store.mount("-o", "ro")
        path = store.state / "catalog.db"
        with closing(sqlite3.connect(path)) as raw:
            raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION - 1}")
        said = store.run("init").stderr
        assert f"is of an older castore, which shows it at {store.mnt}; unmount that" in said
        assert version_of(path) == SCHEMA_VERSION - 1
        store.kill()
        store.castore("init")
        assert version_of(path) == SCHEMA_VERSION
    finally:
        store.close()


def test_nobody_writes_meanwhile(tmp_path: Path) -> None:
    load(1, tmp_path / "catalog.db")
    before = (tmp_path / "catalog.db").read_bytes()
    lock = take_lock(tmp_path / "run/lock", tmp_path)
    with pytest.raises(StateLocked, match=f"another daemon .pid {os.getpid()}. writes there; unmount it"):
        create_catalog(tmp_path / "catalog.db")
    os.close(lock)
    assert version_of(tmp_path / "catalog.db") == 1
    assert (tmp_path / "catalog.db").read_bytes() == before


def test_a_damaged_one_is_not_touched(tmp_path: Path) -> None:
    """The copy is proved, and what cannot be proved is not upgraded."""
    path = tmp_path / "catalog.db"
    load(1, path)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA foreign_keys = OFF")
        raw.execute("DELETE FROM blobs WHERE blob_id = 1")
        raw.commit()
    with pytest.raises(StateError, match="the copy lacks rows that storage_locations names"):
        create_catalog(path)
    assert version_of(path) == 1
    assert sorted(item.name for item in tmp_path.iterdir() if item.is_file()) == ["catalog.db"]


def test_an_older_castore_refuses_a_newer_catalog(tmp_path: Path) -> None:
    """In every way to open it, and it stays as it is."""
    path = tmp_path / "catalog.db"
    create_catalog(path)
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        raw.execute("CREATE TABLE of_the_future (x)")
    before = path.read_bytes()
    uses: tuple[Callable[[Path], object], ...] = (TreeReader, open_writer, create_catalog)
    for use in uses:
        with pytest.raises(CatalogTooNew, match=f"knows up to {SCHEMA_VERSION}; use the newer castore"):
            use(path)
    assert path.read_bytes() == before
