"""A whole copy of a SQLite database as a file: proved after it was written, and in its place at once or not at all.

Writers go on meanwhile: the copy is what the connection's open transaction sees, which the caller begins. Opens no
database of castore's own; errors of SQLite leave it as they are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from pysqlite3 import dbapi2 as sqlite3

from castore.errors import StateError

_PAGES: Final = 4096
"""Pages of 4 KiB copied between two looks at whether to go on: 16 MiB, some 20 ms."""
_SIDE_FILES: Final = ("", "-wal", "-shm", "-journal")


def copy_database(
    source: Any, target: Path, on_copied: Callable[[int, int], None] = lambda _done, _total: None
) -> None:
    """Copy the database of a connection, which is in a transaction, to `target`, replacing what is there.

    `on_copied` learns the pages copied and how many there are, and may raise to end it. Raises StateError when the copy
    is not the same, sqlite3.Error and OSError; then `target` is as it was.
    """
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(descriptor)
    try:
        with closing(sqlite3.connect(name, isolation_level=None)) as copy:
            source.backup(copy, pages=_PAGES, progress=lambda _status, left, total: on_copied(total - left, total))
            # One file: who only reads it leaves nothing beside it. Whoever writes to it makes a log again.
            copy.execute("PRAGMA journal_mode = DELETE")
        sync_path(name)
        _prove(source, name, target)
        os.rename(name, target)
        sync_path(target.parent)
    finally:
        for suffix in _SIDE_FILES:
            Path(name + suffix).unlink(missing_ok=True)


def _prove(source: Any, name: str, target: Path) -> None:
    """What the disk holds is sound, and has as many rows in each table."""
    descriptor = os.open(name, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # read what was written, not what is remembered
    finally:
        os.close(descriptor)
    with closing(sqlite3.connect(name, isolation_level=None)) as copy:
        said = [row[0] for row in copy.execute("PRAGMA integrity_check(5)")]
        if said != ["ok"]:
            raise StateError(f"{target}: the copy is damaged: {'; '.join(map(str, said))}; run `castore catalog check`")
        if (dangling := copy.execute("PRAGMA foreign_key_check").fetchone()) is not None:
            raise StateError(f"{target}: the copy lacks rows that {dangling[0]} names; run `castore catalog check`")
        if _counts(copy) != _counts(source):
            raise StateError(f"{target}: the copy has other rows than the original; try again")


def _counts(connection: Any) -> dict[str, int]:
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    return {
        table: connection.execute('SELECT count(*) FROM "{}"'.format(table.replace('"', '""'))).fetchone()[0]
        for table in tables
    }


def sync_path(path: str | Path) -> None:
    """Make a file, or the names in a folder, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
