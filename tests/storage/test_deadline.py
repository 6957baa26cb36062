"""How long `DeadlineBackend` lets a call take, and what it raises then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from castore.digest import Digest
from castore.errors import StorageTimeout, StorageUnavailable
from castore.storage.deadline import BASE_S, MIN_BYTES_PER_S, DeadlineBackend
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend

from .memory_backend import MemoryBackend

DATA = bytes(5000)
DIGEST = Digest.of(DATA)


class _Promising:
    """A source that promises many bytes; nothing here ever reads them."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.open = BytesSource(b"").open


async def first_of(backend: StorageBackend) -> object:
    async with backend.list("sha256") as objects:
        return await anext(objects)


CALLS: dict[str, tuple[Callable[[StorageBackend], Awaitable[object]], float]] = {
    "put": (lambda backend: backend.put(DIGEST, _Promising(3000)), 10 + 3),
    "get": (lambda backend: backend.get(DIGEST, offset=500, length=2000), 10 + 2),
    "head": (lambda backend: backend.head(DIGEST), 10),
    "delete": (lambda backend: backend.delete(DIGEST), 10),
    "list": (first_of, 10),
}


def bounded(memory: MemoryBackend) -> DeadlineBackend:
    return DeadlineBackend(memory, base_s=10, min_bytes_per_s=1000, health_s=2)


def taking(seconds: float) -> Callable[[str], Awaitable[None]]:
    async def before(operation: str) -> None:
        await trio.sleep(seconds)

    return before


@pytest.mark.parametrize("name", CALLS)
async def test_no_answer_is_a_timeout_when_the_deadline_comes(autojump_clock: MockClock, name: str) -> None:
    call, seconds = CALLS[name]
    memory = MemoryBackend()
    memory.before = taking(float("inf"))
    start = trio.current_time()
    with pytest.raises(StorageTimeout, match=rf"backend memory: {name} sha256:.*no answer within {seconds:.1f} s"):
        await call(bounded(memory))
    assert trio.current_time() - start == pytest.approx(seconds)


@pytest.mark.parametrize("name", ["get", "head", "delete", "list"])
async def test_an_answer_right_before_the_deadline_counts(autojump_clock: MockClock, name: str) -> None:
    call, seconds = CALLS[name]
    memory = MemoryBackend()
    await memory.put(DIGEST, BytesSource(DATA))
    memory.before = taking(seconds - 0.01)
    await call(bounded(memory))


async def test_each_step_of_a_listing_has_the_whole_time(autojump_clock: MockClock) -> None:
    memory = MemoryBackend()
    for number in range(5):
        data = str(number).encode()
        await memory.put(Digest.of(data), BytesSource(data))
    memory.before = taking(9)
    async with bounded(memory).list("sha256") as objects:
        assert len([info async for info in objects]) == 5


@pytest.mark.parametrize(
    ("name", "seconds"), [("get", 4 + 2), ("head", 4), ("put", 10 + 3), ("delete", 10), ("list", 10)]
)
async def test_reads_have_less_time(autojump_clock: MockClock, name: str, seconds: float) -> None:
    memory = MemoryBackend()
    memory.before = taking(float("inf"))
    start = trio.current_time()
    with pytest.raises(StorageTimeout):
        await CALLS[name][0](DeadlineBackend(memory, base_s=10, read_base_s=4, min_bytes_per_s=1000))
    assert trio.current_time() - start == pytest.approx(seconds)


async def test_what_the_backend_raises_is_raised(autojump_clock: MockClock) -> None:
    memory = MemoryBackend()

    async def before(operation: str) -> None:
        await trio.sleep(1)
        raise StorageUnavailable("down")

    memory.before = before
    with pytest.raises(StorageUnavailable, match="down"):
        await bounded(memory).head(DIGEST)


async def test_a_cancellation_from_outside_is_no_timeout(autojump_clock: MockClock) -> None:
    memory = MemoryBackend()
    memory.before = taking(float("inf"))
    with trio.move_on_after(1) as scope:
        await bounded(memory).head(DIGEST)
    assert scope.cancelled_caught


async def test_health_fails_when_there_is_no_answer(autojump_clock: MockClock) -> None:
    memory = MemoryBackend()
    memory.before = taking(float("inf"))
    start = trio.current_time()
    health = await bounded(memory).health()
    assert (health.status, health.detail) == ("fail", "no answer within 2.0 s")
    assert trio.current_time() - start == pytest.approx(2)


async def test_close_does_not_wait_for_ever(autojump_clock: MockClock) -> None:
    memory = MemoryBackend()
    memory.before = taking(float("inf"))
    start = trio.current_time()
    await bounded(memory).aclose()
    assert trio.current_time() - start == pytest.approx(10)


async def test_the_defaults_let_five_gibibytes_pass_at_the_slowest_rate(autojump_clock: MockClock) -> None:
    memory = MemoryBackend()
    memory.before = taking(float("inf"))
    start = trio.current_time()
    with pytest.raises(StorageTimeout):
        await DeadlineBackend(memory).put(DIGEST, _Promising(5 << 30))
    assert trio.current_time() - start == pytest.approx(BASE_S + (5 << 30) / MIN_BYTES_PER_S)
