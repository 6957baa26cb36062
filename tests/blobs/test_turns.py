"""The memory of all flights together: bounded, shared in order, and never a reason to wait for ever."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from castore.blobs.buffers import Buffers
from castore.blobs.memory import SPAN_OVERHEAD_BYTES
from castore.blobs.turns import BUFFER_BYTES, LINE_BYTES, Turns
from tests.blobs.blob_world import BLOCK, MIB, World, until


@dataclass(eq=False)
class Room:
    size_bytes: int = MIB
    target: memoryview | None = None


def nothing_is_kept() -> bool:
    return False


async def test_gets_on_their_way_are_bounded_by_their_bytes(world: World, nursery: trio.Nursery, large: bytes) -> None:
    """A backend that hangs: no more than LINE_BYTES are asked for, and nobody else is in want of memory for it."""
    reader, backend, other = world.reader(), world["first"], world["second"]
    await nursery.start(reader.run)
    blob = await world.add(large, "first")
    file = reader.open(blob)
    elsewhere = reader.open(await world.add(large[::-1], "second"))
    await file.read(0, MIB)
    backend.open = trio.Event()
    backend.gets.clear()
    pieces: dict[int, bytes] = {}

    async def read(index: int) -> None:
        # By a handle of its own: whatever the order in which they begin, nothing is read ahead.
        pieces[index] = bytes(await reader.open(blob).read(index * MIB, MIB))

    async with trio.open_nursery() as stalled:
        for index in range(63, 0, -1):
            stalled.start_soon(read, index)
        await until(lambda: backend.under_way == LINE_BYTES // MIB)
        await trio.testing.wait_all_tasks_blocked()
        assert len(backend.gets) == LINE_BYTES // MIB
        assert reader.buffer_bytes == LINE_BYTES + MIB
        assert await file.read(100, 1000) == large[100:1100], "what is kept"
        assert await elsewhere.read(0, BLOCK) == large[: -BLOCK - 1 : -1], "another backend"
        assert len(other.gets) == 1
        backend.open.set()
    assert pieces == {index: large[index * MIB : (index + 1) * MIB] for index in range(1, 64)}
    assert max(get.under_way for get in backend.gets) == LINE_BYTES // MIB


async def test_all_buffers_together_are_bounded_and_no_read_waits_for_them_for_ever(
    world: World, nursery: trio.Nursery, large: bytes
) -> None:
    reader, backend = world.reader(), world["first"]
    await nursery.start(reader.run)
    files = [reader.open(await world.add(os.urandom(8) + large[8:], "first")) for _ in range(4)]
    taken: list[bytes | memoryview] = []

    async def read(number: int, index: int) -> None:
        taken.append(await files[number].read(index * MIB, MIB))

    most = 0
    for number in range(4):  # 256 MiB that the kernel does not take from us, and no stream
        for index in range(62, -1, -2):
            async with trio.open_nursery() as readers:
                readers.start_soon(read, number, index)
                readers.start_soon(read, number, index + 1)
            most = max(most, reader.buffer_bytes)
    # Beyond the bound, one flight after the other.
    assert backend.gets[-1].under_way == 1
    assert max(get.under_way for get in backend.gets) == 2
    together = [number for number, get in enumerate(backend.gets) if get.under_way == 2]
    assert BUFFER_BYTES // MIB - 4 < together[-1] < BUFFER_BYTES // MIB
    assert reader.kept_bytes <= 2 * (MIB + SPAN_OVERHEAD_BYTES), "what is kept goes first"
    assert reader.stats.prefetched == 0
    assert most >= BUFFER_BYTES
    taken.clear()
    async with trio.open_nursery() as readers:
        for index in range(64):
            readers.start_soon(read, 0, index)
    assert reader.buffer_bytes <= BUFFER_BYTES


async def test_turns_are_given_in_order_and_a_cancelled_wait_takes_none(nursery: trio.Nursery) -> None:
    turns, order = Turns(Buffers(), nothing_is_kept), list[int]()
    first = Room(LINE_BYTES)
    await turns.enter("a", first)
    assert first.target is not None
    assert len(first.target) == LINE_BYTES
    assert not turns.is_waited_for
    rooms = [Room() for _ in range(4)]
    scopes = [trio.CancelScope() for _ in range(4)]

    async def wait(number: int) -> None:
        with scopes[number]:
            await turns.enter("a", rooms[number])
            order.append(number)

    for number in range(4):
        nursery.start_soon(wait, number)
        await trio.testing.wait_all_tasks_blocked()
    assert turns.is_waited_for
    assert [room.target for room in rooms] == [None] * 4, "memory is for those whose turn it is"
    scopes[1].cancel()
    await trio.testing.wait_all_tasks_blocked()
    turns.leave("a", first)
    scopes[2].cancel()  # too late: it has its turn
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(order) == [0, 2, 3]
    await turns.enter("a", Room(LINE_BYTES - 3 * MIB))
    with trio.move_on_after(0) as full:
        await turns.enter("a", Room())
    assert full.cancelled_caught
    assert not turns.is_waited_for


@pytest.mark.parametrize("line", ["a", "b"])
async def test_who_waits_for_memory_moves_on_when_a_turn_ends(nursery: trio.Nursery, line: str) -> None:
    """All memory is held elsewhere: each line goes on with one flight at a time."""
    buffers = Buffers()
    turns = Turns(buffers, nothing_is_kept)
    held = [buffers.take(8 * MIB) for _ in range(BUFFER_BYTES // (8 * MIB))]
    assert turns.spare_bytes() == 0
    mine, others = Room(), [Room() for _ in range(3)]
    await turns.enter(line, mine)
    done: list[Room] = []

    async def fly(room: Room) -> None:
        await turns.enter("a", room)
        done.append(room)
        await trio.lowlevel.checkpoint()
        turns.leave("a", room)

    for room in others:
        nursery.start_soon(fly, room)
    await trio.testing.wait_all_tasks_blocked()
    assert len(done) == (0 if line == "a" else 3)
    turns.leave(line, mine)
    await trio.testing.wait_all_tasks_blocked()
    assert len(done) == 3
    assert len(held) == BUFFER_BYTES // (8 * MIB)
