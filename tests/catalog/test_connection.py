"""Making and opening the databases: versions, migrations, and which error each kind of damage is."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from pysqlite3 import dbapi2 as sqlite3

from castore.catalog import connection, schema
from castore.catalog.connection import FIRST_INODE, Database, create_catalog, create_workspace, open_reader, open_writer
from castore.catalog.reader import CatalogReader
from castore.catalog.schema import SCHEMA_VERSION, catalog_migrations
from castore.errors import CatalogBusy, CatalogFull, CatalogTooNew, StateError

CREATE = (create_catalog, create_workspace)
OPEN = (open_reader, open_writer)


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as raw:
        return int(raw.execute("PRAGMA user_version").fetchone()[0])


def set_version(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(f"PRAGMA user_version = {version}")


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    path = tmp_path / "catalog.db"
    create_catalog(path)
    return path


@pytest.mark.parametrize("create", CREATE)
def test_created_once(tmp_path: Path, create: Callable[[Path], None]) -> None:
    path = tmp_path / "made.db"
    create(path)
    assert version_of(path) == SCHEMA_VERSION
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    create(path)
    assert path.read_bytes() == before


def schema_of(path: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(path)) as raw:
        return raw.execute("SELECT name, sql FROM sqlite_schema WHERE sql <> '' ORDER BY name").fetchall()  # type: ignore[no-any-return]


def test_one_of_the_first_version_is_brought_up_to_date(catalog: Path, tmp_path: Path) -> None:
    """By `castore init`, with all that is in it; nothing else touches it."""
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(old, isolation_level=None)) as raw:
        catalog_migrations.apply(raw, stop_before="0002_proof_of_locations")
        raw.execute("INSERT INTO catalog_info VALUES (1, 'the one', 5)")
        raw.execute("PRAGMA user_version = 1")
    with pytest.raises(StateError, match="of an older castore; run `castore init`"):
        open_writer(old)
    create_catalog(old)
    assert (version_of(old), schema_of(old)) == (SCHEMA_VERSION, schema_of(catalog))
    with CatalogReader.open(old) as reader:
        assert reader.catalog_id() == "the one"


def test_a_new_catalog(catalog: Path, tmp_path: Path) -> None:
    create_catalog(tmp_path / "other.db")
    with CatalogReader.open(catalog) as reader, CatalogReader.open(tmp_path / "other.db") as other:
        assert reader.catalog_id() != other.catalog_id()
        assert (reader.totals(), list(reader.packages())) == ((0, 0), [])
    with closing(sqlite3.connect(catalog)) as raw:
        assert raw.execute("SELECT next_value FROM sequences").fetchall() == [(FIRST_INODE,)]


@pytest.mark.parametrize("create", CREATE)
def test_every_column_is_explained(tmp_path: Path, create: Callable[[Path], None]) -> None:
    """In the text that SQLite keeps, so that whoever opens the file with another tool reads it there; or, what needs
    no sentence of its own, at the top of the file that makes the tables."""
    path = tmp_path / "made.db"
    create(path)
    assert schema.__doc__ is not None
    by_name = set(re.findall(r"\w+", " ".join(re.findall(r"^    (\w+(?:, \w+)*)  ", schema.__doc__, re.MULTILINE))))
    unexplained = []
    with closing(sqlite3.connect(path)) as raw:
        tables = raw.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE '%sqlite_%'")
        for table, sql in tables.fetchall():
            for (column,) in raw.execute("SELECT name FROM pragma_table_info(?)", (table,)):
                explained = re.search(rf"^ *{column} .*--", sql, re.MULTILINE) is not None or column in by_name
                unexplained += [] if explained else [f"{table}.{column}"]
    assert unexplained == []


def test_settings_of_a_connection(catalog: Path) -> None:
    def pragma(database: Database, name: str) -> object:
        return database.execute(f"PRAGMA {name}").fetchone()[0]

    reader, writer = open_reader(catalog), open_writer(catalog)
    for database in (reader, writer):
        assert pragma(database, "journal_mode") == "wal"
        assert pragma(database, "foreign_keys") == 1
        assert pragma(database, "busy_timeout") == connection.BUSY_TIMEOUT_MS
    assert pragma(writer, "synchronous") == 2
    assert pragma(reader, "query_only") == 1
    writer.close()
    reader.close()


def test_sqlite_has_no_reset_bug(catalog: Path) -> None:
    """The one of the system may corrupt write-ahead logs before 3.51.3: the one that comes with castore does not."""
    database = open_reader(catalog)
    version = tuple(map(int, database.execute("SELECT sqlite_version()").fetchone()[0].split(".")))
    database.close()
    assert version >= (3, 51, 3)


def test_a_reader_cannot_write(catalog: Path) -> None:
    with CatalogReader.open(catalog) as reader, pytest.raises(StateError):
        reader._execute("DELETE FROM sequences")


@pytest.mark.parametrize("open_it", OPEN)
def test_a_newer_one_is_refused(catalog: Path, open_it: Callable[[Path], Database]) -> None:
    set_version(catalog, SCHEMA_VERSION + 1)
    with pytest.raises(CatalogTooNew, match=rf"has format version {SCHEMA_VERSION + 1}, .* use the newer castore"):
        open_it(catalog)
    with pytest.raises(CatalogTooNew):
        create_catalog(catalog)
    assert version_of(catalog) == SCHEMA_VERSION + 1


@pytest.mark.parametrize("open_it", OPEN)
def test_an_unfinished_one_is_refused(tmp_path: Path, open_it: Callable[[Path], Database]) -> None:
    """As a crash of `castore init` leaves it; the next `init` finishes it."""
    path = tmp_path / "catalog.db"
    path.touch()
    with pytest.raises(StateError, match=r"is not finished, .* run `castore init`"):
        open_it(path)
    create_catalog(path)
    open_it(path).close()


@pytest.mark.parametrize("open_it", OPEN)
def test_none_is_made_by_opening(tmp_path: Path, open_it: Callable[[Path], Database]) -> None:
    with pytest.raises(StateError, match="there is no catalog; run `castore init`"):
        open_it(tmp_path / "catalog.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("use", [*OPEN, *CREATE])
def test_what_is_no_database(tmp_path: Path, use: Callable[[Path], object]) -> None:
    path = tmp_path / "catalog.db"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StateError, match="file is not a database; restore it from a backup"):
        use(path)
    assert path.read_bytes() == b"this is not a database" * 100


def test_damage_that_shows_later(catalog: Path) -> None:
    """In a page that opening does not read, but a query does."""
    with closing(sqlite3.connect(catalog)) as raw:
        pages = raw.execute("SELECT rootpage FROM sqlite_schema WHERE tbl_name = 'packages'").fetchall()
        [size] = raw.execute("PRAGMA page_size").fetchone()
    with catalog.open("r+b") as file:
        for [page] in pages:
            file.seek((page - 1) * size)
            file.write(os.urandom(size))
    with CatalogReader.open(catalog) as reader, pytest.raises(StateError, match="malformed; restore it from a backup"):
        reader.totals()


def test_a_path_of_any_kind(tmp_path: Path) -> None:
    folder = tmp_path / "a b?c#d%20e&mode=memory"
    folder.mkdir()
    create_catalog(folder / "catalog.db")
    with CatalogReader.open(folder / "catalog.db") as reader:
        assert reader.totals() == (0, 0)
    assert {path.name for path in folder.iterdir()} >= {"catalog.db"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("database is locked", CatalogBusy), ("database or disk is full", CatalogFull), ("disk I/O error", StateError)],
)
def test_errors_are_mapped(text: str, kind: type[StateError]) -> None:
    error = connection.mapped(sqlite3.OperationalError(text), Path("some/catalog.db"))
    assert type(error) is kind
    assert str(error).startswith("some/catalog.db: ")
    assert error.temporary is (kind is not StateError)
