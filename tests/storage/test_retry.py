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
from castore.storage.retry import RETRY_AFTER_MAX_S, RetryingBackend
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
    start = trio.current_time()
    backend = RetryingBackend(
        memory, last_try_s=5000, base_delay_s=1000, max_delay_s=1000, uniform=lambda low, high: high
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.head, DIGEST)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert trio.current_time() - start == 10
    assert memory.calls == ["head"]


def longest(low: float, high: float) -> float:
    return high


def asking_for(seconds: float) -> StorageError:
    """An error of a backend that wants to be left alone for a while."""
    error = StorageUnavailable("slow down")
    error.retry_after_s = seconds
    return error


@pytest.mark.parametrize(("asked_s", "heeded_s"), [(0, 0), (3, 3), (RETRY_AFTER_MAX_S + 1000, RETRY_AFTER_MAX_S)])
async def test_a_backend_is_left_alone_for_as_long_as_it_asks_up_to_a_bound(
    memory: MemoryBackend, autojump_clock: MockClock, asked_s: float, heeded_s: float
) -> None:
    memory.before = failing(asking_for(asked_s))
    start = trio.current_time()
    await RetryingBackend(memory, base_delay_s=0.5, uniform=longest).head(DIGEST)
    assert memory.calls == ["head"] * 2
    assert trio.current_time() - start == pytest.approx(heeded_s + 0.5)


async def test_what_a_permanent_error_asks_for_is_not_waited_for(
    memory: MemoryBackend, autojump_clock: MockClock
) -> None:
    denied = StorageDenied("no")
    denied.retry_after_s = 5
    memory.before = failing(denied)
    start = trio.current_time()
    with pytest.raises(StorageDenied):
        await RetryingBackend(memory).head(DIGEST)
    assert trio.current_time() == start


async def test_a_try_after_the_deadline_of_the_caller_is_not_waited_for(
    memory: MemoryBackend, autojump_clock: MockClock
) -> None:
    memory.before = failing(asking_for(5), asking_for(5))
    start = trio.current_time()
    with trio.move_on_after(9) as scope, pytest.raises(StorageUnavailable):
        await RetryingBackend(memory, base_delay_s=0).head(DIGEST)
    assert not scope.cancelled_caught
    assert memory.calls == ["head"] * 2
    assert trio.current_time() - start == 5


@pytest.mark.parametrize("name", CALLS)
async def test_no_try_begins_long_after_the_first(memory: MemoryBackend, autojump_clock: MockClock, name: str) -> None:
    async def hang(operation: str) -> None:
        await trio.sleep(10)
        raise StorageTimeout("no answer")

    memory.before = hang
    start = trio.current_time()
    with pytest.raises(StorageTimeout):
        await CALLS[name](RetryingBackend(memory, last_try_s=25))
    assert memory.calls == [name] * 3
    assert 30 <= trio.current_time() - start < 31


async def test_a_listing_has_that_time_again_after_every_object(
    memory: MemoryBackend, autojump_clock: MockClock
) -> None:
    digests = await put_some(memory)
    steps = 0

    async def hang(operation: str) -> None:
        nonlocal steps
        steps += 1
        if steps in (1, 5):
            await trio.sleep(20)
            raise StorageTimeout("no answer")

    memory.before = hang
    start = trio.current_time()
    assert await all_of(RetryingBackend(memory, last_try_s=25)) == digests
    assert trio.current_time() - start > 25


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


async def test_a_listing_fails_at_a_step_and_does_not_seem_to_end(memory: MemoryBackend) -> None:
    await put_some(memory)
    memory.before = failing(StorageDenied("for ever"))
    async with RetryingBackend(memory).list("sha256") as objects:
        with pytest.raises(StorageDenied):
            await anext(objects)


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
