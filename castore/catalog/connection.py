"""Opening SQLite databases the one right way, and making them. No queries of the catalog's own here.

pysqlite3 brings its own SQLite: the system's may have the WAL-reset bug that 3.51.3 fixed.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import quote

from castore.catalog import schema
from castore.catalog.copy_file import copy_database
from castore.catalog.schema import MIGRATIONS_TABLE, Migrations
from castore.errors import CatalogBusy, CatalogFull, CatalogTooNew, StateError
from castore.failpoint import failpoint
from castore.mountinfo import is_dead, read_mounts
from castore.state_lock import take_lock

if TYPE_CHECKING:
    import sqlite3
else:
    from pysqlite3 import dbapi2 as sqlite3

BUSY_TIMEOUT_MS: Final = 5_000
"""How long a statement waits for another process's write lock: far above any commit, far below a user's patience."""

FIRST_INODE: Final = 1024
"""Smaller numbers are the mount's own fixed directories and files."""

FOLLOWED_NAME: Final = "followed.json"
"""Beside a catalog that is another host's, and that only whoever follows it replaces."""

_NO_ROOM_BYTES: Final = 1024 * 1024
"""Free on a disk, where an I/O error is one of room: files that were given up have given theirs back already."""

_CACHE_KIB: Final = 16 * 1024
"""Page cache of one connection: holds the index pages of some hundred thousand entries."""


class Database:
    """An open connection."""

    __slots__ = ("conn", "execute")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.conn = connection
        self.execute = connection.execute

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        self.conn.close()


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
        if "full" in str(exc) or ("I/O" in str(exc) and _has_no_room(path)):
            return CatalogFull(f"{path}: {exc}; make room on its file system")
        return StateError(f"{path}: {exc}")
    return StateError(f"{path}: {exc}; restore it from a backup or rebuild it from a backend")


def _has_no_room(path: Path) -> bool:
    """Whether an I/O error may be just that: SQLite says so where the index of a write-ahead log cannot grow."""
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < _NO_ROOM_BYTES


def _connect(path: Path, *, mode: str) -> Database:
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for ever.
        raise StateError(f"{path}: is no file; move it away, then restore a backup or rebuild it from a backend")
    uri = f"file:{quote(str(path))}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    database = Database(connection)
    database.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    database.execute("PRAGMA foreign_keys = ON")
    # Nothing in a file that came from elsewhere may call what has side effects.
    database.execute("PRAGMA trusted_schema = OFF")
    return database


def _check_version(database: Database, path: Path, newest: int) -> None:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version > newest:
        raise CatalogTooNew(
            f"{path}: has format version {version}, this castore knows up to {newest}; use the newer castore"
        )
    if version < newest:
        raise StateError(f"{path}: is not finished, or of an older castore; run `castore init` to bring it up to date")


