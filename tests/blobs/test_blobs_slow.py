"""Locations that take their time: when another one is asked, when they are asked again, and when a read ends."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from castore.blobs.fetch import (
    FILL_SECONDS,
    LATE_SECONDS,
    PATIENCE_BYTES_PER_S,
    PATIENCE_GROWTH,
    PATIENCE_SECONDS,
)
from castore.blobs.flights import MAX_GET_BYTES
from castore.blobs.open_blob import OpenBlob
from castore.blobs.reader import BlobReader
from castore.catalog.records import Blob, LocationStatus
from castore.errors import StorageTimeout, StorageUnavailable
from castore.storage.deadline import MIN_BYTES_PER_S, READ_BASE_S
from castore.storage.retry import LAST_TRY_S
from tests.blobs.blob_world import BLOCK, MIB, World, until

DATA = os.urandom(MIB)
PATIENCE_OF_A_BLOCK = PATIENCE_SECONDS + BLOCK / PATIENCE_BYTES_PER_S


@pytest.fixture
async def reader(world: World, nursery: trio.Nursery) -> BlobReader:
    reader = world.reader()
    await nursery.start(reader.run)
    return reader


class Read:
    """A read of one block, under way in the background until it has ended."""

    def __init__(self, nursery: trio.Nursery, file: OpenBlob, index: int) -> None:
        self.error: Exception | None = None
        self.piece: bytes | None = None
        self._ended = trio.Event()
        self._index = index
        nursery.start_soon(self._run, file)

    async def _run(self, file: OpenBlob) -> None:
        try:
            self.piece = bytes(await file.read(self._index * BLOCK, BLOCK))
        except Exception as exc:
            self.error = exc
        self._ended.set()

    async def is_good(self) -> None:
        with trio.fail_after(20):
            await self._ended.wait()
        assert self.error is None
        assert self.piece == DATA[self._index * BLOCK : (self._index + 1) * BLOCK]

    async def failure(self) -> Exception:
        with trio.fail_after(20):
            await self._ended.wait()
        assert self.error is not None
        return self.error

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()


def hang(world: World, *backend_ids: str) -> None:
    for backend_id in backend_ids:
        world[backend_id].open = trio.Event()


def asked(world: World) -> tuple[int, int]:
    return len(world["first"].gets), len(world["second"].gets)


async def test_a_location_that_hangs_is_left_for_another_good_one(
    world: World, reader: BlobReader, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    blob = await world.add(DATA)
    hang(world, "first")
    read = Read(nursery, reader.open(blob), 0)
    await until(lambda: asked(world) == (1, 0))
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(PATIENCE_OF_A_BLOCK - 0.01)
    await trio.testing.wait_all_tasks_blocked()
    assert asked(world) == (1, 0)
    mock_clock.jump(0.02)
    await read.is_good()
    assert asked(world) == (1, 1)
    assert world["first"].under_way == 0
    assert world.reports == [], "who is late is not bad"


async def test_other_reads_do_not_find_that_out_again(
    world: World, reader: BlobReader, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    blob = await world.add(DATA)
    hang(world, "first")
    read = Read(nursery, reader.open(blob), 0)
    await until(lambda: asked(world) == (1, 0))
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(PATIENCE_OF_A_BLOCK)
    await read.is_good()
    for index in (2, 4, 6):
        await Read(nursery, reader.open(blob), index).is_good()
    assert asked(world) == (1, 4)


async def test_after_a_while_one_read_finds_out_how_it_is(
    world: World, reader: BlobReader, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    blob = await world.add(DATA)
    hang(world, "first")
    read = Read(nursery, reader.open(blob), 0)
    await until(lambda: asked(world) == (1, 0))
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(PATIENCE_OF_A_BLOCK)
    await read.is_good()

    mock_clock.jump(LATE_SECONDS)
    scout = Read(nursery, reader.open(blob), 2)
    await until(lambda: asked(world) == (2, 1))
    await Read(nursery, reader.open(blob), 4).is_good()
    assert asked(world) == (2, 2), "meanwhile the others go elsewhere"
    world["first"].open.set()
    await scout.is_good()
    await Read(nursery, reader.open(blob), 6).is_good()
    assert asked(world) == (3, 2), "it is asked first again"


async def test_when_all_are_slow_each_is_given_more_time(
    world: World, reader: BlobReader, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    blob = await world.add(DATA)
    hang(world, "first", "second")
    read = Read(nursery, reader.open(blob), 0)
    seconds = PATIENCE_OF_A_BLOCK
    expected = [(1, 0), (1, 1), (2, 1), (2, 2)]
    for turn, counts in enumerate(expected):
        await until(lambda counts=counts: asked(world) == counts)  # type: ignore[misc]
        await trio.testing.wait_all_tasks_blocked()
        if turn < len(expected) - 1:
            mock_clock.jump(seconds * (PATIENCE_GROWTH if turn >= 2 else 1))
    world["second"].open.set()
    await read.is_good()
    assert asked(world) == (2, 2)


async def test_the_only_good_location_is_waited_for(
    world: World, reader: BlobReader, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    blob = await world.add(DATA)
    world.locate(blob.blob_id, "second", LocationStatus.FAILED)
    hang(world, "first")
    read = Read(nursery, reader.open(blob), 0)
    await until(lambda: asked(world) == (1, 0))
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(LAST_TRY_S)
    await trio.testing.wait_all_tasks_blocked()
    assert asked(world) == (1, 0)
    world["first"].open.set()
    await read.is_good()


async def test_nobody_is_left_for_one_that_has_failed_already(
    world: World, reader: BlobReader, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    blob = await world.add(DATA)
    world["first"].error = StorageUnavailable("down")
    hang(world, "second")
    read = Read(nursery, reader.open(blob), 0)
    await until(lambda: asked(world) == (1, 1))
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(LAST_TRY_S)
    await trio.testing.wait_all_tasks_blocked()
    assert asked(world) == (1, 1)
    world["second"].open.set()
    await read.is_good()


async def test_a_read_ends_in_time_whatever_hangs(
    world: World, reader: BlobReader, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    blob = await world.add(DATA)
    hang(world, "first", "second")
    read = Read(nursery, reader.open(blob), 0)
    began = trio.current_time()
    while not read.has_ended:
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(0.5)
        await trio.testing.wait_all_tasks_blocked()
    assert FILL_SECONDS <= trio.current_time() - began <= FILL_SECONDS + 1
    error = await read.failure()
    assert isinstance(error, StorageTimeout)
    assert str(error) == f"{blob.summary.digest}: no good copy of block 0 within 60 s"
    assert world["first"].under_way == world["second"].under_way == 0


def test_the_bounds_fit_together() -> None:
    """One location can fail for its own reason in the time of a fetch; a read through a mount lasts longer."""
    from mount.guard import HANDLER_SECONDS

    longest_get = READ_BASE_S + MAX_GET_BYTES / MIN_BYTES_PER_S
    assert PATIENCE_SECONDS + MAX_GET_BYTES / PATIENCE_BYTES_PER_S < READ_BASE_S
    assert LAST_TRY_S + longest_get < FILL_SECONDS < HANDLER_SECONDS


async def test_a_large_read_is_given_more_time(
    world: World, reader: BlobReader, nursery: trio.Nursery, mock_clock: trio.testing.MockClock
) -> None:
    blob: Blob = await world.add(DATA * 8)
    hang(world, "first")

    async def read() -> None:
        assert await reader.open(blob).read(0, 8 * MIB) == DATA * 8

    async with trio.open_nursery() as readers:
        readers.start_soon(read)
        await until(lambda: asked(world) == (1, 0))
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(PATIENCE_SECONDS + 8 * MIB / PATIENCE_BYTES_PER_S - 0.01)
        await trio.testing.wait_all_tasks_blocked()
        assert asked(world) == (1, 0)
        mock_clock.jump(0.02)
    assert asked(world) == (1, 1)
