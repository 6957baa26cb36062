"""Copying between real backends: what arrives, what is recorded, what a bad object or backend does, going on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import pytest
import trio
import trio.testing

from castore.catalog.copying import CopyReader, PackageCopy
from castore.catalog.event_log import EventReader
from castore.digest import Digest
from castore.errors import SourceChanged
from castore.events import LOCATION_STORED
from castore.storage.spi import StorageBackend
from castore.verify.aside import AsideRoom
from castore.verify.backend_scrub import WORKERS
from castore.verify.replicate import Copied, CopyOutcome, CopyTally, Replication
from castore.verify.scrub import Scrub
from tests.damage import DAMAGES, read_object
from tests.places import PLACES
from tests.published import PublishedStore, numbered_files, some, summary_of
from tests.verify.test_scrub import Meddler

everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
FILES = {b"a": b"aaaa", b"sub/b": b"b" * 300_000, b"sub/empty": b"", b"sub/c\xff": b"c" * 9_000_001}


async def replicate(
    store: PublishedStore,
    ref: str = "",
    *,
    source: StorageBackend | None = None,
    target: StorageBackend | None = None,
) -> tuple[CopyTally, list[CopyOutcome]]:
    """One whole run from `first` to `second`."""
    outcomes: list[CopyOutcome] = []
    run = Replication(
        store.catalog_path,
        source=source or store.backends["first"],
        target=target or store.backends["second"],
        folder=store.config.store.state_dir,
        puts_dir=store.config.store.puts_dir,
        package=package_of(store, ref) if ref else None,
        on_outcome=outcomes.append,
    )
    await run.run()
    return run.tally, outcomes


def package_of(store: PublishedStore, ref: str) -> PackageCopy:
    with CopyReader(store.catalog_path) as reader:
        package = reader.package_copy(*ref.split("/"))
    assert package is not None
    return package


def backends_of(store: PublishedStore, ref: str) -> list[str]:
    """What the row of a package says."""
    rows = store.execute("SELECT backend_ids FROM packages WHERE name || '/' || version = ?", ref)
    found: list[str] = json.loads(rows[0][0])
    return found


def intents(store: PublishedStore) -> int:
    return int(store.execute("SELECT count(*) FROM put_intents")[0][0])


def statuses_in(store: PublishedStore, backend_id: str) -> dict[str, str]:
    return {digest: status for (digest, where), status in store.statuses().items() if where == backend_id}


def check_same(store: PublishedStore, digests: Iterable[Digest]) -> None:
    """Both backends hold the same bytes."""
    for digest in digests:
        first, second = (read_object(store.config.backends[name], digest) for name in ("first", "second"))
        assert first == second
        assert Digest.of(second, digest.algorithm) == digest


@everywhere
async def test_all_that_packages_need_arrives(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES, "first")
    other = await store.publish("demo/2", {b"x": b"x", b"a": FILES[b"a"]}, "first")
    await store.store(b"staged, and in no package", "first")
    before = store.statuses()
    tally, outcomes = await replicate(store)
    every = {*digests.values(), *other.values()}
    assert (tally.total_count, tally.done_count, tally.counts["copied"]) == (7, 7, 7)
    assert tally.copied_bytes == tally.total_bytes == tally.done_bytes
    assert (tally.package_count, tally.incomplete_count, tally.stopped) == (2, 0, "")
    assert statuses_in(store, "second") == {str(digest): "stored" for digest in every}
    assert before.items() <= store.statuses().items(), "the source is as it was"
    check_same(store, every)
    assert backends_of(store, "demo/1") == backends_of(store, "demo/2") == ["first", "second"]
    assert intents(store) == 0
    # The manifests come last: whoever finds one finds the rest.
    assert {outcome.row.digest for outcome in outcomes[-2:]} == {digests[b""], other[b""]}
    with EventReader(store.catalog_path) as reader:
        events = [stored.event for stored in reader.events_after(0, 100)[0]]
    assert {event.type for event in events} == {LOCATION_STORED}
    assert [event.subject for event in events] == [str(outcome.row.digest) for outcome in outcomes]
    event = some(event.data for event in events if event.subject == str(digests[b"a"]))
    assert event.pop("duration_ms") >= 0
    assert event == {
        "backend_id": "second",
        "source_backend_id": "first",
        "digest": str(digests[b"a"]),
        "size_bytes": 4,
        "packages": ["demo/1", "demo/2"],
    }

    # Once more: nothing is left to do.
    tally, outcomes = await replicate(store)
    assert (tally.total_count, outcomes, tally.package_count) == (0, [], 0)


@everywhere
async def test_one_package(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES, "first")
    other = await store.publish("demo/2", {b"x": b"x", b"a": FILES[b"a"]}, "first")
    tally, _ = await replicate(store, "demo/2")
    assert (tally.total_count, tally.counts["copied"], tally.package_count) == (3, 3, 1)
    assert statuses_in(store, "second").keys() == {str(digest) for digest in other.values()}
    assert (backends_of(store, "demo/1"), backends_of(store, "demo/2")) == (["first"], ["first", "second"])
    tally, _ = await replicate(store, "demo/1")
    assert (tally.total_count, tally.counts["copied"], tally.package_count) == (4, 4, 1), "one is there already"
    check_same(store, digests.values())


@everywhere
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("path", [b"a", b"sub/c\xff", b""], ids=["small", "large", "manifest"])
async def test_a_bad_object_is_not_copied(store: PublishedStore, kind: str, path: bytes) -> None:
    damage, reason = DAMAGES[kind]
    digests = await store.publish("demo/1", FILES, "first")
    await store.publish("other/1", {b"x": b"untouched"}, "first")
    damage(store.config.backends["first"], digests[path])
    tally, outcomes = await replicate(store)
    assert (tally.counts["failed"], tally.counts["copied"], tally.stopped) == (1, 6, "")
    failed = some(outcome for outcome in outcomes if outcome.result is Copied.FAILED)
    assert (failed.row.digest, failed.reason) == (digests[path], reason)
    assert store.statuses()[str(digests[path]), "first"] == f"failed {reason}"
    assert str(digests[path]) not in statuses_in(store, "second")
    event = some(event for event in store.events() if event.get("status"))
    assert (event["digest"], event["status"], event["reason"]) == (str(digests[path]), "failed", reason)
    # The manifest is there all the same: what is left of the package can be found from it.
    assert (str(digests[b""]) in statuses_in(store, "second")) is (path != b"")
    assert (backends_of(store, "demo/1"), backends_of(store, "other/1")) == (["first"], ["first", "second"])
    assert (tally.incomplete_count, tally.incomplete) == (1, [("demo/1", 1)])
    assert intents(store) == 0
    # The next run does not ask for it again, and says what is lacking.
    tally, outcomes = await replicate(store)
    assert (tally.total_count, outcomes, tally.incomplete) == (0, [], [("demo/1", 1)])


async def test_what_is_failed_in_the_target_is_mended(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES)
    damage, reason = DAMAGES["one flipped bit"]
    damage(store.config.backends["second"], digests[b"a"])
    store.execute("UPDATE storage_locations SET status = 'failed', reason = ? WHERE backend_id = 'second'", reason)
    tally, _ = await replicate(store)
    assert tally.counts["copied"] == 5
    assert set(store.statuses().values()) == {"stored"}
    check_same(store, digests.values())


async def test_what_is_being_deleted_in_the_target_is_left_alone(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES)
    store.execute("UPDATE storage_locations SET status = 'deleting' WHERE backend_id = 'second'")
    tally, _ = await replicate(store)
    assert (tally.total_count, tally.incomplete) == (0, [])
    assert set(statuses_in(store, "second").values()) == {"deleting"}
    assert len(digests) == 5


@everywhere
@pytest.mark.parametrize("ill", ["first", "second"])
async def test_an_unreachable_backend_changes_nothing(store: PublishedStore, ill: str) -> None:
    digests = await store.publish("demo/1", numbered_files(40), "first")
    with store.place.unreachable(ill):
        tally, outcomes = await replicate(store)
    assert tally.stopped
    assert {outcome.result for outcome in outcomes} == {Copied.NOT_COPIED}
    assert statuses_in(store, "first") == {str(digest): "stored" for digest in digests.values()}
    assert statuses_in(store, "second") == {}
    assert (store.events(), backends_of(store, "demo/1")) == ([], ["first"])
    # Of a put that failed, something may be left: its intent stays.
    assert (intents(store) > 0) is (ill == "second")
    tally, _ = await replicate(store)
    assert (tally.counts["copied"], tally.package_count, intents(store)) == (41, 1, 0)


async def reach(run: Replication, meddler: Meddler, victim: Digest, nursery: trio.Nursery) -> None:
    """Start a replication, and wait until it reads `victim`, which `meddler` holds."""
    meddler.held = {victim}
    nursery.start_soon(run.run)
    with trio.fail_after(20):
        while victim not in meddler.waiting:
            await trio.lowlevel.checkpoint()


def held_replication(store: PublishedStore) -> tuple[Replication, Meddler]:
    meddler = Meddler(store.backends["first"])
    run = Replication(
        store.catalog_path,
        source=meddler,
        target=store.backends["second"],
        folder=store.config.store.state_dir,
        puts_dir=store.config.store.puts_dir,
    )
    return run, meddler


@pytest.mark.parametrize("change", ["put by others", "being deleted there", "no longer known"])
async def test_what_changes_meanwhile_keeps_its_new_state(store: PublishedStore, change: str) -> None:
    digests = await store.publish("demo/1", FILES, "first")
    victim = digests[b"a"]
    run, meddler = held_replication(store)
    async with trio.open_nursery() as nursery:
        await reach(run, meddler, victim, nursery)
        if change == "put by others":
            await store.store(FILES[b"a"], "second")
        elif change == "being deleted there":
            await store.store(FILES[b"a"], "second")
            store.execute("UPDATE storage_locations SET status = 'deleting' WHERE backend_id = 'second'")
        else:
            store.execute("PRAGMA foreign_keys = OFF")
            store.execute("DELETE FROM blobs WHERE digest = ?", victim.raw)
        expected = store.statuses().get((str(victim), "second"))
        meddler.release.set()
    assert (run.tally.counts["changed"], run.tally.stopped) == (1, "")
    assert store.statuses().get((str(victim), "second")) == expected
    assert str(victim) not in {event["digest"] for event in store.events()}
    assert intents(store) == 0


async def test_interrupted_it_keeps_what_it_copied(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(200), "first")
    run, meddler = held_replication(store)
    async with trio.open_nursery() as nursery:
        await reach(run, meddler, digests[b"file 100"], nursery)
        nursery.cancel_scope.cancel()
    done = statuses_in(store, "second")
    assert run.tally.counts["copied"] == len(done) == len(store.events())
    assert str(digests[b"file 100"]) not in done
    # Of what was being put only, something may be left in the backend.
    assert intents(store) < WORKERS
    tally, outcomes = await replicate(store)
    assert (tally.counts["copied"], tally.package_count) == (201 - len(done), 1)
    assert not {str(outcome.row.digest) for outcome in outcomes} & done.keys()
    assert intents(store) == 0


@everywhere
async def test_beside_verify_publish_and_another_replication(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(150), "first")
    every = set(digests.values())
    tallies: list[CopyTally] = []

    async def copy() -> None:
        tallies.append((await replicate(store))[0])

    async def publish() -> None:
        every.update((await store.publish("demo/2", {b"new": b"new"}, "first")).values())

    async with trio.open_nursery() as nursery:
        for task in (copy, copy, publish, Scrub(store.catalog_path, store.backends).run):
            nursery.start_soon(task)
    await replicate(store)
    assert {tally.stopped for tally in tallies} == {""}
    assert set(store.statuses().values()) <= {"stored", "verified"}
    assert len(store.statuses()) == 2 * len(every)
    with EventReader(store.catalog_path) as reader:
        events = [stored.event for stored in reader.events_after(0, 10_000)[0]]
    added = [event.subject for event in events if event.type == LOCATION_STORED]
    assert len(added) == len(set(added)), "each new location is told once, whoever made it"
    await Scrub(store.catalog_path, store.backends).run()
    assert set(store.statuses().values()) == {"verified"}


async def test_without_room_for_a_large_object(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES, "first")
    run = Replication(
        store.catalog_path,
        source=store.backends["first"],
        target=store.backends["second"],
        folder=store.root / "not there",
        puts_dir=store.config.store.puts_dir,
    )
    await run.run()
    assert (run.tally.counts["not_copied"], run.tally.counts["copied"]) == (1, 4)
    assert run.tally.incomplete == [("demo/1", 1)]
    assert str(digests[b"sub/c\xff"]) not in statuses_in(store, "second")


async def test_the_room_for_large_objects_is_bounded(store: PublishedStore) -> None:
    """In the order asked for; one that is larger than all the room goes alone."""
    mib = 1 << 20
    room = AsideRoom(store.root, max_bytes=5 * mib)
    inside: dict[int, int] = {}
    order: list[int] = []

    async def use(number: int, size_bytes: int) -> None:
        async with room.take(size_bytes):
            inside[number] = size_bytes
            order.append(number)
            assert len(inside) == 1 or sum(size for size in inside.values() if size > mib) <= 5 * mib
            await trio.testing.wait_all_tasks_blocked()
            del inside[number]

    async with trio.open_nursery() as nursery:
        for number, size_bytes in enumerate([2, 2, 2, 9, 2, 2, 5]):
            nursery.start_soon(use, number, size_bytes * mib)
            await trio.testing.wait_all_tasks_blocked()
    assert order == [0, 1, 2, 3, 4, 5, 6]


async def test_what_is_kept_aside_is_given_back(store: PublishedStore) -> None:
    data = os.urandom(3_000_000)
    summary = summary_of(data)
    async with AsideRoom(store.root).take(len(data)) as aside:
        for offset in (0, 1 << 20, 2 << 20):
            aside.keep(offset, memoryview(data)[offset : offset + (1 << 20)])
        assert [path.name for path in store.root.iterdir() if path.name.startswith("tmp")] == []
        with aside.source(summary).open() as first, aside.source(summary).open() as second:
            assert first.read() == second.read() == data
        # The disk gives back something else.
        aside.keep(5, memoryview(b"x" if data[5:6] != b"x" else b"y"))
        with aside.source(summary).open() as reader, pytest.raises(SourceChanged, match="block 0"):
            reader.read()
