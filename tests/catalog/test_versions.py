"""Upgrades: a catalog of every version of the tables comes up to date in place, with a copy of it beforehand."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from pysqlite3 import dbapi2 as sqlite3
from sqlite_utils import Database

from castore.catalog.checking import CheckReader
from castore.catalog.connection import create_catalog, open_writer, read_catalog_id
from castore.catalog.package_tree import TreeReader
from castore.catalog.schema import SCHEMA_VERSION, catalog_migrations
from castore.errors import CatalogTooNew, StateError, StateLocked
from castore.state_lock import take_lock
from tests.catalog.versions import load, path_of

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
    """Each migration is whole; the version is written last."""
    path = tmp_path / "catalog.db"
    load(1, path)
    names = [migration.name for migration in catalog_migrations._migrations]
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        catalog_migrations.apply(Database(raw), stop_before=names[2])
    create_catalog(path)
    assert version_of(path) == SCHEMA_VERSION
    with CheckReader(path) as reader:
        assert not any(result.count for result in reader.run(lambda *_: None))


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