def _check_kind(database: Database, path: Path, migrations: Migrations) -> None:
    """Refuse a database that something else made. An empty one may become anything."""
    execute = database.execute
    tables = {row[0] for row in execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if not tables:
        return
    made = (
        MIGRATIONS_TABLE in tables
        and execute(f"SELECT 1 FROM {MIGRATIONS_TABLE} WHERE migration_set = ?", [migrations.name]).fetchone()
    )
    if not made and not tables <= {MIGRATIONS_TABLE}:
        kind = "catalog" if migrations is schema.catalog_migrations else "workspace"
        raise StateError(f"{path}: is a database of something else, not a {kind} of castore; give another path")


def _check_hooks(database: Database, path: Path) -> None:
    """Refuse what could answer in the place of a table, or change rows behind one's back."""
    hook = database.execute("SELECT type, name FROM sqlite_schema WHERE type IN ('trigger', 'view') LIMIT 1").fetchone()
    if hook is not None:
        raise StateError(
            f"{path}: has a {hook[0]} {hook[1]!r}, and castore makes none: whoever made it can change what is read; "
            "restore a backup"
        )


def open_reader(path: Path, kind: Migrations = schema.catalog_migrations) -> Database:
    """A read-only connection to an existing database; it sees each commit as of its next statement.

    Raises StateError when the file is missing or not one of that kind, CatalogTooNew for one from the future.
    """
    return _open(path, kind, mode="ro", settings="query_only = ON")


def open_writer(path: Path, kind: Migrations = schema.catalog_migrations, *, synchronous: str = "FULL") -> Database:
    """A connection that may write, to an existing database. Raises as `open_reader` does, and StateError for a catalog
    that follows another host's.
    """
    _check_own(path)
    database = _open(path, kind, mode="rw", settings=f"synchronous = {synchronous}")
    with sqlite_errors(path):
        database.execute("PRAGMA journal_mode = WAL")  # a backup that took the catalog's place has no log yet
    return database


def _check_own(path: Path) -> None:
    if path.with_name(FOLLOWED_NAME).exists():
        raise StateError(
            f"{path}: is a copy that follows the catalog of another host; write there, or make this host the writer as "
            "docs/OPERATOR.md says"
        )


def _open(path: Path, kind: Migrations, *, mode: str, settings: str) -> Database:
    if not path.exists():
        raise StateError(f"{path}: there is no catalog; run `castore init`")
    with sqlite_errors(path):
        database = _connect(path, mode=mode)
        try:
            database.execute(f"PRAGMA {settings}")
            _check_kind(database, path, kind)
            _check_version(database, path, schema.SCHEMA_VERSION)
            _check_hooks(database, path)
        except BaseException:
            database.close()
            raise
        return database


def open_in_memory() -> Database:
    """A database of its own, gone when it is closed."""
    return Database(sqlite3.connect(":memory:", isolation_level=None))


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


def create_catalog(path: Path, on_copied: Callable[[int, int], None] = lambda _done, _total: None) -> Path | None:
    """Make the catalog, or bring an older one up to date. Idempotent; its folder must exist.

    An older one is copied first, and `on_copied` learns the pages copied and how many there are: the path of the copy
    is returned, None when there was no need. Nobody writes to the
    state directory meanwhile, and nothing is mounted of it. Raises CatalogTooNew for one from the future, StateError
    for a file that is no database or is not sound, StateLocked, and OSError or CatalogFull when there is no room for
    the copy or the change; then it is as it was.
    """
    _check_own(path)
    with _upgrading(path, on_copied) as copy, _migrated(path, schema.catalog_migrations) as database:
        now = time.time_ns()
        database.execute("INSERT OR IGNORE INTO catalog_info VALUES (1, ?, ?)", [str(uuid.uuid4()), now])
        database.execute("INSERT OR IGNORE INTO sequences VALUES ('inode', ?)", [FIRST_INODE])
    return copy


@contextmanager
def _upgrading(path: Path, on_copied: Callable[[int, int], None]) -> Iterator[Path | None]:
    """Inside, an older catalog may be changed: there is a copy of it, and its state directory is locked."""
    version = _older_version(path)
    if not version:
        yield None
        return
    lock = take_lock(path.parent / "run/lock", path.parent, holder="upgrade")
    try:
        _check_not_shown(path)
        for left in path.parent.glob(f".{path.name}.version-*.part*"):
            left.unlink()  # by an upgrade that was killed
        copy = _copy_before(path, version, on_copied)
        failpoint("upgrade.copied")
        try:
            yield copy
        except CatalogFull:
            copy.unlink()  # nothing has changed, and the room is wanted
            raise
    finally:
        os.close(lock)


def _check_not_shown(path: Path) -> None:
    """Whoever shows the catalog read-only has no lock, and knows the older tables."""
    for mount in read_mounts():
        if mount.state_dir == path.parent and is_dead(mount.mountpoint) is not True:
            raise StateError(
                f"{path}: is of an older castore, which shows it at {mount.mountpoint}; unmount that, then bring it up "
                "to date"
            )


def _older_version(path: Path) -> int:
    """The version of a whole catalog that is older than this castore's; 0 for any other, or none."""
    if not path.exists():
        return 0
    with sqlite_errors(path), closing(_connect(path, mode="ro")) as database:
        version = int(database.execute("PRAGMA user_version").fetchone()[0])
        _check_kind(database, path, schema.catalog_migrations)
    return version if version < schema.SCHEMA_VERSION else 0


def _copy_before(path: Path, version: int, on_copied: Callable[[int, int], None]) -> Path:
    number = 0
    while os.path.lexists(copy := path.with_name(f"{path.name}.version-{version}{f'.{number}' if number else ''}")):
        number += 1
    with sqlite_errors(path), closing(_connect(path, mode="rw")) as database:
        database.execute("BEGIN")
        copy_database(database.conn, copy, on_copied)
        database.execute("ROLLBACK")
    return copy


def read_catalog_id(path: Path) -> str | None:
    """The UUID of a catalog of any version, None for a file that is none."""
    try:
        with sqlite_errors(path), closing(_connect(path, mode="ro")) as database:
            _check_kind(database, path, schema.catalog_migrations)
            row = database.execute("SELECT catalog_id FROM catalog_info").fetchone()
    except StateError:
        return None
    return None if row is None else str(row[0])


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
            _check_kind(database, path, migrations)
            if version > schema.SCHEMA_VERSION:
                _check_version(database, path, schema.SCHEMA_VERSION)
            _check_hooks(database, path)
            database.execute("PRAGMA journal_mode = WAL")
            # All or nothing: after a kill, or on a full disk, it is of the version that it had, and works with it.
            database.execute("BEGIN IMMEDIATE")
            migrations.apply(database.conn)
            yield database
            if version != schema.SCHEMA_VERSION:
                database.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION}")
            failpoint("upgrade.migrated")
            database.execute("COMMIT")
        finally:
            database.close()
        if fresh:
            os.chmod(path, 0o600)
