"""Backing up the catalog beside a daemon that writes: where to, and what may be replaced there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from castore.catalog.connection import read_catalog_id, sqlite_errors
from castore.catalog.copy_file import copy_database
from castore.catalog.reader import CatalogReader
from castore.errors import StateError


@dataclass(frozen=True, slots=True)
class Backup:
    """What was written: the catalog as of one moment."""

    path: Path
    catalog_id: str
    size_bytes: int
    package_count: int
    entry_bytes: int
    last_event: int


class BackupReader(CatalogReader):
    """A connection that copies all it sees."""

    def back_up(self, target: Path, on_copied: Callable[[int, int], None] = lambda _done, _total: None) -> Backup:
        """Write the catalog to `target`, which may be an older backup of it. Blocking, in bounded memory.

        Raises StateError, CatalogFull, OSError, and what `on_copied` raises; then `target` is as it was.
        """
        self._check_target(target)
        with sqlite_errors(target):
            self._execute("BEGIN")
            try:
                package_count, entry_bytes = self.totals()
                last_event = self._one("SELECT coalesce(max(sequence), 0) FROM events")[0]
                copy_database(self._database.conn, target, on_copied)
            finally:
                self._execute("ROLLBACK")
        return Backup(target, self.catalog_id(), target.stat().st_size, package_count, entry_bytes, last_event)

    def _check_target(self, target: Path) -> None:
        if not target.parent.is_dir():
            raise StateError(f"{target}: there is no folder {target.parent}; make it, or give another FILE")
        if not os.path.lexists(target):
            return
        if not target.is_file() or target.is_symlink():
            raise StateError(f"{target}: is not a file; give another FILE")
        if target.samefile(self.path):
            raise StateError(f"{target}: is the catalog itself; give another FILE")
        if target.with_name(f"{target.name}-wal").exists():
            raise StateError(f"{target}: is a database that somebody uses; give another FILE")
        if read_catalog_id(target) != self.catalog_id():
            raise StateError(f"{target}: exists, and is no backup of this catalog; give another FILE")
