"""What is kept in memory: no more than the bound, and what was used last."""

from __future__ import annotations

import logging
import os
import tracemalloc

import pytest
import trio
import trio.testing

from castore.blobs.idle import IDLE_SECONDS
from castore.blobs.memory import MEMORY_BYTES, SPAN_OVERHEAD_BYTES, Span
from castore.blobs.open_blob import RECHECK_SECONDS, OpenBlob
from castore.digest import SHA256_BLOCKS, XXH3
from tests.blobs.blob_world import BLOCK, MIB, World, until


async def test_the_bound_is_reached_and_kept(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    # Every other block, from the end: two blobs of 512 blocks fill memory without a stream.
    blobs = [await world.add(large, "first"), await world.add(large[::-1], "first")]
    kept = []
    for blob in blobs:
        file = reader.open(blob)
        for index in [*range(510, -1, -2), *range(511, -1, -2)]:
            await file.read(index * BLOCK, 1)
            kept.append(reader.kept_bytes)
    assert reader.stats.prefetched == 0
    assert len(world["first"].gets) == 1024
    assert MEMORY_BYTES - BLOCK - SPAN_OVERHEAD_BYTES < max(kept) <= MEMORY_BYTES
    await reader.open(blobs[1]).read(BLOCK, 1)  # the last one read
    assert len(world["first"].gets) == 1024
    await reader.open(blobs[0]).read(510 * BLOCK, 1)  # the first one
    assert len(world["first"].gets) == 1025


async def test_what_was_used_last_stays(world: World, nursery: trio.Nursery) -> None:
    reader = world.reader(memory_bytes=4 * (BLOCK + SPAN_OVERHEAD_BYTES))
    await nursery.start(reader.run)
    file, backend = reader.open(await world.add(os.urandom(2 * MIB), "first")), world["first"]
    for index in (0, 2, 4, 6, 0, 8, 10):  # 2 and 4 give way
        await file.read(index * BLOCK, 1)
    backend.gets.clear()
    for index in (0, 6, 8, 10):
        await file.read(index * BLOCK, 1)
    assert backend.gets == []
    await file.read(2 * BLOCK, 1)
    assert len(backend.gets) == 1


async def test_a_span_larger_than_memory_is_read_and_not_kept(world: World, nursery: trio.Nursery) -> None:
    data = os.urandom(MIB)
    reader = world.reader(memory_bytes=BLOCK)
    await nursery.start(reader.run)
    file = reader.open(await world.add(data, "first"))
    for _ in range(2):
        assert await file.read(0, MIB) == data
        assert reader.kept_bytes == 0
    assert len(world["first"].gets) == 2


async def test_tiny_blobs_are_charged_for_their_overhead(world: World, nursery: trio.Nursery) -> None:
    bound = 50 * (SPAN_OVERHEAD_BYTES + 1)
    reader = world.reader(memory_bytes=bound)
    await nursery.start(reader.run)
    blobs = [await world.add(bytes([index]), "first") for index in range(100)]
    for blob in blobs:
        await reader.open(blob).read(0, 1)
    assert reader.kept_bytes == bound
    world["first"].gets.clear()
    for blob in blobs[50:]:
        await reader.open(blob).read(0, 1)
    assert world["first"].gets == []


async def test_the_overhead_is_what_a_tiny_span_takes(world: World, nursery: trio.Nursery) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    blobs = [await world.add(index.to_bytes(2), "first") for index in range(500)]
    await reader.open(blobs[0]).read(0, 1)
    tracemalloc.start()
    for blob in blobs[1:]:
        await reader.open(blob).read(0, 1)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert 0.5 * SPAN_OVERHEAD_BYTES < taken / 499 < 1.5 * SPAN_OVERHEAD_BYTES


async def test_handles_of_one_blob_share_memory(world: World, nursery: trio.Nursery) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    blob = await world.add(os.urandom(BLOCK), "first")
    first = reader.open(blob)
    await first.read(0, BLOCK)
    first.close()
    again = world.catalog.blob(blob.blob_id)
    assert again is not None
    await reader.open(again).read(0, BLOCK)
    assert len(world["first"].gets) == 1


async def test_nothing_is_allocated_before_a_read(world: World, nursery: trio.Nursery) -> None:
    blob = await world.add(os.urandom(4 * MIB), "first")
    tracemalloc.start()
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(blob)
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    file.close()
    assert taken < 64 * 1024
    assert reader.kept_bytes == 0


async def test_stalled_gets_evict_nothing(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader(memory_bytes=2 * MIB)
    await nursery.start(reader.run)
    file, backend = reader.open(await world.add(large, "first")), world["first"]
    await file.read(0, MIB)
    backend.open = trio.Event()
    async with trio.open_nursery() as stalled:
        for index in range(8, 16):
            stalled.start_soon(file.read, index * MIB, MIB)
        await until(lambda: backend.under_way == 8)
        assert await file.read(100, 1000) == large[100:1100]
        backend.open.set()


async def test_nothing_is_kept_while_nobody_reads(
    world: World, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    data = os.urandom(2 * MIB)
    file = reader.open(await world.add(data, "first"))
    held = await file.read(0, BLOCK)
    assert reader.kept_bytes > 0
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(IDLE_SECONDS)
    await trio.testing.wait_all_tasks_blocked()
    assert reader.kept_bytes == 0
    assert held == data[:BLOCK]
    assert await file.read(0, BLOCK) == data[:BLOCK]


def span_of(file: OpenBlob, index: int) -> Span:
    """The span that has a block in memory."""
    return file._known.spans[index]


@pytest.mark.parametrize("checksums", [XXH3, SHA256_BLOCKS])
async def test_what_changed_in_memory_is_fetched_again(
    world: World,
    nursery: trio.Nursery,
    mock_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    checksums: str,
) -> None:
    """A read of any part of a block checks all of it, and of nothing but the blocks that it needs."""
    data = os.urandom(8 * BLOCK - 100)
    reader, backend = world.reader(), world["first"]
    await nursery.start(reader.run)
    file = reader.open(await world.add(data, "first", checksums=checksums))
    assert await file.read(0, len(data)) == data
    span = span_of(file, 3)
    assert (span.first, span.end) == (0, 8)
    assert span.target is not None
    span.target[4 * BLOCK - 1] ^= 1
    mock_clock.jump(RECHECK_SECONDS)
    assert await file.read(2 * BLOCK, BLOCK) == data[2 * BLOCK : 3 * BLOCK]
    assert await file.read(4 * BLOCK, 4 * BLOCK) == data[4 * BLOCK :]
    assert len(backend.gets) == 1
    with caplog.at_level(logging.ERROR):
        assert await file.read(3 * BLOCK, 10) == data[3 * BLOCK : 3 * BLOCK + 10]
    assert len(backend.gets) == 2
    assert span_of(file, 3) is not span
    assert reader.stats.memory_bad == 1
    assert [record.getMessage()[:8] for record in caplog.records] == ["block 3 "]
    assert reader.kept_bytes == BLOCK + SPAN_OVERHEAD_BYTES
    assert world.reports == [], "no location is to blame"
    assert await file.read(0, len(data)) == data


async def test_blocks_are_checked_again_by_what_is_read_of_them(
    world: World, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    data = os.urandom(4 * BLOCK)
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(data, "first"))
    await file.read(0, len(data))
    arrived = trio.current_time()
    assert span_of(file, 0).checked_at == [arrived] * 4
    mock_clock.jump(RECHECK_SECONDS)
    await file.read(2 * BLOCK - 1, 2)
    assert span_of(file, 0).checked_at == [arrived, arrived + RECHECK_SECONDS, arrived + RECHECK_SECONDS, arrived]
