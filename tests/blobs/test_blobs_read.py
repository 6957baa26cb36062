"""A read gives the bytes of the blob, whatever its size and wherever it begins."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from castore.blobs.open_blob import OpenBlob
from castore.catalog.records import Blob, LocationStatus
from castore.digest import SHA256_BLOCKS
from castore.errors import StorageUnavailable
from tests.blobs.blob_world import BLOCK, MIB, World, read_all

SIZES = (1, 4096, BLOCK - 1, BLOCK, BLOCK + 1, MIB + 1, 3 * MIB + 5)


async def test_an_empty_blob_needs_no_get(world: World, nursery: trio.Nursery) -> None:
    blob = await world.add(b"")
    reader = world.reader()
    await nursery.start(reader.run)
    assert await reader.open(blob).read(0, MIB) == b""
    assert world["first"].gets == []


async def test_reads_are_short_only_at_the_end(world: World, nursery: trio.Nursery) -> None:
    data = os.urandom(BLOCK + 10)
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(data))
    assert await file.read(0, 2 * MIB) == data
    assert await file.read(BLOCK, 100) == data[BLOCK:]
    assert await file.read(BLOCK + 9, 1) == data[-1:]
    assert await file.read(BLOCK + 10, 1) == b""
    assert await file.read(1 << 40, 1) == b""
    assert await file.read(5, 0) == b""


async def test_a_negative_offset_or_length_is_refused(world: World) -> None:
    file = world.reader().open(await world.add(b"x"))
    with pytest.raises(ValueError, match="at -1"):
        await file.read(-1, 1)
    with pytest.raises(ValueError, match="-1 bytes"):
        await file.read(0, -1)


async def test_what_is_given_out_cannot_be_changed(world: World, nursery: trio.Nursery) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(b"abc"))
    piece = await file.read(0, 3)
    assert isinstance(piece, memoryview)
    with pytest.raises(TypeError):
        piece[0] = 0


async def test_one_span_is_given_out_without_a_copy(world: World, nursery: trio.Nursery) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(os.urandom(2 * MIB)))
    first, again = await file.read(0, MIB), await file.read(BLOCK + 5, BLOCK)
    assert isinstance(first, memoryview)
    assert isinstance(again, memoryview)
    assert first.obj is again.obj


async def test_a_slice_stays_true_when_its_span_is_evicted(world: World, nursery: trio.Nursery) -> None:
    data = os.urandom(4 * MIB)
    reader = world.reader(memory_bytes=MIB)
    await nursery.start(reader.run)
    file = reader.open(await world.add(data))
    slices = [await file.read(start, BLOCK) for start in range(0, len(data), BLOCK)]
    assert b"".join(slices) == data


async def test_other_block_sizes_and_sha256_checksums(world: World, nursery: trio.Nursery) -> None:
    data = os.urandom(3 * MIB + 7)
    reader = world.reader()
    await nursery.start(reader.run)
    blob = await world.add(data, "first", block_size=16 * 1024, checksums=SHA256_BLOCKS)
    assert await read_all(reader.open(blob), request=100_000) == data
    world["first"].flip(blob, 5)
    world["first"].gets.clear()
    fresh = world.reader()
    await nursery.start(fresh.run)
    await fresh.open(blob).read(20_000, 1)
    assert [get.length for get in world["first"].gets] == [16 * 1024]


async def test_a_blob_number_that_is_given_anew_brings_no_old_bytes(world: World, nursery: trio.Nursery) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    old = await world.add(b"old" * 1000)
    old_file = reader.open(old)
    assert await old_file.read(0, 3) == b"old"
    world.forget(old)
    new = await world.add(b"new" * 1000)
    assert new.blob_id == old.blob_id
    assert await reader.open(new).read(0, 3) == b"new"
    assert await old_file.read(0, 3) == b"old"


async def test_before_and_after_run_only_memory_is_read(world: World) -> None:
    data = os.urandom(3 * MIB)
    reader = world.reader()
    file = reader.open(await world.add(data))
    with pytest.raises(StorageUnavailable):
        await file.read(0, 1)
    async with trio.open_nursery() as nursery:
        await nursery.start(reader.run)
        await file.read(0, MIB)
        nursery.cancel_scope.cancel()
    for start in range(0, MIB, BLOCK):
        assert await file.read(start, BLOCK) == data[start : start + BLOCK]
    with pytest.raises(StorageUnavailable):
        await file.read(2 * MIB, 1)


READS = st.lists(
    st.tuples(
        st.sampled_from(range(len(SIZES))),
        st.one_of(st.integers(0, 3 * MIB + 10), st.sampled_from([index * BLOCK for index in range(25)])),
        st.one_of(st.integers(0, 2 * MIB), st.sampled_from([1, 4096, BLOCK, MIB])),
    ),
    min_size=1,
    max_size=30,
)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, list[Blob], list[bytes]]]:
    """Blobs of many sizes: a bad block here and there, a missing object, a location known to have failed."""
    source = random.Random(7)
    contents = [source.randbytes(size) for size in SIZES]

    async def make(folder: Path) -> tuple[World, list[Blob]]:
        world = await World(folder, "first", "second").create()
        blobs = [await world.add(data) for data in contents]
        world["first"].flip(blobs[6], 2 * BLOCK + 1)
        world["first"].flip(blobs[6], 3 * MIB)
        world["first"].remove(blobs[5])
        world.locate(blobs[4].blob_id, "first", LocationStatus.FAILED)
        return world, blobs

    world, blobs = trio.run(make, tmp_path_factory.mktemp("damaged"))
    yield world, blobs, contents
    world.close()


@settings(deadline=None)
@given(reads=READS, memory_bytes=st.sampled_from([0, 300_000, 2 * MIB, 64 * MIB]), at_once=st.booleans())
def test_any_reads_agree_with_a_plain_copy(
    damaged: tuple[World, list[Blob], list[bytes]], reads: list[tuple[int, int, int]], memory_bytes: int, at_once: bool
) -> None:
    world, blobs, contents = damaged

    async def one(file: OpenBlob, data: bytes, offset: int, length: int) -> None:
        assert await file.read(offset, length) == data[offset : offset + length]

    async def all_of_them() -> None:
        reader = world.reader(memory_bytes=memory_bytes)
        async with trio.open_nursery() as background:
            await background.start(reader.run)
            files = [reader.open(blob) for blob in blobs]
            async with trio.open_nursery() as readers:
                for which, offset, length in reads:
                    if at_once:
                        readers.start_soon(one, files[which], contents[which], offset, length)
                    else:
                        await one(files[which], contents[which], offset, length)
            for file in files:
                file.close()
            background.cancel_scope.cancel()
        assert reader.kept_bytes <= memory_bytes
        assert reader.ahead_bytes == 0

    trio.run(all_of_them)


async def test_sequential_reads_with_evictions_agree(world: World, nursery: trio.Nursery, large: bytes) -> None:
    reader = world.reader(memory_bytes=4 * MIB)
    await nursery.start(reader.run)
    blob = await world.add(large[: 16 * MIB + 77], "first")
    for request in (4096, BLOCK, 100_001, MIB):
        file = reader.open(blob)
        assert await read_all(file, request=request) == large[: 16 * MIB + 77]
        file.close()
