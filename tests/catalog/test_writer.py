"""Transactions of the catalog: whole or not at all, one at a time, and what each change does."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest
import trio
from pysqlite3 import dbapi2 as sqlite3

from castore.catalog.records import FailureReason, LocationStatus
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import SHA256_BLOCKS, BlobHasher, BlobSummary, Digest
from castore.errors import CatalogBusy, StateError
from castore.events import PACKAGE_PUBLISHED, Event
from tests.catalog.catalogs import MANIFEST, ROOT, Catalog, summary_of

ONE = summary_of(b"one")
TWO = summary_of(b"two")


class Interrupted(BaseException):
    """As a cancellation: no Exception."""


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_all_or_nothing(catalog: Catalog, error: type[BaseException]) -> None:
    def work(transaction: Transaction) -> None:
        transaction.add_locations([(ONE, "local")])
        raise error

    with pytest.raises(error):
        catalog.change(work)
    assert catalog.reader.blob_by_digest(ONE.digest) is None
    assert catalog.change(lambda transaction: transaction.blob_id(ONE.digest)) == 0


def test_a_commit_is_seen_at_once(catalog: Catalog) -> None:
    blob_id = catalog.change(lambda transaction: transaction.ensure_blob(ONE))
    blob = catalog.reader.blob(blob_id)
    assert blob is not None
    assert blob.summary == ONE


async def test_one_at_a_time(catalog: Catalog) -> None:
    """Each reads and writes the sequence: with two at a time, numbers would be given twice."""
    starts: list[int] = []

    async def lease() -> None:
        starts.append(await catalog.writer.run(lambda transaction: transaction.lease_inodes(10)))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(lease)
    assert sorted(starts) == list(range(min(starts), min(starts) + 200, 10))


LEASE = """
import sys
from pathlib import Path
from castore.catalog.writer import CatalogWriter
writer = CatalogWriter(Path(sys.argv[1]))
for _ in range(200):
    print(writer.run_sync(lambda transaction: transaction.lease_inodes(3)))
