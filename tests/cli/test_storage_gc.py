"""`castore storage gc` and `verify --orphans`: what goes, what stays, what a kill leaves. No daemon runs here."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from castore.catalog.connection import open_side_database, open_writer
from castore.catalog.writer import Transaction
from castore.digest import MANIFEST_ALGORITHM, Digest
from castore.errors import DeletionUnderWay
from castore.failpoint import COMMAND_POINTS, VARIABLE
from castore.registry.deletion import delete_package
from castore.storage.open import open_backend
from castore.storage.source import BytesSource
from castore.verify.collect import BATCH_OBJECTS, ENTRIES_AT_ONCE
from tests.cli.conftest import Cli
from tests.places import PLACES, Place, S3Place
from tests.published import PublishedStore, summary_of

everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
FILES = {b"a": b"a", b"sub/b": b"b" * 5000, b"sub/deep/c": b"c", b"twin": b"a"}
KEPT = {b"a": b"a", b"new": b"new"}
NOW = ("--delete", "--grace", "0s")


class Collecting:
    """A store with the backends `one` and `two`; demo/1 and demo/2 are in both, and share the bytes of `a`."""

    def __init__(self, root: Path, place: Place, cli: Cli) -> None:
        self.cli = cli
        self.place = place
        self.store = PublishedStore(root, place, "one", "two")
        cli.environ["CASTORE_CONFIG"] = str(self.store.config_path)
        trio.run(self._fill)

    async def _fill(self) -> None:
        await self.store.create()
        self.old = await self.store.publish("demo/1", FILES)
        self.kept = await self.store.publish("demo/2", KEPT)
        await self.store.aclose()

    def delete(self, version: str = "1") -> None:
        self.store.write(
            partial(delete_package, name="demo", version=version, uid=0, restore_within_seconds=1, reason="request")
        )

    def gc(self, *options: str, code: int = 0) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.cli("storage", "gc", "--json", *options, code=code).stdout)
        return document

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        database = open_writer(self.store.catalog_path).conn
        try:
            return list(database.execute(sql, parameters).fetchall())
        finally:
            database.close()

    def put(self, data: bytes, backend_id: str, algorithm: str = "sha256") -> Digest:
        """An object that the catalog does not know."""

        async def put() -> Digest:
            backend = open_backend(self.store.config.backends[backend_id])
            digest = summary_of(data, algorithm).digest
            await backend.put(digest, BytesSource(data))
            await backend.aclose()
            return digest

        return trio.run(put)

    def objects(self, backend_id: str) -> set[Digest]:
        async def listed() -> set[Digest]:
            backend = open_backend(self.store.config.backends[backend_id])
            found = set()
            for algorithm in ("sha256", MANIFEST_ALGORITHM):
                async with backend.list(algorithm) as objects:
                    async for info in objects:
                        found.add(info.digest)
            await backend.aclose()
            return found

        return trio.run(listed)

    def everything(self) -> list[Any]:
        tables = ("packages", "deleted_packages", "entries", "blobs", "storage_locations", "put_intents", "deletions")
        return [self.rows(f"SELECT * FROM {table}") for table in (*tables, "events")] + [
            sorted(self.objects(backend_id)) for backend_id in ("one", "two")
        ]

    def check_only_kept(self) -> None:
        """demo/2 is there, and of demo/1 nothing is left anywhere."""
        for backend_id in ("one", "two"):
            assert self.objects(backend_id) == set(self.kept.values())
        assert {Digest(*row) for row in self.rows("SELECT algorithm, digest FROM blobs")} == set(self.kept.values())
        assert {row[0] for row in self.rows("SELECT status FROM storage_locations")} == {"stored"}
        assert len(self.rows("SELECT * FROM storage_locations")) == 2 * len(set(self.kept.values()))
        assert self.rows("SELECT version FROM packages") == [("2",)]
        assert len(self.rows("SELECT * FROM entries")) == 1 + len(KEPT)
        for table in ("deleted_packages", "deletions", "put_intents"):
            assert self.rows(f"SELECT * FROM {table}") == []


@pytest.fixture
def collecting(tmp_path: Path, place: Place, cli: Cli) -> Collecting:
    return Collecting(tmp_path, place, cli)


@everywhere
def test_a_deleted_package_goes_after_its_grace(collecting: Collecting) -> None:
    collecting.delete()
    before = collecting.everything()
    assert collecting.gc("--delete")["expired_packages"] == []
    found = collecting.gc("--grace", "0s")
    assert (found["deletes"], found["expired_packages"]) == (False, ["demo/1"])
    assert collecting.everything() == before
    assert "nothing is deleted" in collecting.cli("storage", "gc").stdout

    done = collecting.gc(*NOW)
    assert (done["purged_count"], done["left_count"], done["waiting_packages"]) == (1, 0, [])
    collecting.check_only_kept()
    gone = {str(digest) for digest in collecting.old.values()} - {str(digest) for digest in collecting.kept.values()}
    events = [json.loads(row[0]) for row in collecting.rows("SELECT data FROM events WHERE type LIKE '%deleted'")]
    assert {event["digest"] for event in events if "digest" in event} == gone
    purged = collecting.rows("SELECT subject FROM events WHERE type = 'v1.package.purged'")
    assert purged == [("demo/1",)]
    assert [backend["deleted_count"] for backend in collecting.gc(*NOW)["backends"]] == [0, 0]
    assert collecting.cli("storage", "verify").returncode == 0


def test_what_is_put_or_in_a_package_stays(collecting: Collecting) -> None:
    async def store() -> Digest:
        collecting.store.reopen()
        staged = await collecting.store.store(b"stored, and in no package yet")
        await collecting.store.aclose()
        return staged.digest

    staged = trio.run(store)
    assert [backend["young_count"] for backend in collecting.gc("--delete")["backends"]] == [1, 1]
    # Somebody puts it in a third place: whoever that is will want it.
    collecting.store.write(lambda transaction: transaction.add_intents([(staged, "three")], owner="somebody"))
    collecting.gc(*NOW)
    assert staged in collecting.objects("one")
    collecting.store.write(lambda transaction: transaction.drop_intents([(staged, "three")]))
    collecting.gc(*NOW)
    for backend_id in ("one", "two"):
        assert collecting.objects(backend_id) == {*collecting.old.values(), *collecting.kept.values()}


@everywhere
def test_orphans(collecting: Collecting) -> None:
    orphan = collecting.put(b"an orphan", "one")
    begun = collecting.put(b"somebody puts it just now", "one")
    collecting.store.write(lambda transaction: transaction.add_intents([(begun, "one")], owner="somebody"))
    listed = collecting.cli("storage", "verify", "--orphans", "--json", code=1).stdout.splitlines()
    documents = [json.loads(line) for line in listed]
    assert [(one["digest"], one["backend_id"]) for one in documents[:-1]] == [(str(orphan), "one")]
    assert documents[-1]["orphan_count"] == 1
    assert str(orphan) in collecting.cli("storage", "verify", "--orphans", "--backend", "one", code=1).stdout
    collecting.cli("storage", "verify", "--orphans", "--backend", "two")
    assert collecting.gc("--delete")["backends"][0]["young_count"] == 1
    assert collecting.gc(*NOW, "--no-orphans")["backends"][0]["orphan_count"] == 0
    assert orphan in collecting.objects("one")
    done = collecting.gc(*NOW)["backends"][0]
    assert (done["orphan_count"], done["deleted_count"]) == (1, 1)
    assert collecting.objects("one") == {*collecting.old.values(), *collecting.kept.values(), begun}
    assert collecting.rows("SELECT * FROM deletions") == []
    data = json.loads(collecting.rows("SELECT data FROM events ORDER BY sequence DESC LIMIT 1")[0][0])
    assert (data["digest"], data["reason"]) == (str(orphan), "orphan")


def test_packages_that_the_catalog_does_not_know_stop_it(collecting: Collecting) -> None:
    """An older catalog that was restored must not lose what came since."""
    collecting.delete()
    manifest = collecting.put(b"a manifest", "one", MANIFEST_ALGORITHM)
    blob = collecting.put(b"of that package", "one")
    done = collecting.gc(*NOW, code=2)["backends"]
    assert (done[0]["unknown_package_count"], done[0]["unneeded_count"]) == (1, 0)
    assert "run `castore catalog rebuild`" in done[0]["stopped"]
    assert done[1]["stopped"] == ""
    assert {manifest, blob, collecting.old[b"sub/b"]} <= collecting.objects("one")
    assert collecting.objects("two") == set(collecting.kept.values())
    collecting.gc(*NOW, "--unknown-packages")
    collecting.check_only_kept()


def test_marks_of_an_older_catalog_delete_nothing_that_came_since(collecting: Collecting) -> None:
    """It was backed up during a collection; the same bytes were put since, for a package that it does not know."""
    collecting.delete()
    collecting.cli("storage", "gc", *NOW, code=-signal.SIGKILL, env=collecting.cli.environ | {VARIABLE: "gc.marked"})
    assert (collecting.old[b"sub/b"].raw, "one") in collecting.rows("SELECT digest, backend_id FROM deletions")
    collecting.put(b"a manifest", "one", MANIFEST_ALGORITHM)
    done = collecting.gc(*NOW, code=2)
    assert done["left_count"] == len(collecting.rows("SELECT 1 FROM deletions")) > 0
    assert collecting.old[b"sub/b"] in collecting.objects("one")
    collecting.gc(*NOW, "--unknown-packages")
    collecting.check_only_kept()


def test_a_backend_that_is_away(collecting: Collecting) -> None:
    """The manifest goes before any blob: where it cannot be deleted, nothing is."""
    collecting.delete()
    with collecting.place.unreachable("two"):
        assert collecting.gc(*NOW, code=2)["waiting_packages"] == ["demo/1"]
        assert set(collecting.old.values()) - {collecting.old[b""]} <= collecting.objects("one")
        assert collecting.cli("package", "restore", "demo/1", code=2).stderr.count("has begun to remove it") == 1
    collecting.gc(*NOW)
    collecting.check_only_kept()


@pytest.mark.parametrize("point", [point for point in COMMAND_POINTS if point.startswith("gc.")])
def test_killed(collecting: Collecting, point: str) -> None:
    collecting.delete()
    orphan = collecting.put(b"an orphan", "two")
    environ = collecting.cli.environ | {VARIABLE: point}
    collecting.cli("storage", "gc", *NOW, code=-signal.SIGKILL, env=environ)
    manifest = collecting.old[b""]
    if any(manifest in collecting.objects(backend_id) for backend_id in ("one", "two")):
        # A rebuild would find the package: all of it has to be there.
        for backend_id in ("one", "two"):
            assert set(collecting.old.values()) - {manifest} <= collecting.objects(backend_id)
    for backend_id in ("one", "two"):
        assert set(collecting.kept.values()) <= collecting.objects(backend_id)
    collecting.gc(*NOW)
    assert orphan not in collecting.objects("two")
    collecting.check_only_kept()


def test_more_than_one_transaction_takes(collecting: Collecting) -> None:
    """Killed between two of them, what is left of a package still hangs below its root."""

    async def publish() -> None:
        collecting.store.reopen()
        await collecting.store.publish("large/1", {b"dir/%d" % number: b"%d" % number for number in range(300)}, "one")
        await collecting.store.aclose()

    trio.run(publish)
    collecting.rows(
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i <= {ENTRIES_AT_ONCE}) "
        "INSERT INTO entries SELECT 100000 + i, parent_id, CAST('more ' || i AS BLOB), 100000 + i, kind, "
        "mode, uid, gid, mtime_ns, ctime_ns, size_bytes, nlink, blob_id, target, 0 FROM n, entries WHERE name = x'3139'"
    )
    count = len(collecting.rows("SELECT 1 FROM entries"))
    collecting.delete()
    collecting.store.write(
        partial(delete_package, name="large", version="1", uid=0, restore_within_seconds=1, reason="request")
    )
    environ = collecting.cli.environ | {VARIABLE: "gc.entries_gone:2"}  # the first is of demo/1
    collecting.cli("storage", "gc", *NOW, code=-signal.SIGKILL, env=environ)
    left = len(collecting.rows("SELECT 1 FROM entries"))
    assert 300 < left < count - ENTRIES_AT_ONCE
    adrift = "SELECT 1 FROM entries AS here WHERE parent_id > 0 AND NOT EXISTS (SELECT 1 FROM entries AS above WHERE "
    adrift += "above.entry_id = here.parent_id UNION ALL SELECT 1 FROM package_names WHERE inode = here.parent_id)"
    assert collecting.rows(adrift) == []
    done = collecting.gc(*NOW)["backends"][0]
    assert done["deleted_count"] > BATCH_OBJECTS
    collecting.check_only_kept()


def test_a_killed_one_of_a_remote_backend_is_given_time(
    tmp_path: Path, cli: Cli, request: pytest.FixtureRequest
) -> None:
    """What it sent may still be under way: puts wait for that, and so does the next one."""
    with ExitStack() as relays:
        collecting = Collecting(tmp_path, S3Place(tmp_path, request.getfixturevalue("s3_server"), relays), cli)
        collecting.delete()
        environ = cli.environ | {VARIABLE: "gc.manifest_marked"}
        cli("storage", "gc", *NOW, code=-signal.SIGKILL, env=environ)
        assert collecting.gc(*NOW, code=2)["left_count"] == 2
        with pytest.raises(DeletionUnderWay):
            collecting.store.write(partial(Transaction.add_intents, pairs=[(collecting.old[b""], "one")], owner="me"))
        collecting.rows("UPDATE deletions SET begun_at_ns = begun_at_ns - 121000000000")
        collecting.gc(*NOW)
        collecting.check_only_kept()


def test_one_at_a_time(collecting: Collecting) -> None:
    path = collecting.store.config.store.gc_lock_path
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another garbage collection runs" in collecting.cli.error("storage", "gc", "--delete")
        collecting.gc()


def test_cached_bytes_go_too(collecting: Collecting) -> None:
    collecting.rows("UPDATE entries SET size_bytes = 5000 WHERE name = x'62'")
    config = collecting.store.config_path
    config.write_text(config.read_text().replace("[cache]", "[cache]\nsame_disk = true\ntiny_bytes = 100"))
    collecting.cli("cache", "warm", "demo/1")
    collecting.cli("package", "export", "demo/1", collecting.cli.home / "out")
    blocks = collecting.store.root / "cache/blocks"
    names = {name.partition(".")[0] for _, _, files in os.walk(blocks) for name in files}
    assert collecting.old[b"sub/b"].hex in names
    collecting.delete()
    collecting.gc(*NOW)
    names = {name.partition(".")[0] for _, _, files in os.walk(blocks) for name in files}
    assert collecting.old[b"sub/b"].hex not in names
    left = tiny_digests(collecting.store.config.store.tiny_path)
    assert collecting.old[b"sub/deep/c"].raw not in left


def tiny_digests(path: Path) -> set[bytes]:
    database = open_side_database(path, "SELECT 1")
    try:
        return {row[0] for row in database.execute("SELECT digest FROM tiny").fetchall()}
    finally:
        database.close()
