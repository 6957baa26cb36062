"""Small blobs in a database of their own, `tiny.db`: a cache, found by one lookup. No facts, and not trusted.

It lies in the state directory, outside backup and replication; whoever deletes it loses nothing. What it gives has to
be checked. A file that is damaged is made anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from castore.catalog.connection import executor, open_side_database, sqlite_errors
from castore.digest import PRIMARY_ALGORITHM, Digest
from castore.errors import StateError

if TYPE_CHECKING:
    import sqlite3
else:
    from pysqlite3 import dbapi2 as sqlite3

_EVICT_ROWS: Final = 512
"""Removed at a time, the oldest first, until there is room."""

_CREATE: Final = """
CREATE TABLE IF NOT EXISTS tiny (
    number INTEGER PRIMARY KEY,   -- in the order of arrival: the lowest go first
    digest BLOB NOT NULL UNIQUE,  -- raw, of PRIMARY_ALGORITHM
    data   BLOB NOT NULL          -- all bytes of the blob
)"""

_log = logging.getLogger(__name__)


class TinyBlobs:
    """`tiny.db` of one state directory, within `max_bytes`. `get` on the loop, `put` in one thread at a time.

    Raises StateError on opening when the file can be neither used nor made anew.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        try:
            self._open()
        except StateError as exc:
            if isinstance(exc.__cause__, sqlite3.OperationalError):
                raise  # locked, or a file that may not be opened: nothing is wrong with it
            _log.warning("%s; it is made anew", exc)
            for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
                with suppress(FileNotFoundError):
                    os.unlink(name)
            self._open()

    def _open(self) -> None:
        self._writer = open_side_database(self.path, _CREATE)
        self._reader = open_side_database(self.path, _CREATE)
        self._write: Callable[..., Any] = executor(self._writer.conn, self.path)
        self._read: Callable[..., Any] = executor(self._reader.conn, self.path)
        self._page_bytes = int(self._read("PRAGMA page_size").fetchone()[0])
        self._read("SELECT number FROM tiny LIMIT 1").fetchone()

    def close(self) -> None:
        """Close both connections."""
        self._reader.close()
        self._writer.close()

    def get(self, digest: Digest) -> bytes | None:
        """The bytes that were put under a digest; some 10 microseconds. Raises StateError."""
        if digest.algorithm != PRIMARY_ALGORITHM:
            return None
        row = self._read("SELECT data FROM tiny WHERE digest = ?", (digest.raw,)).fetchone()
        return None if row is None else row[0]

    def put(self, blobs: Iterable[tuple[Digest, bytes]]) -> None:
        """Keep small blobs, in one transaction; older ones go where there is no room. Raises StateError."""
        with sqlite_errors(self.path):
            self._write("BEGIN IMMEDIATE")
            try:
                for digest, data in blobs:
                    if digest.algorithm == PRIMARY_ALGORITHM:
                        self._write("INSERT OR REPLACE INTO tiny (digest, data) VALUES (?, ?)", (digest.raw, data))
                while self.used_bytes() > self.max_bytes and self._evict():
                    pass
                self._write("COMMIT")
            except BaseException:
                with suppress(StateError):
                    self._write("ROLLBACK")
                raise

    def look_and_close(self) -> int:
        """What is in use of the file, in bytes. Raises StateError."""
        try:
            return self.used_bytes()
        finally:
            self.close()

    def forget(self, digest: Digest) -> None:
        """Forget one blob. Raises StateError."""
        self._write("DELETE FROM tiny WHERE digest = ?", (digest.raw,))

    def clear_and_close(self) -> int:
        """Forget all blobs; how many they were. Raises StateError."""
        try:
            return int(self._write("DELETE FROM tiny").rowcount)
        finally:
            self.close()

    def used_bytes(self) -> int:
        """What is in use of the file: it does not shrink, what is free there is used again. Raises StateError."""
        pages, free = (int(self._write(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count"))
        return (pages - free) * self._page_bytes

    def _evict(self) -> bool:
        oldest = "SELECT number FROM tiny ORDER BY number LIMIT ?"
        return bool(self._write(f"DELETE FROM tiny WHERE number IN ({oldest})", (_EVICT_ROWS,)).rowcount)
