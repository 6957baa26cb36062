"""Something else in the place of the catalog: every command refuses it in one line, and changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from pysqlite3 import dbapi2 as sqlite3

from castore.catalog.schema import SCHEMA_VERSION
from tests.cli.conftest import Cli

COMMANDS = [
    "package list",
    "package import {home}/some other/1",
    "package delete some/1 --yes",
    "status",
    "mount {home}/mnt",
    "init",
    "storage verify",
    "storage gc --delete --grace 0s",
    "catalog check",
    "catalog backup {home}/backup.db",
    "catalog rebuild --backend local --add",
]


def _sql(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as raw:
        for statement in statements:
            raw.execute(statement)
        raw.commit()


def _text(path: Path) -> None:
    path.write_text("# not a database, but somebody's notes\n" * 300)


def _other_application(path: Path) -> None:
    path.unlink()
    _sql(path, "CREATE TABLE moz_places (id INTEGER)", "INSERT INTO moz_places VALUES (1)")


def _newer(path: Path) -> None:
    _sql(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 4)


def _cut_in_the_header(path: Path) -> None:
    os.truncate(path, 60)


def _acts(path: Path) -> None:
    _sql(path, "CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM packages; END")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


KINDS: dict[Callable[[Path], None], str] = {
    _text: "file is not a database",
    _other_application: "is a database of something else, not a catalog of castore",
    _newer: "use the newer castore",
    _cut: "malformed",
    _cut_in_the_header: "malformed",
    _acts: "castore makes none",
    _pipe: "is no file; move it away",
    _folder: "is no file; move it away",
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of somebody who has published a package."""
    home = tmp_path_factory.mktemp("published")
    (home / "some").mkdir()
    (home / "some/file").write_text("bytes")
    cli = Cli(home)
    cli("init")
    cli("package", "import", home / "some", "some/1")
    _sql(home / ".local/share/castore/catalog.db", "PRAGMA wal_checkpoint(TRUNCATE)")
    return home


def everything(folder: Path) -> dict[str, bytes]:
    """Path -> bytes, but for the locks that commands take and what SQLite keeps beside a database."""
    ignored = {".db-shm", ".db-wal", ".db-journal"}
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.suffix not in ignored and "run" not in path.parts
    }


@pytest.mark.parametrize("spoil", KINDS, ids=lambda spoil: spoil.__name__.strip("_"))
def test_is_refused_and_nothing_changes(published: Path, cli: Cli, spoil: Callable[[Path], None]) -> None:
    shutil.copytree(published, cli.home, dirs_exist_ok=True)
    # The settings name the home of who published.
    config = cli.home / ".config/castore/castore.toml"
    config.write_text(config.read_text().replace(str(published), str(cli.home)))
    spoil(cli.home / ".local/share/castore/catalog.db")
    (cli.home / "mnt").mkdir()
    before = everything(cli.home)
    for number, command in enumerate(COMMANDS):
        if number % len(KINDS) in {list(KINDS).index(spoil), 0, 4}:  # each command meets some, some meet all
            said = cli.error(*command.format(home=cli.home).split())
            assert KINDS[spoil] in said, command
            assert everything(cli.home) == before, command
