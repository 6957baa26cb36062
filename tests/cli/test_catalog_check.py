"""`castore catalog check`: what it prints and how it exits. Whether each rule is found is tests/catalog's business."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from pysqlite3 import dbapi2 as sqlite3

from castore.catalog.schema import SCHEMA_VERSION
from tests.cli.conftest import Cli
from tests.mount.store import MountedStore


@pytest.fixture
def catalog(cli: Cli) -> Path:
    """The catalog that a new store has, at the place where castore looks for it."""
    cli("init")
    return cli.home / ".local/share/castore/catalog.db"


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as raw:
        raw.execute(statement)
        raw.commit()


def test_beside_a_daemon(store: MountedStore) -> None:
    (store.mnt / "ingest/zlib/1.3/lib").mkdir(parents=True)
    (store.mnt / "ingest/zlib/1.3/lib/a").write_bytes(b"a" * 300_000)
    (store.mnt / "ingest/zlib/1.3/b").hardlink_to(store.mnt / "ingest/zlib/1.3/lib/a")
    (store.mnt / "ingest/zlib/1.3/c").symlink_to("lib/a")
    store.publish("zlib/1.3")
    assert ": sound; " in store.castore("catalog", "check")
    document = json.loads(store.castore("catalog", "check", "--json"))
    assert document["is_sound"]
    assert document["findings"] == []
    assert {check["count"] for check in document["checks"]} == {0}


def test_what_is_wrong_has_a_line_and_a_mend(cli: Cli, catalog: Path) -> None:
    change(catalog, "UPDATE sequences SET next_value = 1")
    done = cli("catalog", "check", code=1)
    assert "sequences: sequences: the next inode is 1, but 0 is used\n  mend: restore a backup, or move" in done.stdout
    assert done.stdout.endswith("s\n")
    assert "1 things are wrong" in done.stdout
    document = json.loads(cli("catalog", "check", "--json", code=1).stdout)
    assert [(finding["check"], finding["where"]) for finding in document["findings"]] == [("sequences", "sequences")]


def test_a_file_by_name(cli: Cli, catalog: Path, tmp_path: Path) -> None:
    catalog.rename(tmp_path / "elsewhere.db")
    assert "there is no catalog" in cli.error("catalog", "check")
    assert "sound" in cli("catalog", "check", tmp_path / "elsewhere.db").stdout


@pytest.mark.parametrize(
    ("made_by", "says"),
    [
        ("CREATE TABLE moz_places (id INTEGER)", "is a database of something else, not a catalog of castore"),
        (f"PRAGMA user_version = {SCHEMA_VERSION}", "is missing"),
    ],
)
def test_a_foreign_database(cli: Cli, tmp_path: Path, made_by: str, says: str) -> None:
    path = tmp_path / "foreign.db"
    change(path, made_by)
    before = path.read_bytes()
    if "moz" in made_by:
        assert says in cli.error("catalog", "check", path)
    else:
        assert cli("catalog", "check", path, code=1).stdout.count("is missing") > 5
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "hook",
    [
        "CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM blobs; END",
        "CREATE VIEW v AS SELECT load_extension('x')",
    ],
)
def test_what_could_act_by_itself_is_refused(cli: Cli, catalog: Path, hook: str) -> None:
    change(catalog, hook)
    assert "and castore makes none" in cli.error("catalog", "check")
    assert "and castore makes none" in cli.error("package", "list")
    assert "and castore makes none" in cli.error("init")


def test_init_leaves_a_foreign_database_alone(cli: Cli, catalog: Path) -> None:
    """Also one that says nothing of its version; no table comes into it."""
    catalog.unlink()
    change(catalog, "CREATE TABLE moz_places (id INTEGER)")
    before = catalog.read_bytes()
    assert "is a database of something else" in cli.error("init")
    assert catalog.read_bytes() == before


def test_a_workspace_is_no_catalog(store: MountedStore) -> None:
    done = store.run("catalog", "check", str(store.state / "staging/workspace.db"))
    assert done.returncode == 2
    assert "is a database of something else, not a catalog of castore" in done.stderr


def test_a_newer_one(cli: Cli, catalog: Path) -> None:
    change(catalog, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    assert "use the newer castore" in cli.error("catalog", "check")
