"""Proving a catalog: SQLite's own checks, the tables as castore makes them, and all that `checks` says. Reads only.

Everything is seen as of one moment. Memory stays the same whatever the catalog holds: SQLite sorts on disk, and of each
check some findings are kept and the others counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from castore.catalog import schema
from castore.catalog.checks import CHECKS, RESTORE, Check
from castore.catalog.connection import Database, open_in_memory
from castore.catalog.reader import CatalogReader
from castore.errors import CatalogBusy, StateError

FINDINGS_KEPT: Final = 20
"""Of each check; how many more there are is counted."""
_TICK: Final = 2_000_000
"""Steps of SQLite's machine between two looks at whether the run was interrupted: some 50 ms."""
_LEVELS_NAMED: Final = 64
"""Directories of a path that a finding names."""

# The tree of one package. UNION: a directory that was reached already ends it, whatever is wrong with the rows.
_TREE: Final = """
WITH RECURSIVE folder(inode) AS (
    SELECT :root UNION SELECT entries.inode FROM folder JOIN entries ON parent_id = folder.inode WHERE kind = 1
)
SELECT count(*), coalesce(sum(kind = 2), 0), coalesce(sum(iif(kind = 2 AND entry_id = entries.inode, size_bytes, 0)), 0)
FROM folder JOIN entries ON parent_id = folder.inode
"""
# Directories that lead up to no NAME: they lie in each other.
_ADRIFT: Final = """
SELECT entry_id FROM entries AS here WHERE kind = 1 AND NOT EXISTS (
    WITH RECURSIVE up(id) AS (
        SELECT here.parent_id UNION SELECT above.parent_id FROM up JOIN entries AS above ON above.entry_id = up.id
    ) SELECT 1 FROM up JOIN package_names ON inode = up.id)
"""
# Whether an entry lies in a deleted package.
_DELETED: Final = """
WITH RECURSIVE up(id) AS (
    SELECT ? UNION SELECT above.parent_id FROM up JOIN entries AS above ON above.entry_id = up.id
) SELECT is_purging FROM up JOIN deleted_packages ON root_id = up.id
"""


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong: what and where, and how to mend it."""

    check: str
    where: str
    what: str
    mend: str


@dataclass(slots=True)
class CheckResult:
    """What one check found: `count` troubles, of which up to FINDINGS_KEPT are kept."""

    name: str
    title: str
    count: int = 0
    kept: list[Trouble] = field(default_factory=list)
    seconds: float = 0.0


class CheckReader(CatalogReader):
    """A connection that looks at everything."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._stop = False
        self._database.conn.set_progress_handler(lambda: self._stop, _TICK)

    def stop(self) -> None:
        """End a run that is under way, from any thread: it raises InterruptedError."""
        self._stop = True

    def run(self, on_begin: Callable[[str, int, int], None]) -> Iterator[CheckResult]:
        """Every check, one after the other; `on_begin` learns the title of each, its number and how many there are.

        Raises InterruptedError, and CatalogBusy.
        """
        steps: list[tuple[str, str, str, Callable[[], Iterator[tuple[Any, str]]]]] = [
            ("sqlite", "SQLite finds every page and index sound", RESTORE, self._integrity),
            ("foreign-keys", "rows that name others find them", RESTORE, self._foreign_keys),
            ("schema", "the tables are castore's", RESTORE, self._schema),
            ("types", "every value is of its column's type", RESTORE, self._types),
        ]
        tables = self._tables()
        for check in CHECKS:
            if check.needs not in tables:
                continue
            steps.append((check.name, check.title, check.mend, partial(self._breaking, check)))
        steps.append(
            ("trees", "packages have the files and bytes that they say, and nothing lies astray", RESTORE, self._trees)
        )
        self._execute("BEGIN")
        try:
            for number, (name, title, mend, rows) in enumerate(steps, 1):
                on_begin(title, number, len(steps))
                yield self._result(name, title, mend, rows)
        finally:
            self._stop = False
            self._execute("ROLLBACK")

    def _result(self, name: str, title: str, mend: str, rows: Callable[[], Iterator[tuple[Any, str]]]) -> CheckResult:
        result = CheckResult(name, title)
        began = time.monotonic()
        kept: list[tuple[Any, str]] = []
        try:
            for where, what in rows():
                result.count += 1
                if len(kept) < FINDINGS_KEPT:
                    kept.append((where, what))
        except CatalogBusy:
            raise
        except StateError as exc:
            if self._stop:
                raise InterruptedError from exc
            # What is damaged cannot be asked everything; the other checks go on.
            result.count += 1
            kept.append((str(self.path), f"cannot be read to the end: {exc.__cause__ or exc}"))
        result.kept = [Trouble(name, self._named(where), what, mend) for where, what in kept]
        result.seconds = time.monotonic() - began
        return result

    def _breaking(self, check: Check) -> Iterator[tuple[Any, str]]:
        for where, what in self._rows(check.sql):
            if check.holds_in_purge or not self._deletion(where)[1]:
                yield where, what

    def _deletion(self, entry_id: int) -> tuple[bool, bool]:
        """Whether an entry lies in a deleted package, and whether that one is being purged."""
        if "deleted_packages" not in self._tables():
            return False, False
        row = self._one(_DELETED, entry_id)
        return row is not None, row is not None and bool(row[0])

    def _named(self, where: Any) -> str:
        """A place in words: of an entry_id, its path as far as it leads up."""
        if not isinstance(where, int):
            return str(where)
        parts: list[str] = []
        inode = where
        try:
            for _ in range(_LEVELS_NAMED):
                row = self._one("SELECT name, parent_id FROM entries WHERE entry_id = ?", inode)
                if row is None:
                    break
                parts.append(row[0].decode(errors="surrogateescape") if isinstance(row[0], bytes) else str(row[0]))
                inode = row[1]
            row = self._one("SELECT name FROM package_names WHERE inode = ?", inode)
        except StateError:
            row = None
        if row is not None:
            parts.append(row[0])
        return f"entry {where}" + (f" ({'/'.join(reversed(parts))})" if parts else "")

    def _tables(self) -> set[str]:
        return {row[0] for row in self._rows("SELECT name FROM sqlite_schema WHERE type = 'table'")}

    # SQLite's own

    def _integrity(self) -> Iterator[tuple[Any, str]]:
        for (said,) in self._rows("PRAGMA integrity_check(1000)"):
            if said != "ok":
                yield str(self.path), said

    def _foreign_keys(self) -> Iterator[tuple[Any, str]]:
        for table, rowid, parent, _ in self._rows("PRAGMA foreign_key_check"):
            yield (
                table,
                f"row {'' if rowid is None else rowid} names what is not in {parent}".replace("row  ", "a row "),
            )

    def _schema(self) -> Iterator[tuple[Any, str]]:
        wanted = _schema_of(_fresh().execute)
        found = _schema_of(self._execute)
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found:
                yield name, "is missing"
            elif name not in wanted:
                # Names with an underscore belong to those who replicate and migrate.
                if not name.startswith("_"):
                    yield name, "is not castore's"
            elif found[name] != wanted[name]:
                yield name, "is not made as castore makes it"

    def _types(self) -> Iterator[tuple[Any, str]]:
        database = _fresh()
        tables = database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        for (table,) in tables:
            columns = [(row[1], row[2].lower()) for row in database.execute(f"PRAGMA table_info({table})")]
            if table.startswith(("_", "sqlite_")):
                continue
            keys = [row[1] for row in database.execute(f"PRAGMA table_info({table})") if row[5]]
            where = " || ' ' || ".join(f"quote({key})" for key in keys)
            cases = " ".join(f"WHEN typeof({name}) <> '{kind}' THEN '{name}'" for name, kind in columns)
            yield from self._rows(
                f"SELECT '{table} ' || {where}, CASE {cases} END || ' is of another type' AS what "
                f"FROM {table} WHERE what IS NOT NULL"
            )

    # trees

    def _trees(self) -> Iterator[tuple[Any, str]]:
        reached = 0
        packages = self._rows("SELECT name || '/' || version, root_id, file_count, size_bytes FROM packages")
        for ref, root_id, file_count, size_bytes in packages:
            entries, files, size = self._one(_TREE, root_id)
            reached += 1 + entries
            if (files, size) != (file_count, size_bytes):
                yield ref, f"says {file_count} files and {size_bytes} bytes, and has {files} files and {size} bytes"
        if "deleted_packages" in self._tables():
            # One that is being purged loses its entries bit by bit.
            roots = "SELECT root_id FROM deleted_packages JOIN entries ON entry_id = root_id"
            reached += sum(1 + self._one(_TREE, root_id)[0] for (root_id,) in self._rows(roots))
        (count,) = self._one("SELECT count(*) FROM entries")
        if count != reached:
            yield "entries", f"there are {count}, but packages lead to {reached}"
            for (entry_id,) in self._rows(_ADRIFT):
                if not self._deletion(entry_id)[0]:
                    yield entry_id, "no package leads to this directory"


def _fresh() -> Database:
    """An empty catalog of this castore, in memory."""
    database = open_in_memory()
    schema.catalog_migrations.apply(database.conn)
    return database


def _schema_of(execute: Callable[..., Any]) -> dict[str, str]:
    rows = execute(
        "SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%' AND tbl_name NOT LIKE 'sqlite_%'"
    )
    return {row[0]: row[1] or "" for row in rows}
