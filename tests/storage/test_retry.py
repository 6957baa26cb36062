"""How often, when and what `RetryingBackend` tries again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from castore.digest import Digest
from castore.errors import (
    ObjectMissing,
    ObjectTruncated,
    SourceChanged,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageRejected,
    StorageTimeout,
    StorageUnavailable,
)
from castore.storage.retry import RetryingBackend
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend

from .memory_backend import MemoryBackend

DATA = b"some bytes"
DIGEST = Digest.of(DATA)


def failing(*errors: StorageError | None) -> Callable[[str], Awaitable[None]]:
    """Raises one after the other, None for none, and nothing once all are used up."""
    left = list(errors)

    async def before(operation: str) -> None:
        await trio.lowlevel.checkpoint()
        error = left.pop(0) if left else None
        if error is not None:
            raise error

    return before


CALLS: dict[str, Callable[[StorageBackend], Awaitable[object]]] = {
    "put": lambda backend: backend.put(DIGEST, BytesSource(DATA)),
    "get": lambda backend: backend.get(DIGEST, offset=0, length=4),
    "head": lambda backend: backend.head(DIGEST),
    "delete": lambda backend: backend.delete(DIGEST),
}


@pytest.fixture
async def memory() -> MemoryBackend:
    memory = MemoryBackend()
    await memory.put(DIGEST, BytesSource(DATA))
    memory.calls.clear()
    return memory


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", [StorageUnavailable, StorageTimeout, StorageFull])
async def test_temporary_errors_are_tried_again(
    memory: MemoryBackend, autojump_clock: MockClock, name: str, kind: type[StorageError]
) -> None:
    memory.before = failing(kind("first"), kind("second"))
    await CALLS[name](RetryingBackend(memory))
    assert memory.calls == [name] * 3


@pytest.mark.parametrize("name", CALLS)
async def test_the_last_error_is_raised_when_the_tries_are_used_up(
    memory: MemoryBackend, autojump_clock: MockClock, name: str
) -> None:
    errors = [StorageUnavailable(str(number)) for number in range(9)]
    memory.before = failing(*errors)
    with pytest.raises(StorageUnavailable) as caught:
        await CALLS[name](RetryingBackend(memory, tries=3))
    assert caught.value is errors[2]
    assert memory.calls == [name] * 3


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", [ObjectMissing, ObjectTruncated, SourceChanged, StorageDenied, StorageRejected])
async def test_permanent_errors_are_not_tried_again(
    memory: MemoryBackend, autojump_clock: MockClock, name: str, kind: type[StorageError]
) -> None:
    memory.before = failing(kind("for ever"))
    start = trio.current_time()
    with pytest.raises(kind):
        await CALLS[name](RetryingBackend(memory))
    assert memory.calls == [name]
    assert trio.current_time() == start


async def test_a_permanent_error_ends_the_tries(memory: MemoryBackend, autojump_clock: MockClock) -> None:
    memory.before = failing(StorageUnavailable("for now"), StorageDenied("for ever"))
    with pytest.raises(StorageDenied):
        await RetryingBackend(memory).head(DIGEST)
    assert memory.calls == ["head"] * 2


async def test_waits_are_random_below_a_bound_that_doubles(memory: MemoryBackend, autojump_clock: MockClock) -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return high

    memory.before = failing(*[StorageUnavailable("for now")] * 6)
    backend = RetryingBackend(memory, tries=7, base_delay_s=0.5, max_delay_s=3, uniform=uniform)
    start = trio.current_time()
    await backend.head(DIGEST)
    assert bounds == [(0, 0.5), (0, 1), (0, 2), (0, 3), (0, 3), (0, 3)]
    assert trio.current_time() - start == pytest.approx(12.5)


async def test_a_wait_can_be_cancelled(memory: MemoryBackend, autojump_clock: MockClock) -> None:
    memory.before = failing(*[StorageUnavailable("for now")] * 9)
    backend = RetryingBackend(memory, base_delay_s=1000, max_delay_s=1000, uniform=lambda low, high: high)
    with trio.move_on_after(10) as scope:
        await backend.head(DIGEST)
    assert scope.cancelled_caught
    assert memory.calls == ["head"]


async def test_health_and_close_are_not_tried_again(memory: MemoryBackend) -> None:
    memory.before = failing(StorageUnavailable("for now"), StorageUnavailable("for now"))
    with pytest.raises(StorageUnavailable):
        await RetryingBackend(memory).health()
    with pytest.raises(StorageUnavailable):
        await RetryingBackend(memory).aclose()
    assert memory.calls == ["health", "aclose"]


async def put_some(memory: MemoryBackend, count: int = 5) -> list[Digest]:
    for number in range(count):
        data = str(number).encode()
        await memory.put(Digest.of(data), BytesSource(data))
    memory.calls.clear()
    async with memory.list("sha256") as objects:
        digests = [info.digest async for info in objects]
    memory.calls.clear()
    return digests


async def collect(backend: StorageBackend, into: list[Digest]) -> None:
    async with backend.list("sha256") as objects:
        async for info in objects:
            into.append(info.digest)


async def all_of(backend: StorageBackend) -> list[Digest]:
    digests: list[Digest] = []
    await collect(backend, digests)
    return digests


async def test_a_listing_goes_on_behind_the_last_object(memory: MemoryBackend, autojump_clock: MockClock) -> None:
    digests = await put_some(memory)
    down = StorageUnavailable("for now")
    memory.before = failing(down, None, None, down, None, None, None, None, down, down)
    assert await all_of(RetryingBackend(memory)) == digests


@pytest.mark.parametrize("failing_at", [1, 99, 100, 101, 199, 200, 201, 249, 250, 251])
async def test_a_long_listing_goes_on_wherever_it_fails(
    memory: MemoryBackend, autojump_clock: MockClock, failing_at: int
) -> None:
    digests = await put_some(memory, 249)
    assert len(digests) == 250
    memory.before = failing(*[None] * (failing_at - 1), StorageUnavailable("for now"))
    assert await all_of(RetryingBackend(memory)) == digests


@pytest.mark.parametrize("given", [0, 2, 99, 100, 101, 250])
async def test_what_a_listing_gave_before_it_failed_is_given(
    memory: MemoryBackend, autojump_clock: MockClock, given: int
) -> None:
    digests = await put_some(memory, 249)
    memory.before = failing(*[None] * given, StorageDenied("for ever"))
    seen: list[Digest] = []
    with pytest.raises(StorageDenied):
        await collect(RetryingBackend(memory), seen)
    assert seen == digests[:given]


async def test_a_listing_that_goes_on_failing_fails(memory: MemoryBackend, autojump_clock: MockClock) -> None:
    digests = await put_some(memory)
    down = StorageUnavailable("for now")
    memory.before = failing(None, None, *[down] * 9)
    seen: list[Digest] = []
    with pytest.raises(StorageUnavailable):
        await collect(RetryingBackend(memory, tries=3), seen)
    assert seen == digests[:2]
    assert memory.calls == ["list"] * 5


async def test_a_listing_is_given_its_tries_again_by_every_object(
    memory: MemoryBackend, autojump_clock: MockClock
) -> None:
    digests = await put_some(memory)

    down = StorageUnavailable("for now")
    # Two failures before each object; a listing that begins anew steps over the objects that were given already.
    memory.before = failing(
        *[step for given in range(6) for step in (down, *[None] * given, down, *[None] * given, None)]
    )
    assert await all_of(RetryingBackend(memory, tries=3)) == digests


async def test_a_listing_that_is_denied_is_not_tried_again(memory: MemoryBackend) -> None:
    await put_some(memory)
    memory.before = failing(None, StorageDenied("for ever"))
    with pytest.raises(StorageDenied):
        await all_of(RetryingBackend(memory))
    assert memory.calls == ["list"] * 2
