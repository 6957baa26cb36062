"""Single flight: one get however many readers, and readers that come to harm only by their own."""

from __future__ import annotations

import logging
import os

import pytest
import trio
import trio.testing

from castore.blobs.open_blob import OpenBlob
from castore.errors import BlockUnreadable, CastoreError, StorageUnavailable
from tests.blobs.blob_world import BLOCK, MIB, World, until


class Outcomes:
    """What concurrent readers got: bytes or errors."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.errors: list[Exception] = []

    async def read(self, file: OpenBlob, offset: int, length: int) -> None:
        try:
            self.pieces.append(bytes(await file.read(offset, length)))
        except Exception as exc:
            self.errors.append(exc)


async def test_fifty_readers_of_a_block_cause_one_get(world: World, nursery: trio.Nursery) -> None:
    data = os.urandom(4 * MIB)
    reader = world.reader()
    await nursery.start(reader.run)
    blob, backend, outcomes = await world.add(data, "first"), world["first"], Outcomes()
    backend.open = trio.Event()
    async with trio.open_nursery() as readers:
        for index in range(50):
            readers.start_soon(outcomes.read, reader.open(blob), 2 * MIB + index * 100, 100)
        await until(lambda: bool(backend.gets))
        await trio.testing.wait_all_tasks_blocked()
        backend.open.set()
    assert [(get.offset, get.length) for get in backend.gets] == [(2 * MIB, BLOCK)]
    assert sorted(outcomes.pieces) == sorted(data[at : at + 100] for at in range(2 * MIB, 2 * MIB + 5000, 100))


async def test_overlapping_reads_get_each_block_once(world: World, nursery: trio.Nursery) -> None:
    data = os.urandom(4 * MIB)
    reader = world.reader()
    await nursery.start(reader.run)
    file, backend, outcomes = reader.open(await world.add(data, "first")), world["first"], Outcomes()
    backend.open = trio.Event()
    async with trio.open_nursery() as readers:
        for start in (0, MIB // 2, 3 * MIB, MIB):
            readers.start_soon(outcomes.read, file, start, MIB)
        await trio.testing.wait_all_tasks_blocked()
        backend.open.set()
    assert sorted(outcomes.pieces) == sorted(data[start : start + MIB] for start in (0, MIB // 2, 3 * MIB, MIB))
    assert sum(get.length for get in backend.gets) == 3 * MIB


async def test_a_cancelled_first_reader_takes_nothing_from_the_others(world: World, nursery: trio.Nursery) -> None:
    data = os.urandom(MIB)
    reader = world.reader()
    await nursery.start(reader.run)
    file, backend, outcomes = reader.open(await world.add(data, "first")), world["first"], Outcomes()
    backend.open = trio.Event()
    async with trio.open_nursery() as first:
        first.start_soon(file.read, 0, BLOCK)
        await until(lambda: bool(backend.gets))
        nursery.start_soon(outcomes.read, file, 10, 10)
        await trio.testing.wait_all_tasks_blocked()
        first.cancel_scope.cancel()
    backend.open.set()
    await until(lambda: bool(outcomes.pieces))
    assert outcomes.pieces == [data[10:20]]
    assert len(backend.gets) == 1


async def test_a_flight_without_readers_still_fills_memory(world: World, nursery: trio.Nursery) -> None:
    data = os.urandom(MIB)
    reader = world.reader()
    await nursery.start(reader.run)
    file, backend = reader.open(await world.add(data, "first")), world["first"]
    backend.open = trio.Event()
    async with trio.open_nursery() as readers:
        readers.start_soon(file.read, 0, BLOCK)
        await until(lambda: bool(backend.gets))
        readers.cancel_scope.cancel()
    backend.open.set()
    await until(lambda: reader.kept_bytes > 0)
    assert await file.read(0, BLOCK) == data[:BLOCK]
    assert len(backend.gets) == 1


async def test_a_failed_flight_fails_all_its_readers_and_is_forgotten(world: World, nursery: trio.Nursery) -> None:
    data = os.urandom(MIB)
    reader = world.reader()
    await nursery.start(reader.run)
    file, backend, outcomes = reader.open(await world.add(data, "first")), world["first"], Outcomes()
    backend.open = trio.Event()
    backend.error = StorageUnavailable("connection refused")
    async with trio.open_nursery() as readers:
        for _ in range(10):
            readers.start_soon(outcomes.read, file, 0, BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        backend.open.set()
    assert [(type(error), str(error)) for error in outcomes.errors] == 10 * [(StorageUnavailable, "connection refused")]
    assert len({id(error) for error in outcomes.errors}) == 10  # a traceback of its own for each
    assert len(backend.gets) == 1
    assert reader.kept_bytes == 0
    backend.error = None
    assert await file.read(0, BLOCK) == data[:BLOCK]


async def test_a_reader_does_not_suffer_from_a_bad_block_that_it_did_not_ask_for(
    world: World, nursery: trio.Nursery
) -> None:
    data = os.urandom(MIB)
    reader = world.reader()
    await nursery.start(reader.run)
    blob, backend, wide, narrow = await world.add(data, "first"), world["first"], Outcomes(), Outcomes()
    backend.flip(blob, 5 * BLOCK)
    file = reader.open(blob)
    backend.open = trio.Event()
    async with trio.open_nursery() as readers:
        readers.start_soon(wide.read, file, 0, MIB)
        await until(lambda: bool(backend.gets))
        for index in (0, 4, 6):
            readers.start_soon(narrow.read, file, index * BLOCK, 10)
        await trio.testing.wait_all_tasks_blocked()
        assert len(backend.gets) == 1
        backend.open.set()
    assert [type(error) for error in wide.errors] == [BlockUnreadable]
    assert sorted(narrow.pieces) == sorted(data[index * BLOCK : index * BLOCK + 10] for index in (0, 4, 6))


async def test_when_run_ends_waiting_readers_get_an_error(world: World, nursery: trio.Nursery) -> None:
    reader = world.reader()
    file, backend, outcomes = reader.open(await world.add(b"x" * MIB, "first")), world["first"], Outcomes()
    backend.open = trio.Event()
    async with trio.open_nursery() as background:
        await background.start(reader.run)
        nursery.start_soon(outcomes.read, file, 0, 1)
        await until(lambda: bool(backend.gets))
        background.cancel_scope.cancel()
    await until(lambda: bool(outcomes.errors))
    assert isinstance(outcomes.errors[0], StorageUnavailable)
    assert reader.ahead_bytes == 0


async def test_an_unforeseen_error_reaches_the_reader_and_ends_nothing_else(
    world: World, nursery: trio.Nursery
) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file, backend = reader.open(await world.add(b"x" * MIB, "first")), world["first"]
    backend.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        await file.read(0, 1)
    backend.error = None
    assert await file.read(0, 1) == b"x"


async def test_an_unforeseen_error_of_a_prefetch_is_logged(
    world: World, nursery: trio.Nursery, large: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file, backend = reader.open(await world.add(large, "first")), world["first"]
    await file.read(0, 4 * BLOCK)
    await file.read(0, BLOCK)
    await file.read(BLOCK, BLOCK)
    assert not reader.stats.prefetched
    backend.error = RuntimeError("a bug")
    await file.read(2 * BLOCK, BLOCK)
    assert reader.stats.prefetched
    await until(lambda: bool(caplog.records))
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert await file.read(3 * BLOCK, BLOCK) == large[3 * BLOCK : 4 * BLOCK]


async def test_errors_hold_no_buffers(world: World, nursery: trio.Nursery) -> None:
    reader = world.reader()
    await nursery.start(reader.run)
    file = reader.open(await world.add(b"x" * MIB, "first"))
    world["first"].error = StorageUnavailable("connection refused")
    with pytest.raises(CastoreError) as raised:
        await file.read(0, MIB)
    cause = raised.value.__cause__
    assert isinstance(cause, StorageUnavailable)
    assert cause.__traceback__ is None
