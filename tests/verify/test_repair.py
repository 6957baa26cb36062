"""Repair against real backends: what it puts, from where, what it must not touch, and what it says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from castore.blobs.cache_files import CacheFiles, CacheWriter
from castore.blobs.disk_cache import DiskCache
from castore.digest import BlobSummary, Digest
from castore.storage.open import open_backend
from castore.storage.spi import StorageBackend
from castore.storage.wrapping import Operation, Wrapping
from castore.verify.backend_scrub import ERRORS_IN_A_ROW
from castore.verify.repair import UNREADABLE_NAMED, Mended, Repair, RepairOutcome, RepairTally
from tests.damage import DAMAGES, flip_a_bit, read_object, remove, replace
from tests.forgery import forge
from tests.places import PLACES
from tests.published import PublishedStore, numbered_files, some, summary_of
from tests.verify.test_scrub import Meddler, scrub

T = TypeVar("T")
everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
FILES = {b"a": b"aaaa", b"sub/b": b"b" * 300_000, b"sub/empty": b"", b"sub/c\xff": b"c" * 9_000_001}


async def repair(
    store: PublishedStore,
    *targets: str,
    backends: dict[str, StorageBackend] | None = None,
    cache: DiskCache | None = None,
    directory: Path | None = None,
    folder: Path | None = None,
) -> tuple[RepairTally, list[RepairOutcome]]:
    """One whole run over some backends, by default `first`."""
    outcomes: list[RepairOutcome] = []
    run = Repair(
        store.catalog_path,
        {**store.backends, **(backends or {})},
        targets=targets or ("first",),
        folder=folder or store.config.store.state_dir,
        puts_dir=store.config.store.puts_dir,
        cache=cache,
        directory=directory,
        on_outcome=outcomes.append,
    )
    await run.run()
    assert sum(run.tally.counts.values()) == len(outcomes)
    return run.tally, outcomes


class Watched(Wrapping):
    """A backend that notes what is put."""

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner)
        self.put_digests: list[Digest] = []

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        if operation.name == "put":
            self.put_digests.append(Digest.parse(operation.subject))
        return await call()


def failed(store: PublishedStore) -> set[tuple[str, str]]:
    return {key for key, status in store.statuses().items() if status.startswith("failed")}


def cache_with(store: PublishedStore, *blobs: tuple[BlobSummary, bytes]) -> DiskCache:
    """A disk cache that holds these bytes as those of these blobs."""
    files = CacheFiles(store.root / "cache")
    files.prepare()
    writer = CacheWriter(files)
    for summary, data in blobs:
        writer.write(summary, 0, memoryview(data))
    writer.close()
    return DiskCache(files, 1 << 40)


@everywhere
@pytest.mark.parametrize("path", [b"a", b"sub/c\xff", b""], ids=["small", "large", "manifest"])
@pytest.mark.parametrize("kind", ["one flipped bit", "truncated", "missing"])
async def test_from_another_backend(store: PublishedStore, kind: str, path: bytes) -> None:
    damage, reason = DAMAGES[kind]
    victim = (await store.publish("demo/1", FILES))[path]
    good = read_object(store.config.backends["first"], victim)
    damage(store.config.backends["first"], victim)
    await scrub(store)
    assert failed(store) == {(str(victim), "first")}
    watched = {name: Watched(backend) for name, backend in store.backends.items()}
    tally, outcomes = await repair(store, "first", "second", backends=dict(watched))
    assert (tally.total_count, tally.counts["repaired"], tally.stopped) == (1, 1, {})
    assert [outcome.row.digest for outcome in outcomes] == watched["first"].put_digests == [victim]
    assert watched["second"].put_digests == []
    assert read_object(store.config.backends["first"], victim) == good
    assert set(store.statuses().values()) == {"verified"}
    assert store.execute("SELECT count(*) FROM put_intents") == [(0,)]
    event = store.events()[-1]
    assert event.pop("duration_ms") >= 0
    assert event == {
        "backend_id": "first",
        "digest": str(victim),
        "size_bytes": len(good),
        "reason": reason,
        "source": "backend",
        "source_backend_id": "second",
        "packages": ["demo/1"],
    }
    scrubbed, _ = await scrub(store)
    assert (scrubbed.counts["verified"], scrubbed.counts["failed"]) == (10, 0)
    assert (await repair(store))[0].total_count == 0


async def test_what_is_good_again_is_not_touched(store: PublishedStore) -> None:
    victim = (await store.publish("demo/1", FILES))[b"a"]
    flip_a_bit(store.config.backends["first"], victim)
    await scrub(store)
    flip_a_bit(store.config.backends["first"], victim)
    watched = Watched(store.backends["first"])
    tally, _ = await repair(store, backends={"first": watched})
    assert (tally.counts["verified"], watched.put_digests) == (1, [])
    assert store.location(victim, "first").status == "verified"
    assert store.events()[-1]["status"] == "verified"


async def test_bad_copies_are_told_and_the_cache_is_asked(store: PublishedStore) -> None:
    victim = (await store.publish("demo/1", FILES))[b"sub/c\xff"]
    summary = summary_of(FILES[b"sub/c\xff"])
    flip_a_bit(store.config.backends["first"], victim)
    await scrub(store)
    flip_a_bit(store.config.backends["second"], victim)
    tally, outcomes = await repair(store)
    assert (tally.counts["no_copy"], some(outcomes).result) == (1, Mended.NO_COPY)
    assert failed(store) == {(str(victim), "first"), (str(victim), "second")}, "the other one was found on the way"
    event = store.events()[-1]
    assert (event["backend_id"], event["status"]) == ("second", "failed")
    # A cache that has some of it does not help.
    cache = cache_with(store, (summary, FILES[b"sub/c\xff"][: 64 * summary.block_size_bytes]))
    assert (await repair(store, cache=cache))[0].counts["no_copy"] == 1
    tally, outcomes = await repair(store, "first", "second", cache=cache_with(store, (summary, FILES[b"sub/c\xff"])))
    assert (tally.counts["repaired"], failed(store)) == (2, set())
    assert store.events()[-2]["source"] == "cache"


async def test_bytes_with_the_right_checksum_and_another_digest_are_not_put(store: PublishedStore) -> None:
    """What the cache's own check lets pass is hashed as a whole before it counts."""
    data = bytes(range(256)) * 16
    forged = forge(data)
    summary = await store.store(data, "first")
    flip_a_bit(store.config.backends["first"], summary.digest)
    damaged = read_object(store.config.backends["first"], summary.digest)
    await scrub(store)
    tally, _ = await repair(store, cache=cache_with(store, (summary, forged)))
    assert tally.counts["no_copy"] == 1
    assert read_object(store.config.backends["first"], summary.digest) == damaged


