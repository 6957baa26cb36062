"""Backups of a catalog: as of one moment while it is written, proved, in place at once or not at all."""

from __future__ import annotations

import stat
import threading
from contextlib import closing
from pathlib import Path

import pytest
from pysqlite3 import dbapi2 as sqlite3

from castore.catalog.backup import BackupReader
from castore.catalog.checking import CheckReader
from castore.catalog.connection import create_catalog
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import Digest
from castore.errors import StateError
from tests.catalog.catalogs import Catalog


def rows(path: Path) -> list[tuple[int, int]]:
    with closing(sqlite3.connect(path)) as raw:
        intents = raw.execute("SELECT count(*) FROM put_intents").fetchone()[0]
        return [(intents, raw.execute("SELECT next_value FROM sequences").fetchone()[0])]


def back_up(catalog: Path, target: Path) -> None:
    with BackupReader(catalog) as reader:
        reader.back_up(target)


def test_a_backup_is_the_catalog(catalog: Catalog, tmp_path: Path) -> None:
    one, two = catalog.fill_version()
    catalog.change(lambda transaction: transaction.add_locations([(one, "local"), (two, "local")]))
    catalog.publish()
    catalog.change(lambda transaction: transaction.lease_inodes(9000))
    with BackupReader(catalog.path) as reader:
        made = reader.back_up(tmp_path / "b.db")
    assert (made.package_count, made.catalog_id) == (1, catalog.reader.catalog_id())
    assert stat.S_IMODE((tmp_path / "b.db").stat().st_mode) == 0o600
    with CheckReader(tmp_path / "b.db") as reader:
        assert not any(result.count for result in reader.run(lambda *_: None))
        assert reader.package("zlib", "1.3") == catalog.reader.package("zlib", "1.3")
    assert {item.name for item in tmp_path.glob("*b.db*")} == {"b.db"}


def test_while_others_write(catalog: Catalog, tmp_path: Path) -> None:
    """Two rows change in each transaction: a backup has both changes or none, and waits for nobody."""
    done = threading.Event()

    def write_always() -> None:
        writer = CatalogWriter(catalog.path)
        number = 0
        while not done.is_set():

            def work(transaction: Transaction, number: int = number) -> None:
                transaction.add_intents([(Digest.of(b"%d" % number), "local")], owner="me")
                transaction.lease_inodes(1)

            writer.run_sync(work)
            number += 1
        writer.close()

    [(_, first)] = rows(catalog.path)
    thread = threading.Thread(target=write_always)
    thread.start()
    counts = []
    try:
        for _ in range(10):
            back_up(catalog.path, tmp_path / "b.db")
            [(intents, next_value)] = rows(tmp_path / "b.db")
            assert next_value - first == intents
            counts.append(intents)
    finally:
        done.set()
        thread.join()
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_one_that_is_broken_off_leaves_the_older_one(catalog: Catalog, tmp_path: Path) -> None:
    back_up(catalog.path, tmp_path / "b.db")
    before = (tmp_path / "b.db").read_bytes()

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with BackupReader(catalog.path) as reader, pytest.raises(KeyboardInterrupt):
        reader.back_up(tmp_path / "b.db", stop)
    assert (tmp_path / "b.db").read_bytes() == before
    assert list(tmp_path.glob(".b.db*")) == []


def test_a_catalog_that_lacks_rows_is_not_backed_up_silently(catalog: Catalog, tmp_path: Path) -> None:
    with closing(sqlite3.connect(catalog.path)) as raw:
        raw.execute("INSERT INTO storage_locations VALUES (77, 'local', 'stored', '', 1, 0)")
        raw.commit()
    with pytest.raises(StateError, match="the copy lacks rows that storage_locations names; run `castore catalog"):
        back_up(catalog.path, tmp_path / "b.db")
    assert list(tmp_path.glob("*b.db*")) == []


def test_what_is_not_replaced(catalog: Catalog, tmp_path: Path) -> None:
    text, folder, link = tmp_path / "text", tmp_path / "folder", tmp_path / "link"
    text.write_text("precious")
    folder.mkdir()
    link.symlink_to(text)
    create_catalog(other := tmp_path / "other.db")
    for target, says in (
        (catalog.path, "is the catalog itself"),
        (text, "exists, and is no backup of this catalog"),
        (other, "exists, and is no backup of this catalog"),
        (folder, "is not a file"),
        (link, "is not a file"),
        (tmp_path / "none/b.db", "there is no folder"),
    ):
        with pytest.raises(StateError, match=says):
            back_up(catalog.path, target)
    assert text.read_text() == "precious"


def test_a_database_that_somebody_uses_is_not_replaced(catalog: Catalog, tmp_path: Path) -> None:
    """A backup that was put to use."""
    back_up(catalog.path, tmp_path / "b.db")
    with closing(sqlite3.connect(tmp_path / "b.db")) as raw:
        raw.execute("PRAGMA journal_mode = WAL")
        raw.execute("UPDATE sequences SET next_value = next_value + 1")
        raw.commit()
        with pytest.raises(StateError, match="is a database that somebody uses"):
            back_up(catalog.path, tmp_path / "b.db")
