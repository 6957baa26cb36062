"""Small files fetched before they are asked for, with production constants: what backends see of who reads a tree."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
import trio.testing

from castore.blobs.cache_files import CacheFiles
from castore.blobs.disk_cache import DiskCache
from castore.blobs.flights import PREFETCH_BYTES
from castore.blobs.memory import MEMORY_BYTES
from castore.blobs.reader import BlobReader
from castore.blobs.sibling_flights import SIBLING_GETS, STRETCH_SECONDS
from castore.blobs.siblings import SIBLING_BYTES, WINDOW_MAX_FILES, WINDOW_MIN_FILES
from castore.catalog.records import FailureReason, LocationStatus
from castore.catalog.tiny import TinyBlobs
from castore.errors import BlockUnreadable, StorageTimeout
from tests.blobs.blob_world import BLOCK, World, until
from tests.blobs.tree_world import Tree

KIB = 1024

Still = trio.testing.MockClock
"""Time stands still in a test that takes it: on a busy host, pauses of its own would end stretches."""


@pytest.fixture
def tree(world: World) -> Tree:
    return Tree(world)


async def started(tree: Tree, nursery: trio.Nursery, memory_bytes: int = MEMORY_BYTES) -> BlobReader:
    reader = tree.reader(memory_bytes=memory_bytes)
    await nursery.start(reader.run)
    return reader


async def test_after_three_files_in_a_row_the_next_ones_are_on_their_way(
    tree: Tree, nursery: trio.Nursery, mock_clock: Still
) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("d", 100, 32 * KIB)
    backend = tree.world["first"]
    await tree.read_each(reader, files[:2])
    assert tree.gets() == files[:2]
    await tree.read(reader, files[2])
    backend.open = trio.Event()  # from now on no get ends
    await trio.testing.wait_all_tasks_blocked()
    assert tree.gets()[:3] == files[:3]
    assert sorted(tree.gets()) == files[: 3 + WINDOW_MIN_FILES]
    assert [get.under_way for get in backend.gets[3:]] == [1, 2, 3, 4]
    backend.open.set()
    await tree.rest()
    hits = reader.stats.cache_hits
    await tree.read_each(reader, files[3 : 3 + WINDOW_MIN_FILES])
    assert reader.stats.cache_hits == hits + WINDOW_MIN_FILES  # nobody waited for them
    assert reader.stats.prefetched_unread == 0


async def test_the_window_grows_to_its_bounds(tree: Tree, nursery: trio.Nursery, mock_clock: Still) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("d", 200, 32 * KIB)
    await tree.read_each(reader, files[:80])
    assert sorted(tree.gets()) == files[: 80 + WINDOW_MAX_FILES]  # each once
    backend = tree.world["first"]
    backend.open = trio.Event()
    await tree.read_each(reader, files[80 : 80 + WINDOW_MAX_FILES])
    assert backend.under_way == SIBLING_GETS
    assert reader.stats.cache_misses == 3
    backend.open.set()


async def test_a_whole_tree_is_one_stretch(tree: Tree, nursery: trio.Nursery, mock_clock: Still) -> None:
    reader = await started(tree, nursery)
    files = [path for folder in range(10) for path in await tree.fill(f"d{folder}", 50, 32 * KIB)]
    await tree.read_each(reader, files)
    assert sorted(tree.gets()) == files  # each once
    assert reader.stats.cache_misses == 3
    assert reader.stats.prefetched == len(files) - 3
    assert reader.stats.prefetched_unread == 0
    assert tree.listings <= 2 + len(files) // WINDOW_MAX_FILES


async def test_files_are_found_in_the_next_folders_and_no_other_package(tree: Tree, nursery: trio.Nursery) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("a/one", 3, 20 * KIB)
    files += await tree.fill("a/one/below", 1, 20 * KIB)
    tree.folder("a/empty")
    files += await tree.fill("b", 2, 20 * KIB)
    tree.next_version()
    other = await tree.fill("c", 2, 20 * KIB)
    await tree.read_each(reader, files[:3])
    assert len(tree.gets()) == 6  # up to the next folders of the package
    await tree.read_each(reader, files[3:])
    assert sorted(tree.gets()) == sorted(files)
    await tree.read_each(reader, other)
    assert reader.stats.cache_misses == 5


async def test_files_that_were_made_in_another_order_than_that_of_their_names(
    tree: Tree, nursery: trio.Nursery, mock_clock: Still
) -> None:
    """As a shell's `*` reads what `cp -r` brought from a disk."""
    reader = await started(tree, nursery)
    files = [f"d{folder}/f{number:03}" for folder in range(3) for number in range(100)]
    for path in random.Random(3).sample(files, len(files)):
        await tree.add(path, 20 * KIB)
    await tree.read_each(reader, files)
    assert sorted(tree.gets()) == files
    assert reader.stats.cache_misses <= 10
    assert reader.stats.prefetched_unread == 0


