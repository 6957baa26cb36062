"""What backends see of reads, with production constants: how many gets, how large, and when."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from castore.blobs.flights import MAX_GET_BYTES, PREFETCH_BYTES
from castore.blobs.memory import MEMORY_BYTES
from castore.blobs.open_blob import OpenBlob
from castore.blobs.pattern import GET_BYTES
from castore.errors import BlockUnreadable, StorageTimeout
from tests.blobs.blob_world import BLOCK, MIB, World, read_all, until


@pytest.mark.parametrize("request_bytes", [16 * 1024, BLOCK, MIB])
async def test_a_sequential_read_becomes_few_large_gets(
    world: World, nursery: trio.Nursery, large: bytes, request_bytes: int
) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(large, "first"))
    assert await read_all(file, request=request_bytes) == large
    gets = world["first"].gets
    assert sum(get.length for get in gets) == len(large)  # nothing twice
    assert len(gets) <= 50
    assert max(get.length for get in gets) == GET_BYTES
    assert gets[0].length == max(request_bytes, BLOCK)
    assert reader.stats.prefetched_unread == 0
    assert reader.stats.prefetched * BLOCK >= len(large) - 3 * max(request_bytes, BLOCK)
    assert reader.stats.gets == len(gets)
    assert reader.stats.fetched_bytes == len(large)


async def test_prefetch_runs_while_the_reader_is_served_from_memory(
    world: World, nursery: trio.Nursery, large: bytes
) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    blob = await world.add(large, "first")
    file, backend = reader.open(blob), world["first"]
    for start in range(0, 20 * MIB, BLOCK):
        await file.read(start, BLOCK)
    await until(lambda: not backend.under_way)
    backend.open = trio.Event()  # from now on no get ends
    served = 20 * MIB
    while not backend.under_way:
        assert await file.read(served, BLOCK) == large[served : served + BLOCK]
        served += BLOCK
    waited_for = backend.gets[-1].offset
    assert waited_for - served >= 2 * GET_BYTES
    while served < waited_for:
        assert await file.read(served, BLOCK) == large[served : served + BLOCK]
        served += BLOCK
    await until(lambda: backend.under_way >= 3)
    assert GET_BYTES in [get.length for get in backend.gets[-3:]]
    backend.open.set()


async def test_random_reads_get_a_block_each_and_nothing_ahead(
    world: World, nursery: trio.Nursery, large: bytes
) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(large, "first"))
    source = random.Random(1)
    offsets = [source.randrange(len(large) // 4096) * 4096 for _ in range(200)]
    for offset in offsets:
        assert await file.read(offset, 4096) == large[offset : offset + 4096]
    assert {get.length for get in world["first"].gets} == {BLOCK}
    assert sorted(get.offset for get in world["first"].gets) == sorted({at // BLOCK * BLOCK for at in offsets})
    assert reader.stats.prefetched == 0
    assert reader.stats.cache_misses == len(world["first"].gets)
    assert reader.stats.cache_hits == 200 - reader.stats.cache_misses


async def test_a_read_is_one_get_for_each_run_of_missing_blocks(
    world: World, nursery: trio.Nursery, large: bytes
) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file, backend = reader.open(await world.add(large, "first")), world["first"]
    await file.read(3 * BLOCK, 1)
    assert await file.read(100, MIB) == large[100 : 100 + MIB]
    assert sorted((get.offset // BLOCK, get.length // BLOCK) for get in backend.gets) == [(0, 3), (3, 1), (4, 5)]
    assert backend.gets[2].under_way == 2  # both runs at a time


async def test_no_get_is_larger_than_its_bound(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(large, "first"))
    assert await file.read(5, 20 * MIB) == large[5 : 5 + 20 * MIB]
    assert sorted(get.length for get in world["first"].gets) == [4 * MIB + BLOCK, MAX_GET_BYTES, MAX_GET_BYTES]


async def test_overtaken_requests_are_prefetched_for(world: World, nursery: trio.Nursery, large: bytes) -> None:
    # As the kernel's readahead sends them: several at a time, in any order.
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(large, "first"))
    for base in range(0, len(large), 4 * BLOCK):
        async with trio.open_nursery() as requests:
            for step in (2, 0, 3, 1):
                requests.start_soon(file.read, base + step * BLOCK, BLOCK)
    assert len(world["first"].gets) <= 60
    assert sum(get.length for get in world["first"].gets) == len(large)


async def test_readers_of_one_blob_share_its_gets(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    blob = await world.add(large, "first")

    async def one() -> None:
        file = reader.open(blob)
        for start in range(0, len(large), BLOCK):
            assert await file.read(start, BLOCK) == large[start : start + BLOCK]
        file.close()

    async with trio.open_nursery() as readers:
        for _ in range(8):
            readers.start_soon(one)
    assert sum(get.length for get in world["first"].gets) <= 1.05 * len(large)


async def test_prefetch_is_bounded_over_all_handles(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    blob = await world.add(large, "first")
    readers, step = 16, 64 * 1024
    seen: list[int] = []

    async def one(file: OpenBlob, begin: int) -> None:
        for start in range(begin, begin + len(large) // readers, step):
            assert await file.read(start, step) == large[start : start + step]
            seen.append(reader.ahead_bytes)

    async with trio.open_nursery() as tasks:
        for index in range(readers):
            tasks.start_soon(one, reader.open(blob), index * len(large) // readers)
    # Each reader may wait for one block beside what is prefetched for all; the overhead of spans is less than another.
    assert PREFETCH_BYTES // 2 < max(seen) <= PREFETCH_BYTES + (readers + 1) * BLOCK
    assert reader.kept_bytes <= MEMORY_BYTES
    assert reader.stats.prefetched > len(large) // BLOCK // 2


async def test_many_readers_share_what_may_be_prefetched(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader(memory_bytes=16 * MIB)  # of which 4 MiB may be prefetched, 256 KiB for each
    await nursery.start(reader.run)
    blob = await world.add(large, "first")
    files = [reader.open(blob) for _ in range(16)]
    for start in range(0, 4 * MIB, BLOCK):
        for index, file in enumerate(files):
            await file.read(index * 4 * MIB + start, BLOCK)
        await until(lambda: not world["first"].under_way)
    # The first three reads of each, and some until the first ones have given up what they took alone.
    assert reader.stats.cache_misses <= 16 * 8


async def test_stalled_readers_leave_room_when_they_close(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    blob = await world.add(large, "first")
    files = [reader.open(blob) for _ in range(40)]
    for index, file in enumerate(files):
        for step in range(3):
            await file.read(index * MIB + step * BLOCK, BLOCK)
    await until(lambda: not world["first"].under_way)
    assert PREFETCH_BYTES // 2 < reader.ahead_bytes <= PREFETCH_BYTES
    for file in files:
        file.close()
    assert reader.ahead_bytes == 0
    assert reader.stats.prefetched_unread == reader.stats.prefetched
    after = reader.open(blob)
    for step in range(3):
        await after.read(48 * MIB + step * BLOCK, BLOCK)
    assert reader.stats.prefetched > reader.stats.prefetched_unread


async def test_prefetched_blocks_that_are_read_are_not_counted_as_unread(
    world: World, nursery: trio.Nursery, large: bytes
) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(large, "first"))
    for step in range(4):
        await file.read(step * BLOCK, BLOCK)
    await until(lambda: not world["first"].under_way)
    assert reader.stats.prefetched == 4
    file.close()
    assert reader.stats.prefetched_unread == 3


async def test_a_failed_prefetch_fails_no_read(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    blob = await world.add(large, "first")
    world["first"].truncate(blob, 9 * MIB)
    file = reader.open(blob)
    for start in range(0, 9 * MIB, BLOCK):
        assert await file.read(start, BLOCK) == large[start : start + BLOCK]
    with pytest.raises(BlockUnreadable):
        await file.read(9 * MIB, 1)
    assert {report[1] for report in world.reports} == {"first"}


async def test_what_fails_is_not_prefetched_at_each_read(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    blob, backend = await world.add(large, "first"), world["first"]
    backend.flip(blob, 4 * MIB)
    file = reader.open(blob)
    for start in range(0, 4 * MIB, BLOCK):
        assert await file.read(start, BLOCK) == large[start : start + BLOCK]
        await trio.testing.wait_all_tasks_blocked()
        await until(lambda: not backend.under_way)
    tries = [get for get in backend.gets if get.offset <= 4 * MIB < get.offset + get.length and get.length > BLOCK]
    assert 1 <= len(tries) <= 4


async def test_a_backend_that_fails_gets_no_prefetch(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file, backend = reader.open(await world.add(large, "first")), world["first"]
    backend.error = StorageTimeout("no answer")
    for start in range(0, 4 * MIB, BLOCK):
        with pytest.raises(StorageTimeout):
            await file.read(start, BLOCK)
    assert len(backend.gets) < 1.5 * 4 * MIB / BLOCK
    assert reader.ahead_bytes == 0


async def test_a_small_memory_prefetches_little_and_none_nothing(
    world: World, nursery: trio.Nursery, large: bytes
) -> None:
    blob = await world.add(large[: 8 * MIB], "first")
    for memory_bytes, most in ((2 * MIB, MIB), (0, 0)):
        reader = world.reader(memory_bytes=memory_bytes)
        await nursery.start(reader.run)
        assert await read_all(reader.open(blob), request=BLOCK) == large[: 8 * MIB]
        assert reader.stats.prefetched_unread == 0
        assert max(get.length for get in world["first"].gets) <= max(most, BLOCK)
        assert (reader.stats.prefetched > 0) == (most > 0)
        world["first"].gets.clear()