@everywhere
async def test_from_a_directory(store: PublishedStore, tmp_path: Path) -> None:
    digests = await store.publish("demo/1", FILES, "first")
    manifest = read_object(store.config.backends["first"], digests[b""])
    for digest in digests.values():
        replace(store.config.backends["first"], digest, b"others")
    await scrub(store, "first")
    directory = tmp_path / "found"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep/odd \xff name").write_bytes(FILES[b"sub/c\xff"])
    (directory / "again").write_bytes(FILES[b"sub/c\xff"])
    (directory / "same size").write_bytes(b"d" * 300_000)
    (directory / "manifest").write_bytes(manifest)
    (directory / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(FILES[b"a"])
    tally, outcomes = await repair(store, directory=directory)
    assert (tally.counts["repaired"], tally.counts["no_copy"], tally.unreadable) == (2, 3, [])
    repaired = {outcome.row.digest for outcome in outcomes if outcome.result is Mended.REPAIRED}
    assert repaired == {digests[b"sub/c\xff"], digests[b""]}
    sources = {event["source"] for event in store.events() if "source" in event}
    assert sources == {"directory"}
    (directory / "same size").write_bytes(FILES[b"sub/b"])
    (directory / "link").unlink()
    shutil.move(tmp_path / "elsewhere", directory)
    (directory / "nothing").touch()
    tally, _ = await repair(store, directory=directory)
    assert (tally.counts["repaired"], failed(store)) == (3, set())
    assert (await scrub(store, "first"))[0].counts["verified"] == 5


async def test_folders_that_cannot_be_read_are_counted_and_some_are_named(
    store: PublishedStore, tmp_path: Path
) -> None:
    """Whoever runs this: their paths are longer than the system takes."""
    victim = (await store.publish("demo/1", FILES, "first"))[b"a"]
    replace(store.config.backends["first"], victim, b"others")
    await scrub(store, "first")
    directory = tmp_path / "found"
    directory.mkdir()
    (directory / "z").write_bytes(FILES[b"a"])
    deepest, length = os.open(directory, os.O_RDONLY), len(os.fsencode(directory))
    while length < 3900:
        os.mkdir("d" * 100, dir_fd=deepest)
        above, deepest = deepest, os.open("d" * 100, os.O_RDONLY, dir_fd=deepest)
        os.close(above)
        length += 101
    for number in range(UNREADABLE_NAMED + 5):
        os.mkdir(f"{number:0200}", dir_fd=deepest)
    os.close(deepest)
    tally, _ = await repair(store, directory=directory)
    assert (tally.counts["repaired"], tally.unreadable_count) == (1, UNREADABLE_NAMED + 5)
    assert len(tally.unreadable) == UNREADABLE_NAMED
    assert all(said.endswith(": File name too long") for said in tally.unreadable)


async def test_a_put_that_reads_back_wrong_stays_failed(store: PublishedStore) -> None:
    victim = (await store.publish("demo/1", FILES))[b"a"]
    flip_a_bit(store.config.backends["first"], victim)
    await scrub(store)
    meddler = Meddler(store.backends["first"])
    meddler.wrong_reads = {victim: 1_000_000}
    flip_a_bit(store.config.backends["first"], victim)
    tally, outcomes = await repair(store, backends={"first": meddler})
    assert tally.counts["not_repaired"] == 1
    assert "was put, and reads back with a digest_mismatch" in some(outcomes).error
    assert failed(store) == {(str(victim), "first")}


@pytest.mark.parametrize("change", ["being deleted", "put anew"])
async def test_what_changes_meanwhile_is_left_alone(store: PublishedStore, change: str) -> None:
    victim = (await store.publish("demo/1", FILES))[b"a"]
    remove(store.config.backends["first"], victim)
    await scrub(store)
    meddler, watched = Meddler(store.backends["second"]), Watched(store.backends["first"])
    meddler.held = {victim}
    results: list[tuple[RepairTally, Any]] = []

    async def run() -> None:
        results.append(await repair(store, backends={"first": watched, "second": meddler}))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        with trio.fail_after(20):
            while victim not in meddler.waiting:
                await trio.lowlevel.checkpoint()
        if change == "put anew":
            await store.store(FILES[b"a"], "first")
        else:
            store.execute("UPDATE storage_locations SET status = 'deleting' WHERE status = 'failed'")
        expected = store.statuses()[str(victim), "first"]
        meddler.release.set()
    assert results[0][0].counts["changed"] == 1
    assert watched.put_digests == []
    assert store.statuses()[str(victim), "first"] == expected
    assert not [event for event in store.events() if "source" in event]


@everywhere
@pytest.mark.parametrize("ill", ["first", "second"])
async def test_an_unreachable_backend_changes_nothing(store: PublishedStore, ill: str) -> None:
    digests = await store.publish("demo/1", numbered_files(20))
    for digest in digests.values():
        remove(store.config.backends["first"], digest)
    await scrub(store)
    before = store.statuses()
    with store.place.unreachable(ill):
        tally, outcomes = await repair(store)
    assert list(tally.stopped) == ["first"]
    assert ERRORS_IN_A_ROW <= tally.counts["not_repaired"] == len(outcomes)
    assert (store.statuses(), [event for event in store.events() if "source" in event]) == (before, [])
    # Opened anew: what called them until now leaves them alone for a while.
    fresh = {backend_id: open_backend(store.config.backends[backend_id]) for backend_id in store.backends}
    assert (await repair(store, backends=fresh))[0].counts["repaired"] == 21
    for backend in fresh.values():
        await backend.aclose()
    assert failed(store) == set()


async def test_without_room_for_a_large_object(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", FILES)
    for path in (b"a", b"sub/c\xff"):
        remove(store.config.backends["first"], digests[path])
    await scrub(store)
    tally, outcomes = await repair(store, folder=store.root / "not there")
    assert (tally.counts["repaired"], tally.counts["not_repaired"]) == (1, 1)
    assert "cannot be kept there for a while" in some(one.error for one in outcomes if one.error)
    assert failed(store) == {(str(digests[b"sub/c\xff"]), "first")}


async def test_interrupted_it_keeps_what_it_mended(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(100))
    for digest in digests.values():
        remove(store.config.backends["first"], digest)
    await scrub(store)
    meddler = Meddler(store.backends["second"])
    held = digests[b"file 50"]
    meddler.held = {held}
    outcomes: list[RepairOutcome] = []
    run = Repair(
        store.catalog_path,
        {**store.backends, "second": meddler},
        targets=("first",),
        folder=store.config.store.state_dir,
        puts_dir=store.config.store.puts_dir,
        on_outcome=outcomes.append,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.run)
        with trio.fail_after(20):
            while held not in meddler.waiting:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    left = failed(store)
    assert (str(held), "first") in left
    assert len(left) == 101 - len(outcomes)
    # What was put, and not recorded, is good again.
    counts = (await repair(store))[0].counts
    assert counts["repaired"] + counts["verified"] == len(left)
    assert failed(store) == set()
