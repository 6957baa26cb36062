"""The scrub against real backends: what it finds, what it writes, and what it must not say."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio
import trio.testing

from castore.catalog.connection import open_writer
from castore.catalog.records import FailureReason, LocationStatus
from castore.catalog.scrub import Choice, LocationRow
from castore.digest import BlobSummary, Digest
from castore.errors import StateError, StorageDenied, StorageError, StorageUnavailable
from castore.storage.spi import BackendHealth, StorageBackend
from castore.storage.wrapping import Operation, Wrapping
from castore.verify.backend_scrub import AGAIN_MAX, ERRORS_IN_A_ROW, WORKERS, BackendScrub
from castore.verify.batches import BATCH_LOCATIONS
from castore.verify.limits import Limits
from castore.verify.outcomes import Outcome, Tally, Verdict
from castore.verify.pace import Pace
from castore.verify.scrub import Scrub
from castore.verify.shard import Shard
from tests.damage import DAMAGES, extend, flip_a_bit, remove, replace
from tests.places import PLACES
from tests.published import PublishedStore, numbered_files, some, summary_of

T = TypeVar("T")
everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
FILES = {b"a": b"aaaa", b"sub/b": b"b" * 300_000, b"sub/empty": b"", b"sub/c\xff": b"c" * 9_000_000}


async def scrub(
    store: PublishedStore, *backend_ids: str, backends: dict[str, StorageBackend] | None = None, **options: object
) -> tuple[Tally, list[Outcome]]:
    """One whole run over some backends, by default all."""
    outcomes: list[Outcome] = []
    chosen = backends or {backend_id: store.backends[backend_id] for backend_id in backend_ids or store.backends}
    run = Scrub(store.catalog_path, chosen, on_outcome=outcomes.append, **options)  # type: ignore[arg-type]
    await run.run()
    return run.tally, outcomes


class Meddler(Wrapping):
    """A backend whose calls fail, wait, or give a wrong byte, by the object that they ask for."""

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner)
        self.errors: dict[Digest, StorageError] = {}
        self.error: StorageError | None = None
        self.wrong_reads: dict[Digest, int] = {}
        """How many of the next readings of an object arrive with a wrong first byte."""
        self.held: set[Digest] = set()
        self.waiting: set[Digest] = set()
        self.release = trio.Event()
        self.is_healthy = True
        self.fails_until_asked = 0
        """How many of the next calls fail as those to a server that is being started."""
        self.heads = 0

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        self.heads += operation.name == "head"
        digest = Digest.parse(operation.subject)
        if self.fails_until_asked:
            self.fails_until_asked -= 1
            raise StorageUnavailable("being started")
        if self.error is not None:
            raise self.error
        if digest in self.errors:
            raise self.errors[digest]
        if digest in self.held and operation.name == "get":
            self.waiting.add(digest)
            await self.release.wait()
        answer = await call()
        if operation.name == "get" and self.wrong_reads.get(digest, 0) and isinstance(answer, memoryview):
            self.wrong_reads[digest] -= 1
            answer[0] ^= 1
        return answer

    async def health(self) -> BackendHealth:
        return await super().health() if self.is_healthy else BackendHealth("fail", "ill")


@everywhere
async def test_everything_good_becomes_verified(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES)
    before = time.time_ns()
    tally, outcomes = await scrub(store)
    assert set(store.statuses().values()) == {"verified"}
    assert (tally.total_count, tally.done_count, tally.counts["verified"]) == (10, 10, 10)
    assert tally.read_bytes == tally.total_bytes == 2 * (sum(map(len, FILES.values())) + len("the manifest of demo/1"))
    assert {outcome.verdict for outcome in outcomes} == {Verdict.VERIFIED}
    for digest in digests.values():
        assert store.location(digest, "second").verified_at_ns >= before
    assert len(store.events()) == 10
    seen = {(event["digest"], event["backend_id"]): event for event in store.events()}
    assert seen.keys() == {(str(digest), backend) for digest in digests.values() for backend in store.backends}
    event = seen[str(digests[b"sub/b"]), "first"]
    assert event.pop("duration_ms") >= 0
    assert event == {
        "backend_id": "first",
        "digest": str(digests[b"sub/b"]),
        "size_bytes": 300_000,
        "status": "verified",
        "reason": None,
        "observed_digest": str(digests[b"sub/b"]),
        "packages": ["demo/1"],
    }


@everywhere
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("path", [b"a", b"sub/c\xff", b""], ids=["small", "large", "manifest"])
async def test_each_kind_of_damage(store: PublishedStore, kind: str, path: bytes) -> None:
    damage, reason = DAMAGES[kind]
    victim = (await store.publish("demo/1", FILES))[path]
    await store.publish("other/1", {b"x": b"untouched"})
    damage(store.config.backends["first"], victim)

    tally, outcomes = await scrub(store)
    statuses = store.statuses()
    assert statuses.pop((str(victim), "first")) == f"failed {reason}"
    assert set(statuses.values()) == {"verified"}
    assert (tally.counts["failed"], tally.counts["verified"]) == (1, 13)
    found = some(outcome for outcome in outcomes if outcome.verdict is Verdict.FAILED)
    assert (found.row.digest, found.row.backend_id) == (victim, "first")
    event = some(event for event in store.events() if event["status"] == "failed")
    assert (event["digest"], event["backend_id"], event["reason"]) == (str(victim), "first", reason)
    assert event["packages"] == ["demo/1"]
    uses, count = store.reader.paths_of(found.row.blob_id, 20)
    assert [(use.ref, use.path) for use in uses] == [("demo/1", path)]
    assert count == 1
    if kind == "missing":
        assert event["observed_digest"] is None
    else:
        size_bytes = (await store.backends["first"].head(victim)).size_bytes
        data = await store.backends["first"].get(victim, offset=0, length=size_bytes)
        assert event["observed_digest"] == str(Digest.of(data, victim.algorithm))
        assert found.reading.observed_size_bytes == size_bytes

    # The bytes come again: that repairs it, and the next run says so.
    good = await store.backends["second"].head(victim)
    replace(
        store.config.backends["first"],
        victim,
        bytes(await store.backends["second"].get(victim, offset=0, length=good.size_bytes)),
    )
    tally, _ = await scrub(store)
    assert (tally.counts["failed"], tally.counts["verified"]) == (0, 14)
    assert store.location(victim, "first").reason == ""
    assert store.events()[-14:] == [event for event in store.events()[-14:] if event["status"] == "verified"]


async def test_an_object_of_another_blob(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES)
    replace(store.config.backends["first"], digests[b"a"], FILES[b"sub/b"])
    await scrub(store, "first")
    event = some(event for event in store.events() if event["status"] == "failed")
    assert (event["reason"], event["observed_digest"]) == ("size_mismatch", str(digests[b"sub/b"]))


async def test_only_the_chosen_backends_are_looked_at(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES)
    flip_a_bit(store.config.backends["second"], digests[b"a"])
    tally, _ = await scrub(store, "first")
    assert tally.counts["verified"] == tally.total_count == 5
    assert {status for (_, backend_id), status in store.statuses().items() if backend_id == "second"} == {"stored"}


async def test_a_mismatch_is_read_again_before_it_is_believed(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES)
    meddler = Meddler(store.backends["first"])
    once, always = digests[b"a"], digests[b"sub/b"]
    meddler.wrong_reads = {once: 1, always: 1_000_000}
    tally, _ = await scrub(store, backends={"first": meddler})
    assert store.location(once, "first").status is LocationStatus.VERIFIED
    assert store.location(always, "first").reason == "digest_mismatch"
    assert tally.counts["failed"] == 1
    assert meddler.heads == 5 + 2


async def test_being_deleted_is_left_alone(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES)
    store.execute(
        "UPDATE storage_locations SET status = 'deleting' WHERE blob_id = (SELECT blob_id FROM blobs WHERE digest = ?)",
        digests[b"a"].raw,
    )
    remove(store.config.backends["first"], digests[b"a"])
    tally, _ = await scrub(store)
    assert tally.counts["verified"] == tally.total_count == 8
    assert store.location(digests[b"a"], "first").status is LocationStatus.DELETING


@everywhere
async def test_an_unreachable_backend_fails_no_location(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(100))
    with store.place.unreachable("first"):
        tally, outcomes = await scrub(store)
    assert list(tally.stopped) == ["first"]
    assert tally.counts["failed"] == 0
    assert tally.counts["verified"] == 101
    assert 1 <= tally.counts["unreachable"] <= ERRORS_IN_A_ROW + WORKERS
    of_first = {status for (_, backend_id), status in store.statuses().items() if backend_id == "first"}
    assert of_first == {"stored"}
    assert {outcome.row.backend_id for outcome in outcomes if outcome.verdict is Verdict.UNREACHABLE} == {"first"}
    tally, _ = await scrub(store)
    assert tally.counts["verified"] == tally.total_count == 2 * len(digests)


@pytest.mark.parametrize("error", [StorageUnavailable("away"), StorageDenied("no")], ids=["temporary", "permanent"])
async def test_a_backend_that_dies_meanwhile_is_given_up(store: PublishedStore, error: StorageError) -> None:
    await store.publish("demo/1", numbered_files(60))
    meddler = Meddler(store.backends["first"])
    meddler.error = error
    tally, outcomes = await scrub(store, backends={"first": meddler}, outage_s=0)
    assert tally.stopped == {"first": str(error)}
    assert meddler.heads <= ERRORS_IN_A_ROW + WORKERS
    assert {outcome.verdict for outcome in outcomes} == {Verdict.UNREACHABLE}
    assert set(store.statuses().values()) == {"stored"}
    assert store.events() == []


async def test_a_backend_that_is_ill_gets_one_chance(store: PublishedStore) -> None:
    digests = sorted((await store.publish("demo/1", numbered_files(60))).values())
    meddler = Meddler(store.backends["first"])
    meddler.is_healthy = False
    # Ill, perhaps because it cannot be written, but readable: all is read.
    tally, _ = await scrub(store, backends={"first": meddler})
    assert (tally.stopped, tally.counts["verified"]) == ({}, 61)
    meddler.errors = {digests[0]: StorageUnavailable("away")}
    tally, _ = await scrub(store, backends={"first": meddler})
    assert tally.stopped == {"first": "away"}


async def test_objects_that_cannot_be_read_do_not_stop_the_others(store: PublishedStore) -> None:
    digests = sorted((await store.publish("demo/1", numbered_files(60))).values())
    bad = set(digests[::5])
    assert len(bad) > ERRORS_IN_A_ROW
    meddler = Meddler(store.backends["first"])
    meddler.errors = {digest: StorageUnavailable("a bad sector") for digest in bad}
    tally, outcomes = await scrub(store, backends={"first": meddler})
    assert (tally.stopped, tally.counts["unreachable"], tally.counts["verified"]) == ({}, len(bad), 61 - len(bad))
    unreadable = [outcome for outcome in outcomes if outcome.verdict is Verdict.UNREACHABLE]
    assert {(outcome.row.digest, outcome.error) for outcome in unreadable} == {(one, "a bad sector") for one in bad}
    assert {str(store.location(digest, "first").status) for digest in bad} == {"stored"}


async def test_an_outage_that_ends_is_waited_for(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(60))
    meddler = Meddler(store.backends["first"])
    meddler.fails_until_asked = ERRORS_IN_A_ROW + WORKERS
    tally, outcomes = await scrub(store, backends={"first": meddler})
    assert (tally.stopped, tally.counts["verified"], tally.counts["unreachable"]) == ({}, 61, 0)
    assert {outcome.row.digest for outcome in outcomes} == set(digests.values())


async def test_what_was_not_reached_is_asked_for_once_more_at_the_end(store: PublishedStore) -> None:
    await store.publish("demo/1", numbered_files(60))
    meddler = Meddler(store.backends["first"])
    meddler.fails_until_asked = ERRORS_IN_A_ROW - 1
    tally, outcomes = await scrub(store, backends={"first": meddler}, outage_s=0)
    assert (tally.stopped, tally.counts["verified"], len(outcomes)) == ({}, 61, 61)
    assert meddler.heads == 61 + ERRORS_IN_A_ROW - 1


async def test_a_slow_run_has_few_objects_begun_when_its_time_is_over(store: PublishedStore) -> None:
    digests = set((await store.publish("demo/1", numbered_files(20))).values())
    for bytes_per_s, expected in ((1 << 20, 2), (10 << 20, 5), (0, WORKERS)):
        meddler = Meddler(store.backends["first"])
        meddler.held = digests
        run = Scrub(store.catalog_path, {"first": meddler}, pace=Pace(bytes_per_s))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.run)
            with trio.fail_after(20):
                while len(meddler.waiting) < expected:
                    await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert (len(meddler.waiting), meddler.heads) == (expected, expected)
            nursery.cancel_scope.cancel()


async def test_so_many_are_asked_for_once_more_and_no_others(store: PublishedStore) -> None:
    """What is remembered of a backend that fails here and there is bounded."""
    good, bad = await store.store(b"good", "first"), summary_of(b"bad")
    meddler = Meddler(store.backends["first"])
    meddler.errors = {bad.digest: StorageUnavailable("a bad sector")}
    bad_count = AGAIN_MAX + 20

    def row(summary: BlobSummary) -> LocationRow:
        return LocationRow(1, summary.digest, summary.size_bytes, "first", LocationStatus.STORED, 1)

    async def feed(rows: trio.MemorySendChannel[LocationRow]) -> None:
        for _ in range(bad_count):
            for each in (bad, good, good, good):
                await rows.send(row(each))

    results, found = trio.open_memory_channel[Outcome](5 * bad_count)
    run = BackendScrub(meddler, limits=Limits(), pace=Pace(), on_bytes=lambda _: None)
    async with results, found:
        await run.run(feed, results)
        assert run.stopped == ""
        verdicts = Counter(found.receive_nowait().verdict for _ in range(found.statistics().current_buffer_used))
    assert verdicts == {Verdict.VERIFIED: 3 * bad_count, Verdict.UNREACHABLE: bad_count}
    assert meddler.heads == 4 * bad_count + AGAIN_MAX


@pytest.mark.parametrize("change", ["put anew", "failed by a read", "deleted"])
async def test_what_changes_meanwhile_keeps_its_new_state(store: PublishedStore, change: str) -> None:
    digests = await store.publish("demo/1", FILES)
    victim = digests[b"a"]
    summary = await store.store(FILES[b"a"], "second")
    flip_a_bit(store.config.backends["first"], victim)
    meddler = Meddler(store.backends["first"])
    meddler.held = {victim}
    outcomes: list[Outcome] = []
    run = Scrub(store.catalog_path, {"first": meddler}, on_outcome=outcomes.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        with trio.fail_after(20):
            while victim not in meddler.waiting:
                await trio.lowlevel.checkpoint()
        if change == "put anew":
            store.add_location(summary, "first")
        elif change == "failed by a read":
            store.write(lambda transaction: transaction.fail_location(victim, "first", FailureReason.MISSING))
        else:
            store.execute(
                "DELETE FROM storage_locations WHERE backend_id = 'first' "
                "AND blob_id = (SELECT blob_id FROM blobs WHERE digest = ?)",
                victim.raw,
            )
        meddler.release.set()
    assert run.tally.counts["changed"] == 1
    assert run.tally.counts["failed"] == 0
    assert some(outcome.row.digest for outcome in outcomes if outcome.verdict is Verdict.CHANGED) == victim
    assert str(victim) not in {event["digest"] for event in store.events()}
    expected = {"put anew": "stored", "failed by a read": "failed missing", "deleted": None}
    assert store.statuses().get((str(victim), "first")) == expected[change]


@everywhere
async def test_shards_cover_everything_once(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(60))
    extend(store.config.backends["first"], digests[b"file 1"])
    seen: list[Digest] = []
    for number in (1, 2, 3):
        tally, outcomes = await scrub(store, "first", choice=Choice(within=Shard(number, 3).digests))
        assert tally.total_count == tally.done_count == len(outcomes) > 5
        seen += [outcome.row.digest for outcome in outcomes]
    assert len(seen) == 61
    assert set(seen) == set(digests.values())
    assert list(store.statuses().values()).count("failed size_mismatch") == 1


async def test_interrupted_it_keeps_what_it_found(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(40))
    meddler = Meddler(store.backends["first"])
    held = digests[b"file 11"]
    meddler.held = {held}
    flip_a_bit(store.config.backends["first"], digests[b"file 5"])
    outcomes: list[Outcome] = []
    run = Scrub(store.catalog_path, {"first": meddler}, on_outcome=outcomes.append)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.run)
            with trio.fail_after(20):
                # All others are read to their end, the damaged one twice.
                sizes = {path: len(data) for path, data in numbered_files(40).items()}
                wanted = sum(sizes.values()) + len("the manifest of demo/1") - sizes[b"file 11"] + sizes[b"file 5"]
                while run.tally.read_bytes < wanted:
                    await trio.lowlevel.checkpoint()
                await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    statuses = {digest: status for (digest, backend_id), status in store.statuses().items() if backend_id == "first"}
    assert statuses.pop(str(held)) == "stored"
    assert statuses.pop(str(digests[b"file 5"])) == "failed digest_mismatch"
    assert set(statuses.values()) == {"verified"}
    assert run.tally.done_count == len(outcomes) == len(store.events()) == 40


@pytest.mark.parametrize("is_interrupted", [False, True], ids=["to the end", "interrupted"])
async def test_a_locked_catalog_is_waited_for(store: PublishedStore, is_interrupted: bool) -> None:
    # More than fits a transaction: when the first one waits for its turn, others wait in the queue.
    files = numbered_files(BATCH_LOCATIONS + 20)
    await store.publish("demo/1", files, "first")
    other = open_writer(store.catalog_path)
    run = Scrub(store.catalog_path, {"first": store.backends["first"]})
    async with trio.open_nursery() as nursery:
        other.execute("BEGIN IMMEDIATE")
        nursery.start_soon(run.run)
        with trio.fail_after(20):
            while run.tally.total_bytes is None or run.tally.read_bytes < run.tally.total_bytes:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
        assert run.tally.done_count == 0
        if is_interrupted:
            nursery.cancel_scope.cancel()
        other.execute("COMMIT")
    other.close()
    assert run.tally.counts["verified"] == len(files) + 1
    assert len(store.events()) == len(files) + 1


async def test_without_a_catalog(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="there is no catalog"):
        await Scrub(tmp_path / "catalog.db", {}).run()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("ALTER TABLE storage_locations RENAME TO gone", "no such table: storage_locations"),
        # Of all that is asked, only the rows need this.
        ("ALTER TABLE storage_locations RENAME COLUMN stored_at_ns TO gone", "no such column: stored_at_ns"),
        ("ALTER TABLE events RENAME TO gone", "no such table: events"),
    ],
)
async def test_a_catalog_that_is_damaged(store: PublishedStore, damage: str, said: str) -> None:
    await store.publish("demo/1", FILES)
    store.execute(damage)
    with pytest.raises(StateError, match=said):
        await scrub(store)
    store.catalog_path.unlink()  # what is spoilt on purpose is nobody else's business


async def test_nothing_is_stored(store: PublishedStore) -> None:
    tally, outcomes = await scrub(store)
    assert (tally.total_count, tally.done_count, outcomes) == (0, 0, [])
