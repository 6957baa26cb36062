"""How many calls `LimitedBackend` lets through at once."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from castore.digest import Digest
from castore.errors import StorageUnavailable
from castore.storage.limit import LimitedBackend
from castore.storage.source import BytesSource

from .memory_backend import MemoryBackend

DATA = b"some bytes"
DIGEST = Digest.of(DATA)


class Gate:
    """Holds every call until it is opened, and counts those inside."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.most = 0
        self.opened = trio.Event()

    async def __call__(self, operation: str) -> None:
        self.inside.append(operation)
        self.most = max(self.most, len(self.inside))
        try:
            await self.opened.wait()
        finally:
            self.inside.remove(operation)


async def step(backend: LimitedBackend) -> None:
    async with backend.list("sha256") as objects:
        async for _ in objects:
            return


@pytest.fixture
async def memory() -> MemoryBackend:
    memory = MemoryBackend()
    await memory.put(DIGEST, BytesSource(DATA))
    return memory


async def test_reads_and_writes_have_a_bound_each(memory: MemoryBackend) -> None:
    gate = memory.before = Gate()
    backend = LimitedBackend(memory, reads=3, writes=2)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(backend.put, DIGEST, BytesSource(DATA))
            nursery.start_soon(backend.delete, DIGEST)
        await wait_all_tasks_blocked()
        assert len(gate.inside) == 2
        for _ in range(5):
            nursery.start_soon(backend.head, DIGEST)
            nursery.start_soon(step, backend)
        await wait_all_tasks_blocked()
        assert len(gate.inside) == 5
        assert len([name for name in gate.inside if name in ("put", "delete")]) == 2
        nursery.cancel_scope.cancel()


async def test_everything_comes_through_in_the_end(memory: MemoryBackend) -> None:
    gate = memory.before = Gate()
    backend = LimitedBackend(memory, reads=2, writes=1)
    memory.calls.clear()
    async with trio.open_nursery() as nursery:
        for _ in range(7):
            nursery.start_soon(backend.head, DIGEST)
        await wait_all_tasks_blocked()
        assert len(gate.inside) == 2
        gate.opened.set()
    assert gate.most == 2
    assert memory.calls == ["head"] * 7


async def test_health_does_not_wait_for_a_turn(memory: MemoryBackend, autojump_clock: MockClock) -> None:
    gate = memory.before = Gate()
    backend = LimitedBackend(memory, reads=1, writes=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.head, DIGEST)
        nursery.start_soon(backend.delete, DIGEST)
        await wait_all_tasks_blocked()
        nursery.start_soon(backend.health)
        await wait_all_tasks_blocked()
        assert "health" in gate.inside
        nursery.cancel_scope.cancel()


async def test_an_open_listing_holds_no_turn_between_its_steps(memory: MemoryBackend) -> None:
    backend = LimitedBackend(memory, reads=1, writes=1)
    async with backend.list("sha256") as objects:
        async for info in objects:
            with trio.fail_after(5):
                assert await backend.get(info.digest, offset=0, length=len(DATA)) == DATA


async def test_failed_and_cancelled_calls_give_their_turn_back(memory: MemoryBackend) -> None:
    backend = LimitedBackend(memory, reads=1, writes=1)

    async def fail(operation: str) -> None:
        raise StorageUnavailable("down")

    memory.before = fail
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            await backend.head(DIGEST)
    memory.before = Gate()
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.head, DIGEST)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    memory.before = Gate()
    memory.before.opened.set()
    with trio.fail_after(5):
        assert (await backend.head(DIGEST)).digest == DIGEST
