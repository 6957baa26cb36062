"""`castore storage repair`, as people and programs call it."""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from castore.catalog.connection import open_writer
from castore.config import LocalSettings, S3Settings
from castore.failpoint import VARIABLE
from castore.state_lock import living_owners, take_owner
from tests.cli.conftest import Cli
from tests.cli.test_storage_verify import FILES, Make, documents, everywhere, make
from tests.damage import cut_short, flip_a_bit, read_object, remove
from tests.places import Place, S3Place
from tests.published import PublishedStore
from tests.servers.s3_server import S3Server

__all__ = ["make"]


@everywhere
def test_from_another_backend(cli: Cli, make: Make) -> None:
    store, digests = make("main", "copy")
    tool, doc = digests[b"bin/tool"], digests[b"share/doc"]
    flip_a_bit(store.config.backends["main"], tool)
    remove(store.config.backends["copy"], doc)
    assert cli("storage", "repair").stdout.splitlines()[0].startswith("looked at 0 of 0 failed locations")
    cli("storage", "verify", code=1)
    lines = cli("storage", "repair", "--backend", "main").stdout.splitlines()
    assert lines[0] == f"repaired: 2000 bytes of {tool} in backend main, from backend copy"
    assert lines[1].startswith("looked at 1 of 1 failed locations, 2.0 KiB in ")
    assert lines[2] == "repaired: 1, verified: 0, no copy: 0, changed: 0, not repaired: 0"
    locations, summary = documents(cli("storage", "repair", "--json").stdout)
    (document,) = locations
    assert document.pop("duration_ms") >= 0
    assert document == {
        "backend_id": "copy",
        "digest": str(doc),
        "size_bytes": 3,
        "result": "repaired",
        "reason": "missing",
        "source": "backend",
        "source_backend_id": "main",
        "error": "",
        "packages": ["demo/1"],
    }
    assert (summary["repaired"], summary["exit_code"], summary["backends"]) == (1, 0, ["main", "copy"])
    cli("storage", "verify")


def test_nowhere_else_and_from_a_directory(cli: Cli, make: Make, tmp_path: Path) -> None:
    store, digests = make()
    digest = digests[b"share/\xff\n"]
    cut_short(store.config.backends["main"], digest)
    cli("storage", "verify", code=1)
    lines = cli("storage", "repair", code=1).stdout.splitlines()
    assert lines[:2] == [
        f"no good copy: 8 bytes of {digest} in backend main",
        "  demo/1: share/\\xff\\n",
    ]
    locations, _ = documents(cli("storage", "repair", "--json", code=1).stdout)
    assert locations[0]["paths"] == [{"package": "demo/1", "path": "share/\ufffd\n", "path_base64": "c2hhcmUv/wo="}]
    (tmp_path / "found").mkdir()
    (tmp_path / "found/anything").write_bytes(FILES[b"share/\xff\n"])
    lines = cli("storage", "repair", "--from", tmp_path / "found").stdout.splitlines()
    assert lines[0].endswith(" in backend main, from the directory")
    cli("storage", "verify")


def test_an_unreachable_backend(cli: Cli, make: Make, place: Place) -> None:
    store, digests = make("main", "copy")
    remove(store.config.backends["main"], digests[b"bin/tool"])
    cli("storage", "verify", code=1)
    with place.unreachable("copy"):
        done = cli("storage", "repair", code=2)
        assert done.stdout.startswith(f"not repaired: 2000 bytes of {digests[b'bin/tool']} in backend main: ")
    status = json.loads(cli("storage", "backends", "--json").stdout)["backends"][0]["by_status"]
    assert status == {"failed": 1, "verified": 3}
    cli("storage", "repair")
    assert read_object(store.config.backends["main"], digests[b"bin/tool"]) == FILES[b"bin/tool"]


def execute(store: PublishedStore, sql: str, *parameters: object) -> list[Any]:
    database = open_writer(store.catalog_path).conn
    try:
        return list(database.execute(sql, parameters).fetchall())
    finally:
        database.close()