async def test_random_reads_get_nothing_ahead(tree: Tree, nursery: trio.Nursery) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("d", 1000, 12 * KIB)
    chosen = random.Random(1).sample(files, 150)
    await tree.read_each(reader, chosen)
    assert tree.gets() == chosen
    assert reader.stats.prefetched == 0
    assert tree.listings <= 16 + 150 // 16  # and the catalog is left alone
    await tree.read_each(reader, files[:100])  # whoever comes then is noticed nevertheless
    assert reader.stats.prefetched > 60


async def test_every_second_file_gets_nothing_ahead(tree: Tree, nursery: trio.Nursery) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("d", 200, 12 * KIB)
    await tree.read_each(reader, files[::2])
    assert tree.gets() == files[::2]
    assert reader.stats.prefetched == 0


@pytest.mark.parametrize(("share", "least"), [(1, 350), (4, 150), (64, 300)], ids=["1 file", "4 files", "64 files"])
async def test_several_readers_share_a_list(
    tree: Tree, nursery: trio.Nursery, mock_clock: Still, share: int, least: int
) -> None:
    """As `xargs -P 8 -n SHARE cat` does.

    Who has the next turn is drawn by trio, and `least` lies far below what 60 draws gave: 444 to 482 files of one each,
    248 to 387 of four, 376 to 398 of 64.
    """
    reader = await started(tree, nursery)
    tree.world["first"].turns = 100
    files = [path for folder in range(10) for path in await tree.fill(f"d{folder}", 50, 12 * KIB)]
    shares = iter([files[start : start + share] for start in range(0, len(files), share)])

    async def one() -> None:
        for paths in shares:
            for path in paths:
                await tree.read(reader, path)

    async with trio.open_nursery() as readers:
        for _ in range(8):
            readers.start_soon(one)
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(tree.gets()) == files  # each once
    assert reader.stats.prefetched >= least
    assert max(get.under_way for get in tree.world["first"].gets) > 8
    assert reader.stats.prefetched_unread == 0


async def test_what_is_ahead_is_bounded_over_all_readers(tree: Tree, nursery: trio.Nursery, mock_clock: Still) -> None:
    reader = await started(tree, nursery)
    tree.world["first"].turns = 100
    folders = [await tree.fill(f"d{folder}", 24, SIBLING_BYTES) for folder in range(16)]
    seen: list[int] = []

    async def one(paths: list[str]) -> None:
        for path in paths:
            await tree.read(reader, path)
            seen.append(reader.ahead_bytes)

    async with trio.open_nursery() as readers:
        for paths in folders:
            readers.start_soon(one, paths)
    assert PREFETCH_BYTES // 4 < max(seen) <= PREFETCH_BYTES + 17 * SIBLING_BYTES
    assert reader.stats.prefetched > 16 * 24 / 4


async def test_without_memory_nothing_is_fetched_ahead(tree: Tree, nursery: trio.Nursery) -> None:
    reader = await started(tree, nursery, memory_bytes=0)
    files = await tree.fill("d", 20, 32 * KIB)
    await tree.read_each(reader, files)
    assert tree.gets() == files
    assert reader.stats.prefetched == 0


async def test_large_files_are_neither_watched_nor_fetched(tree: Tree, nursery: trio.Nursery) -> None:
    reader = await started(tree, nursery)
    large = [f"large/f{number}" for number in range(10)]
    for path in large:
        await tree.add(path, SIBLING_BYTES + 1)
    mixed = [f"mixed/f{number}" for number in range(20)]
    for number, path in enumerate(mixed):
        await tree.add(path, 0 if number == 5 else SIBLING_BYTES + 1 if number == 4 else 32 * KIB)
    await tree.read_each(reader, large)
    assert tree.listings == 0
    await tree.read_each(reader, mixed[:3])
    assert sorted(tree.gets()[-7:]) == sorted(path for path in mixed[:9] if path not in (mixed[4], mixed[5]))


@pytest.mark.parametrize("size", [4 * KIB, 32 * KIB], ids=["in the database", "in files"])
async def test_what_is_cached_is_read_and_nothing_else_happens(
    tree: Tree, nursery: trio.Nursery, tmp_path: Path, size: int
) -> None:
    files = await tree.fill("d", 60, size)
    caches = []
    for _ in range(2):
        found = CacheFiles(tmp_path / "cache")
        found.prepare()
        caches.append(DiskCache(found, 1 << 30, tiny=TinyBlobs(tmp_path / "tiny.db", 1 << 30), tiny_bytes=8 * KIB))
    first = tree.reader(cache=caches[0])
    async with trio.open_nursery() as running:
        await running.start(first.run)
        await tree.read_each(first, files)
        assert first.stats.prefetched == 57  # that are in no cache are fetched ahead, however small
        await until(lambda: caches[0].queued_bytes == 0)
        running.cancel_scope.cancel()
    caches[0].close()
    listings, gets = tree.listings, tree.gets()
    second = tree.reader(cache=caches[1])
    await nursery.start(second.run)
    await tree.read_each(second, files)
    assert (tree.listings, tree.gets(), second.stats.prefetched) == (listings, gets, 0)
    assert second.stats.disk_hits == 60
    caches[1].close()