"""


def test_processes_wait_for_each_other(catalog: Catalog) -> None:
    command = [sys.executable, "-c", LEASE, str(catalog.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    starts = [int(line) for process in processes for line in process.communicate(timeout=60)[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(starts)) == 600
    assert sorted(starts) == list(range(min(starts), min(starts) + 1800, 3))


def test_a_lock_that_is_held_too_long(catalog: Catalog) -> None:
    with closing(sqlite3.connect(catalog.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        catalog.writer._connection.execute("PRAGMA busy_timeout = 50")
        with pytest.raises(CatalogBusy, match="another process holds the write lock"):
            catalog.change(lambda transaction: transaction.lease_inodes(1))
        other.execute("ROLLBACK")
    assert catalog.change(lambda transaction: transaction.lease_inodes(1)) >= 1024


async def test_cancelled_when_begun_it_is_done_all_the_same(catalog: Catalog) -> None:
    begun = trio.Event()

    def work(transaction: Transaction) -> None:
        trio.from_thread.run_sync(begun.set)
        transaction.ensure_blob(ONE)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(catalog.writer.run, work)
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert catalog.reader.blob_by_digest(ONE.digest) is not None


def test_intents(catalog: Catalog) -> None:
    pairs = [(ONE.digest, "local"), (TWO.digest, "local"), (ONE.digest, "remote")]
    catalog.change(lambda transaction: transaction.add_intents(pairs, owner="dead"))
    catalog.change(lambda transaction: transaction.add_intents(pairs[:1], owner="alive"))
    catalog.change(lambda transaction: transaction.drop_intents(pairs[1:2]))
    assert catalog.change(lambda transaction: transaction.intents_of_others("alive")) == [(ONE.digest, "remote")]
    catalog.change(lambda transaction: transaction.drop_intents_of_others(pairs, "alive"))
    assert catalog.change(lambda transaction: transaction.intents_of_others("nobody")) == [(ONE.digest, "local")]
    catalog.change(lambda transaction: transaction.add_locations([(ONE, "local")]))
    assert catalog.change(lambda transaction: transaction.intents_of_others("nobody")) == []


def test_a_location_from_put_to_failure_and_back(catalog: Catalog) -> None:
    def status() -> list[tuple[str, LocationStatus, str]]:
        blob_id = catalog.change(lambda transaction: transaction.blob_id(ONE.digest))
        return [(place.backend_id, place.status, place.reason) for place in catalog.reader.locations(blob_id)]

    def fail(backend_id: str, reason: FailureReason) -> bool:
        return catalog.change(lambda transaction: transaction.fail_location(ONE.digest, backend_id, reason))

    def good() -> set[str]:
        return catalog.change(lambda transaction: transaction.good_backends(ONE.digest))

    catalog.change(lambda transaction: transaction.add_locations([(ONE, "local"), (ONE, "remote")]))
    assert status() == [("local", LocationStatus.STORED, ""), ("remote", LocationStatus.STORED, "")]
    assert good() == {"local", "remote"}
    assert fail("local", FailureReason.MISSING)
    assert not fail("local", FailureReason.DIGEST_MISMATCH), "the first reason stays"
    assert not fail("elsewhere", FailureReason.MISSING)
    assert status()[0] == ("local", LocationStatus.FAILED, "missing")
    assert good() == {"remote"}
    catalog.change(lambda transaction: transaction.add_locations([(ONE, "local")]))
    assert status()[0] == ("local", LocationStatus.STORED, "")
    assert good() == {"local", "remote"}


def test_one_blob_for_the_same_bytes(catalog: Catalog) -> None:
    """And another for a manifest with the same digest: the algorithm is part of the name."""
    first, again, other = (
        catalog.change(lambda transaction, summary=summary: transaction.ensure_blob(summary))  # type: ignore[misc]
        for summary in (ONE, ONE, replace(ONE, digest=Digest("manifest-sha256", ONE.digest.raw)))
    )
    assert first == again != other
    assert catalog.change(lambda transaction: transaction.size_bytes(ONE.digest)) == 3
    with pytest.raises(KeyError):
        catalog.change(lambda transaction: transaction.size_bytes(TWO.digest))


def test_long_checksums_replace_short_ones_only(catalog: Catalog) -> None:
    """And it is no scan of all blobs."""

    def long_of(data: bytes) -> BlobSummary:
        hasher = BlobHasher(checksum_algorithm=SHA256_BLOCKS)
        hasher.update(data)
        return hasher.finish()

    one, two = catalog.fill_version()
    other = summary_of(b"of no version")
    known = [(each, "local") for each in (one, long_of(b""), other)]
    catalog.change(lambda transaction: transaction.add_locations(known))
    catalog.store.set_summary(2003, long_of(b"one"))
    statements: list[str] = []

    def work(transaction: Transaction) -> list[str]:
        transaction._connection.set_trace_callback(statements.append)
        transaction.strengthen_checksums(ROOT)
        transaction._connection.set_trace_callback(None)
        [look] = (statement for statement in statements if statement.startswith("SELECT"))
        return [row[3].split()[0] for row in transaction._execute(f"EXPLAIN QUERY PLAN {look}")]

    assert catalog.change(work) == ["SEARCH", "SEARCH"]
    for digest, summary in ((one.digest, long_of(b"one")), (two.digest, long_of(b"")), (other.digest, other)):
        blob = catalog.reader.blob_by_digest(digest)
        assert blob is not None
        assert blob.summary == summary


def test_the_files_that_are_not_stored(catalog: Catalog) -> None:
    one, two = catalog.fill_version()

    def unstored() -> int:
        return catalog.change(lambda transaction: transaction.unstored_file(ROOT, "local"))

    assert unstored() in (2003, 2004)
    catalog.change(lambda transaction: transaction.add_locations([(two, "local"), (one, "remote")]))
    assert unstored() == 2003
    catalog.change(lambda transaction: transaction.add_locations([(one, "local")]))
    assert unstored() == 0
    catalog.change(lambda transaction: transaction.fail_location(two.digest, "local", FailureReason.MISSING))
    assert unstored() == 2004


def test_a_publish(catalog: Catalog) -> None:
    blobs = catalog.fill_version()
    catalog.change(lambda transaction: transaction.add_locations([(blob, "local") for blob in blobs]))
    assert not catalog.change(lambda transaction: transaction.package_exists("zlib", "1.3"))
    catalog.publish(owner=(100, 200))
    assert catalog.change(lambda transaction: transaction.package_exists("zlib", "1.3"))
    assert catalog.change(lambda transaction: transaction.is_published(ROOT, MANIFEST.digest.raw))
    assert not catalog.change(lambda transaction: transaction.is_published(ROOT, blobs[0].digest.raw))
    package = catalog.reader.package("zlib", "1.3")
    assert package is not None
    assert (package.file_count, package.size_bytes, package.manifest_digest) == (3, 3, MANIFEST.digest)
    names = {entry.name: entry for entry in catalog.reader.children(ROOT, 0, 100)}
    assert set(names) == {b"dir", b"two", b"hard link", b"link"}
    assert {(entry.uid, entry.gid, entry.ctime_ns) for entry in names.values()} == {(100, 200, 5)}
    with pytest.raises(StateError, match="UNIQUE"):
        catalog.publish()


def test_the_first_publish_decides_owner_and_mode(catalog: Catalog) -> None:
    def name(version: str, uid: int, now_ns: int) -> int:
        return catalog.change(
            lambda transaction: transaction.add_package_name(
                "zlib", inode=uid, latest_inode=uid + 1, uid=uid, gid=0, mode=0o700, now_ns=now_ns, version=version
            )
        )

    assert name("1", 10, 1) == name("2", 20, 2) == 10
    known = catalog.reader.package_name("zlib")
    assert known is not None
    assert (known.uid, known.latest_inode, known.latest_version, known.mtime_ns) == (10, 11, "2", 2)


def test_events_come_with_the_change(catalog: Catalog) -> None:
    data = {
        "name": "zlib",
        "version": "1.3",
        "producer": "ci",
        "retention_class": "release",
        "publisher_uid": 7,
        "backend_ids": ["local"],
        "file_count": 1,
        "size_bytes": 2,
        "manifest_digest": str(MANIFEST.digest),
    }
    events = [Event(type=PACKAGE_PUBLISHED, subject="zlib/1.3", data=data, time_ns=number) for number in (7, 3)]
    for event in events:
        catalog.change(lambda transaction, event=event: transaction.add_event(event))  # type: ignore[misc]
    with closing(sqlite3.connect(catalog.path)) as raw:
        rows = raw.execute("SELECT sequence, event_id, type, subject, time_ns FROM events").fetchall()
        texts = raw.execute("SELECT data FROM events").fetchall()
    assert rows == [
        (number, event.event_id, PACKAGE_PUBLISHED, "zlib/1.3", event.time_ns) for number, event in enumerate(events, 1)
    ]
    assert [json.loads(text) for [text] in texts] == [data, data]


def test_the_workspace_is_attached_for_reading_only(catalog: Catalog) -> None:
    with pytest.raises(StateError, match="readonly"):
        catalog.change(lambda transaction: transaction._execute("DELETE FROM workspace.nodes"))
    with pytest.raises(StateError, match="no such table"):
        catalog.writer.run_sync(lambda transaction: transaction.version_totals(ROOT))


def test_two_writers_of_one_process(catalog: Catalog) -> None:
    with closing(CatalogWriter(catalog.path)) as other:
        first = other.run_sync(lambda transaction: transaction.lease_inodes(5))
    assert catalog.change(lambda transaction: transaction.lease_inodes(1)) == first + 5
