"""Opening SQLite databases the one right way, and making them. No queries of the catalog's own here.

pysqlite3 brings its own SQLite: the system's may have the WAL-reset bug that 3.51.3 fixed.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from castore.catalog import schema
from castore.errors import CatalogBusy, CatalogFull, CatalogTooNew, StateError

if TYPE_CHECKING:
    import sqlite3
else:
    from pysqlite3 import dbapi2 as sqlite3

BUSY_TIMEOUT_MS: Final = 5_000
"""How long a statement waits for another process's write lock: far above any commit, far below a user's patience."""

FIRST_INODE: Final = 1024
"""Smaller numbers are the mount's own fixed directories and files."""

_CACHE_KIB: Final = 16 * 1024
"""Page cache of one connection: holds the index pages of some hundred thousand entries."""


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Map SQLite's errors once: CatalogBusy for a lock held too long, CatalogFull, StateError for the rest."""
    try:
        yield
    except sqlite3.Error as exc:
        raise mapped(exc, path) from exc


def executor(connection: sqlite3.Connection, path: Path) -> Callable[..., sqlite3.Cursor]:
    """`connection.execute` with its errors mapped, for single statements: cheaper than a context each time."""
    execute = connection.execute

    def run(sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        try:
            return execute(sql, parameters)
        except sqlite3.Error as exc:
            raise mapped(exc, path) from exc

    return run


def mapped(exc: sqlite3.Error, path: Path) -> StateError:
    """The error of castore for one of SQLite."""
    if isinstance(exc, sqlite3.OperationalError):
        if "locked" in str(exc) or "busy" in str(exc):
            return CatalogBusy(f"{path}: another process holds the write lock for over {BUSY_TIMEOUT_MS} ms")
        if "full" in str(exc):
            return CatalogFull(f"{path}: {exc}; make room on its file system")
        return StateError(f"{path}: {exc}")
    return StateError(f"{path}: {exc}; restore it from a backup or rebuild it from a backend")


def _connect(path: Path, *, mode: str) -> Database:
    uri = f"file:{quote(str(path))}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    database = Database(connection)
    database.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    database.execute("PRAGMA foreign_keys = ON")
    return database


def _check_version(database: Database, path: Path, newest: int) -> None:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > newest:
        raise CatalogTooNew(
            f"{path}: has format version {version}, this castore knows up to {newest}; use the newer castore"
        )
    if version < newest:
        raise StateError(f"{path}: is not finished, or of an older castore; run `castore init` to bring it up to date")


def open_reader(path: Path) -> Database:
    """A read-only connection to an existing database; it sees each commit as of its next statement.

    Raises StateError when the file is missing or not a catalog, CatalogTooNew for one from the future.
    """
    if not path.exists():
        raise StateError(f"{path}: there is no catalog; run `castore init`")
    with sqlite_errors(path):
        database = _connect(path, mode="ro")
        database.execute("PRAGMA query_only = ON")
        _check_version(database, path, schema.SCHEMA_VERSION)
        return database


def open_writer(path: Path, *, synchronous: str = "FULL") -> Database:
    """A connection that may write, to an existing database. Raises as `open_reader` does."""
    if not path.exists():
        raise StateError(f"{path}: there is no catalog; run `castore init`")
    with sqlite_errors(path):
        database = _connect(path, mode="rw")
        _check_version(database, path, schema.SCHEMA_VERSION)
        database.execute(f"PRAGMA synchronous = {synchronous}")
        return database


def open_side_database(path: Path, create: str) -> Database:
    """A connection that may write to a database of things that can be had again; made, with its one table, if absent.

    A commit survives a kill; power loss may take the last ones. Raises StateError.
    """
    with sqlite_errors(path):
        fresh = not path.exists()
        database = _connect(path, mode="rwc")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(create)
        if fresh:
            os.chmod(path, 0o600)
        return database


def create_catalog(path: Path) -> None:
    """Make the catalog, or bring an older one up to date. Idempotent; its folder must exist.

    Raises CatalogTooNew for one from the future and StateError for a file that is no database.
    """
    with _migrated(path, schema.catalog_migrations) as database:
        now = time.time_ns()
        database.execute("INSERT OR IGNORE INTO catalog_info VALUES (1, ?, ?)", [str(uuid.uuid4()), now])
        database.execute("INSERT OR IGNORE INTO sequences VALUES ('inode', ?)", [FIRST_INODE])


def create_workspace(path: Path) -> None:
    """Make the workspace database, or bring an older one up to date. Idempotent; its folder must exist."""
    with _migrated(path, schema.workspace_migrations):
        pass


@contextmanager
def _migrated(path: Path, migrations: Migrations) -> Iterator[Database]:
    with sqlite_errors(path):
        fresh = not path.exists()
        database = _connect(path, mode="rwc")
        try:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version > schema.SCHEMA_VERSION:
                _check_version(database, path, schema.SCHEMA_VERSION)
            database.execute("PRAGMA journal_mode = WAL")
            migrations.apply(database)
            yield database
            if version != schema.SCHEMA_VERSION:
                database.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION}")
        finally:
            database.close()
        if fresh:
            os.chmod(path, 0o600)