async def test_it_goes_on_where_the_cache_ends(tree: Tree, nursery: trio.Nursery, tmp_path: Path) -> None:
    files = await tree.fill("d", 120, 32 * KIB)
    found = CacheFiles(tmp_path / "cache")
    found.prepare()
    cache = DiskCache(found, 1 << 30)
    for path in files[20:80]:
        assert await cache.store(tree.blob(path).summary, 0, memoryview(tree.data(path)))
    reader = tree.reader(cache=cache)
    await nursery.start(reader.run)
    await tree.read_each(reader, files[:60])
    assert reader.stats.prefetched < 60  # the rest of what is cached is read when it is asked for
    await tree.read_each(reader, files[60:])
    assert sorted(tree.gets()) == files[:20] + files[80:]
    assert reader.stats.cache_misses <= 3 + 60 + 1


async def test_one_blob_under_several_names_is_fetched_once(tree: Tree, nursery: trio.Nursery) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("d", 6, 32 * KIB)
    for number in range(6):
        tree.link(f"d/g{number}", files[number])
    more = await tree.fill("e", 6, 32 * KIB)
    await tree.read_each(reader, [*files, *more])
    assert sorted(tree.gets()) == [*files, *more]


@pytest.mark.parametrize("harm", ["missing", "wrong bytes"])
async def test_a_bad_sibling_harms_nobody(
    tree: Tree, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("d", 30, 32 * KIB)
    blob = tree.blob(files[10])
    if harm == "missing":
        tree.world["first"].remove(blob)
    else:
        tree.world["first"].flip(blob, 5)
    await tree.read_each(reader, files[:10])
    with pytest.raises(BlockUnreadable):
        await tree.read(reader, files[10])
    await tree.read_each(reader, files[11:])
    assert reader.stats.cache_misses == 3 + 1  # those after it were there all the same
    reason = FailureReason.MISSING if harm == "missing" else FailureReason.DIGEST_MISMATCH
    assert tree.world.reports == [(blob.summary.digest, "first", reason)]
    assert not caplog.records


async def test_a_bad_sibling_comes_from_another_location(tree: Tree, nursery: trio.Nursery) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("d", 9, 32 * KIB)
    blob = await tree.add("d/two places", 32 * KIB, "first", "second")
    files += ["d/two places", *await tree.fill("e", 9, 32 * KIB)]
    tree.world["first"].flip(blob, 5)
    await tree.read_each(reader, files)
    assert tree.gets("second") == ["d/two places"]
    assert reader.stats.cache_misses == 3


async def test_locations_that_are_known_to_be_bad_are_not_reported_again(
    tree: Tree, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder of which most was deleted or failed: nothing is said of what nobody reads."""
    reader = await started(tree, nursery)
    files = await tree.fill("d", 60, 32 * KIB)
    for path in files[4:40]:
        tree.world["first"].remove(tree.blob(path))
        status = LocationStatus.FAILED if path < files[20] else LocationStatus.DELETING
        tree.world.locate(tree.blob(path).blob_id, "first", status)
    await tree.read_each(reader, files[:4])
    await tree.rest()
    assert reader.stats.prefetched >= WINDOW_MIN_FILES
    assert tree.world.reports == []
    assert not caplog.records
    for path in files[4:40]:
        with pytest.raises(BlockUnreadable):
            await tree.read(reader, path)
    assert tree.world.reports == []
    await tree.read_each(reader, files[40:])


async def test_a_backend_that_fails_is_asked_for_little(tree: Tree, nursery: trio.Nursery) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("d", 100, 32 * KIB)
    backend = tree.world["first"]
    await tree.read_each(reader, files[:10])
    before = len(backend.gets)
    backend.error = StorageTimeout("no answer")
    for path in files[before:60]:
        with pytest.raises(StorageTimeout):
            await tree.read(reader, path)
    assert len(backend.gets) - before <= 60
    backend.error = None
    await tree.read_each(reader, files[60:])
    assert reader.stats.prefetched > 30


async def test_what_nobody_came_for_is_counted_and_its_room_given_back(
    tree: Tree, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    reader = await started(tree, nursery)
    files = await tree.fill("d", 100, 32 * KIB)
    await tree.read_each(reader, files[:20])
    await tree.rest()
    ahead = len(tree.gets()) - 20
    assert reader.ahead_bytes == ahead * BLOCK
    assert reader.stats.prefetched_unread == 0
    mock_clock.jump(STRETCH_SECONDS + 0.1)
    await until(lambda: reader.ahead_bytes == 0)
    assert reader.stats.prefetched_unread == ahead
    await tree.read_each(reader, files[20 : 20 + ahead])  # they are still there
    assert len(tree.gets()) == 20 + ahead


async def test_it_can_be_switched_off(world: World, tree: Tree, nursery: trio.Nursery) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    files = await tree.fill("d", 20, 32 * KIB)
    await tree.read_each(reader, files)
    assert tree.gets() == files
    assert (reader.stats.prefetched, tree.listings) == (0, 0)