def intents(store: PublishedStore) -> list[Any]:
    return execute(store, "SELECT digest, backend_id, owner FROM put_intents")


def test_killed(cli: Cli, make: Make) -> None:
    """At each of its steps, one after the other: the next run clears away what was left, and goes on."""
    store, digests = make("main", "copy")
    tool, settings = digests[b"bin/tool"], store.config.backends["main"]
    puts = store.config.store.puts_dir
    flip_a_bit(settings, tool)
    cli("storage", "verify", code=1)
    noted = {"repair.intended", "object.written", "object.renamed", "repair.put"}
    for point in ("repair.kept", *sorted(noted), "repair.recorded"):
        if read_object(settings, tool) == FILES[b"bin/tool"]:
            flip_a_bit(settings, tool)  # still failed, as far as the catalog knows
        cli("storage", "repair", code=-signal.SIGKILL, env=cli.environ | {VARIABLE: point})
        (owner,) = os.listdir(puts)  # of this run: that of the one before is gone
        assert intents(store) == ([(tool.raw, "main", owner)] if point in noted else [])
        status = execute(store, "SELECT DISTINCT status FROM storage_locations WHERE backend_id = 'main'")
        assert (("failed",) in status) == (point != "repair.recorded")
    flip_a_bit(settings, tool)
    cli("storage", "verify", code=1)
    cli("storage", "repair", code=-signal.SIGKILL, env=cli.environ | {VARIABLE: "object.written"})
    assert len(intents(store)) == 1
    cli("storage", "gc", "--delete")
    assert (intents(store), os.listdir(puts)) == ([], [])
    assert cli("storage", "repair").stdout.startswith(f"repaired: 2000 bytes of {tool}")
    assert (intents(store), os.listdir(puts)) == ([], [])
    assert isinstance(settings, LocalSettings)
    assert {path.name for path in settings.path.rglob("*") if path.is_file() and len(path.name) != 64} <= MARKS
    cli("storage", "verify")


MARKS = {"CASTORE-OBJECTS.txt"}
"""What a local backend has beside objects."""


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_killed_inside_an_object(cli: Cli, make: Make, place: S3Place, request: pytest.FixtureRequest) -> None:
    data = os.urandom(17 << 20)
    store, digests = make("main", "copy", files={b"large": data})
    settings = store.config.backends["main"]
    assert isinstance(settings, S3Settings)
    server: S3Server = request.getfixturevalue("s3_server")
    remove(settings, digests[b"large"])
    cli("storage", "verify", code=1)
    cli("storage", "repair", code=-signal.SIGKILL, env=cli.environ | {VARIABLE: "put.part"})
    with closing(server.client()) as client:
        below = {"Bucket": settings.bucket, "Prefix": settings.key_prefix}
        assert len(client.list_multipart_uploads(**below).get("Uploads", [])) == 1
        cli("storage", "gc", "--delete")
        assert client.list_multipart_uploads(**below).get("Uploads", []) == []
        cli("storage", "repair", code=-signal.SIGKILL, env=cli.environ | {VARIABLE: "put.part"})
        cli("storage", "repair")
        assert client.list_multipart_uploads(**below).get("Uploads", []) == []
    assert intents(store) == []
    assert read_object(settings, digests[b"large"]) == data


def test_what_lives_is_left_alone(cli: Cli, make: Make) -> None:
    store, digests = make()
    owner, descriptor = take_owner(store.config.store.puts_dir)
    raw = digests[b"bin/tool"].raw
    execute(store, "INSERT INTO put_intents VALUES ('sha256', ?, 'main', ?, 1)", raw, owner)
    cli("storage", "gc", "--delete")
    cli("storage", "repair")
    assert living_owners(store.config.store.puts_dir) == {owner}
    assert [row[2] for row in intents(store)] == [owner]
    os.close(descriptor)
    cli("storage", "repair")
    assert (intents(store), os.listdir(store.config.store.puts_dir)) == ([], [])


def test_a_directory_that_is_not_there(cli: Cli) -> None:
    assert "'nowhere' does not exist" in cli("storage", "repair", "--from", "nowhere", code=2).stderr
