"""A catalog of every version of the tables, as SQL text, with rows in each table that the version has.

python -m tests.catalog.versions
    writes those that are absent, each from the one before it, up to the newest: run it when a migration is added, and
    never change what is there.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from sqlite3.dump import _iterdump  # type: ignore[attr-defined]
from typing import Final

from pysqlite3 import dbapi2 as sqlite3

from castore.catalog.schema import SCHEMA_VERSION, catalog_migrations

FOLDER: Final = Path(__file__).parent


def path_of(version: int) -> Path:
    """The file of a version."""
    return FOLDER / f"{version}.sql"


def load(version: int, path: Path) -> None:
    """Make a catalog of that version, as castore left it then."""
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode = WAL")
        raw.executescript(path_of(version).read_text())
        raw.execute(f"PRAGMA user_version = {version}")


def write_next(version: int) -> None:
    """Write the file of a version from that of the one before."""
    names = [name for name, _ in catalog_migrations.steps]
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as raw:
        raw.executescript(path_of(version - 1).read_text())
        catalog_migrations.apply(raw, stop_before=names[version] if version < len(names) else None)
        path_of(version).write_text("\n".join(_iterdump(raw)) + "\n")


def main() -> None:
    for version in range(2, SCHEMA_VERSION + 1):
        if not path_of(version).exists():
            write_next(version)
            print(path_of(version))
