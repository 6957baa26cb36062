"""When `BreakerBackend` leaves a backend alone, when it asks it again, and what makes no outage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

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
from castore.storage.breaker import FAILURES, PAUSE_MAX_S, PAUSE_MIN_S, BreakerBackend
from castore.storage.open import wrap
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend

from .memory_backend import MemoryBackend

DATA = b"some bytes"
DIGEST = Digest.of(DATA)
OTHERS = [Digest.of(str(number).encode()) for number in range(100)]
NOT_ASKED = "backend memory: .*: not asked, since .*Z, because calls failed .* the last with: "


class Server:
    """What the backend does: nothing but to raise `error` while there is one, or to wait while it hangs."""

    def __init__(self) -> None:
        self.error: StorageError | None = None
        self.hangs: trio.Event | None = None

    async def before(self, operation: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.hangs is not None and operation != "health":
            await self.hangs.wait()
        if self.error is not None:
            raise self.error


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
async def memory(server: Server) -> MemoryBackend:
    memory = MemoryBackend()
    await memory.put(DIGEST, BytesSource(DATA))
    memory.calls.clear()
    memory.before = server.before
    return memory


@pytest.fixture
def expected_log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The lines logged since it was last asked."""

    def lines() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return lines


def always_longest(low: float, high: float) -> float:
    return high


async def fail(backend: StorageBackend, kind: type[StorageError], count: int) -> None:
    """That many calls about as many objects, all of which raise the error."""
    for digest in OTHERS[:count]:
        with pytest.raises(kind) as caught:
            await backend.head(digest)
        assert type(caught.value) is kind


async def opened(memory: MemoryBackend, server: Server) -> BreakerBackend:
    """A breaker that leaves the backend alone, which answers again."""
    backend = BreakerBackend(memory, uniform=always_longest)
    server.error = StorageUnavailable("down")
    await fail(backend, StorageUnavailable, FAILURES)
    server.error = None
    memory.calls.clear()
    return backend


@pytest.mark.parametrize("kind", [StorageTimeout, StorageUnavailable])
async def test_after_enough_failures_calls_fail_at_once(
    memory: MemoryBackend,
    server: Server,
    autojump_clock: MockClock,
    expected_log: Callable[[], list[str]],
    kind: type[StorageError],
) -> None:
    backend = BreakerBackend(memory)
    server.error = kind("down")
    await fail(backend, kind, FAILURES)
    assert expected_log() == [f"backend memory is left alone after {FAILURES} calls in a row that failed: down"]
    memory.calls.clear()
    start = trio.current_time()
    for call in (
        partial(backend.put, DIGEST, BytesSource(DATA)),
        partial(backend.get, DIGEST, offset=0, length=1),
        partial(backend.head, DIGEST),
        partial(backend.delete, DIGEST),
    ):
        with pytest.raises(StorageUnavailable, match=f"{NOT_ASKED}down$"):
            await call()
    async with backend.list("sha256") as objects:
        with pytest.raises(StorageUnavailable, match=NOT_ASKED):
            await anext(objects)
    assert memory.calls == []
    assert trio.current_time() == start
    assert expected_log() == []


async def test_fewer_failures_are_handed_on(memory: MemoryBackend, server: Server) -> None:
    backend = BreakerBackend(memory)
    for _ in range(3):
        server.error = StorageUnavailable("down")
        await fail(backend, StorageUnavailable, FAILURES - 1)
        server.error = None
        await backend.head(DIGEST)


@pytest.mark.parametrize("kind", [ObjectMissing, ObjectTruncated, StorageDenied, StorageFull, StorageRejected])
async def test_an_error_that_is_an_answer_is_no_outage(
    memory: MemoryBackend, server: Server, kind: type[StorageError]
) -> None:
    backend = BreakerBackend(memory)
    server.error = kind("so it is")
    await fail(backend, kind, 4 * FAILURES)
    server.error = StorageUnavailable("down")
    await fail(backend, StorageUnavailable, FAILURES - 1)
    server.error = kind("so it is")
    await fail(backend, kind, 1)
    server.error = StorageUnavailable("down")
    await fail(backend, StorageUnavailable, FAILURES - 1)
    assert len(memory.calls) == 4 * FAILURES + 2 * (FAILURES - 1) + 1


async def test_one_object_that_the_backend_cannot_give_is_no_outage(memory: MemoryBackend, server: Server) -> None:
    backend = BreakerBackend(memory)
    server.error = StorageTimeout("its disk is broken")
    for _ in range(4 * FAILURES):
        with pytest.raises(StorageTimeout):
            await backend.get(OTHERS[0], offset=0, length=1)
    server.error = None
    await backend.head(DIGEST)


async def test_a_slow_answer_is_no_failure(memory: MemoryBackend, server: Server, autojump_clock: MockClock) -> None:
    async def slowly(operation: str) -> None:
        await trio.sleep(9)

    memory.before = slowly
    backend = BreakerBackend(memory)
    for _ in range(4 * FAILURES):
        await backend.head(DIGEST)


async def test_a_call_that_is_cancelled_says_nothing(
    memory: MemoryBackend, server: Server, autojump_clock: MockClock
) -> None:
    backend = BreakerBackend(memory)
    server.hangs = trio.Event()
    for digest in OTHERS[: 4 * FAILURES]:
        with trio.move_on_after(1) as scope:
            await backend.head(digest)
        assert scope.cancelled_caught


async def test_a_source_that_changed_says_nothing(memory: MemoryBackend, server: Server) -> None:
    backend = BreakerBackend(memory)
    server.error = StorageUnavailable("down")
    await fail(backend, StorageUnavailable, FAILURES - 1)
    server.error = SourceChanged("changed")
    await fail(backend, SourceChanged, 1)
    server.error = StorageUnavailable("down")
    await fail(backend, StorageUnavailable, 1)
    with pytest.raises(StorageUnavailable, match=NOT_ASKED):
        await backend.head(DIGEST)


async def test_after_the_pause_an_answer_closes_it(
    memory: MemoryBackend, server: Server, autojump_clock: MockClock, expected_log: Callable[[], list[str]]
) -> None:
    backend = await opened(memory, server)
    expected_log()
    await trio.sleep(PAUSE_MIN_S)
    assert await backend.get(DIGEST, offset=0, length=4) == DATA[:4]
    await backend.head(DIGEST)
    assert memory.calls == ["get", "head"]
    [line] = expected_log()
    assert line.startswith("backend memory answers again; it was left alone since ")


async def test_that_something_is_missing_closes_it_too(
    memory: MemoryBackend, server: Server, autojump_clock: MockClock
) -> None:
    backend = await opened(memory, server)
    await trio.sleep(PAUSE_MIN_S)
    with pytest.raises(ObjectMissing):
        await backend.head(OTHERS[0])
    await backend.head(DIGEST)


async def test_one_call_at_a_time_is_let_through(
    memory: MemoryBackend, server: Server, autojump_clock: MockClock
) -> None:
    backend = await opened(memory, server)
    server.hangs = trio.Event()
    await trio.sleep(PAUSE_MIN_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.head, DIGEST)
        await wait_all_tasks_blocked()
        await trio.sleep(10 * PAUSE_MAX_S)
        await fail(backend, StorageUnavailable, 20)
        assert memory.calls == ["head"]
        server.hangs.set()
    await backend.head(DIGEST)


async def test_the_pause_doubles_up_to_a_bound(
    memory: MemoryBackend, server: Server, autojump_clock: MockClock, expected_log: Callable[[], list[str]]
) -> None:
    bounds = []

    def uniform(low: float, high: float) -> float:
        bounds.append((low, high))
        return high

    backend = BreakerBackend(memory, pause_min_s=2, pause_max_s=10, uniform=uniform)
    server.error = StorageTimeout("down")
    await fail(backend, StorageTimeout, FAILURES)
    for pause_s in (2, 4, 8, 10, 10):
        memory.calls.clear()
        await trio.sleep(pause_s - 0.1)
        await fail(backend, StorageUnavailable, 1)
        assert memory.calls == []
        await trio.sleep(0.1)
        await fail(backend, StorageTimeout, 1)
        assert memory.calls == ["head"]
    assert bounds == [(1, 2), (2, 4), (4, 8), (5, 10), (5, 10), (5, 10)]
    assert len(expected_log()) == 1, "not one for each call that is let through"


async def test_a_trial_that_is_cancelled_is_made_again(
    memory: MemoryBackend, server: Server, autojump_clock: MockClock
) -> None:
    backend = await opened(memory, server)
    server.hangs = trio.Event()
    await trio.sleep(PAUSE_MIN_S)
    with trio.move_on_after(0.5 * PAUSE_MIN_S) as scope:
        await backend.head(DIGEST)
    assert scope.cancelled_caught
    server.hangs = None
    with pytest.raises(StorageUnavailable, match=NOT_ASKED):
        await backend.head(DIGEST)
    await trio.sleep(0.5 * PAUSE_MIN_S)
    await backend.head(DIGEST)


async def test_an_answer_to_an_older_call_closes_it(memory: MemoryBackend, server: Server) -> None:
    backend = BreakerBackend(memory)
    old = server.hangs = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.head, DIGEST)
        await wait_all_tasks_blocked()
        server.hangs = None
        server.error = StorageUnavailable("down")
        await fail(backend, StorageUnavailable, FAILURES)
        server.error = None
        old.set()
    await backend.head(DIGEST)


async def test_of_a_listing_the_first_step_decides(
    memory: MemoryBackend, server: Server, autojump_clock: MockClock
) -> None:
    for digest in OTHERS[:3]:
        await memory.put(digest, BytesSource(str(digest).encode()))
    backend = BreakerBackend(memory, uniform=always_longest)
    async with backend.list("sha256") as objects:
        await anext(objects)
        server.error = StorageUnavailable("down")
        await fail(backend, StorageUnavailable, FAILURES)
        server.error = None
        assert len([info async for info in objects]) == 3
    with pytest.raises(StorageUnavailable, match=NOT_ASKED):
        await backend.head(DIGEST)
    await trio.sleep(PAUSE_MIN_S)
    async with backend.list("nothing") as objects:
        assert [info async for info in objects] == []
    await backend.head(DIGEST)


async def test_health_is_asked_and_says_so(memory: MemoryBackend, server: Server, autojump_clock: MockClock) -> None:
    backend = await opened(memory, server)
    health = await backend.health()
    assert health.status == "warn"
    assert health.detail.startswith("in memory; calls fail at once since ")
    assert health.detail.endswith("the last with: down")
    await trio.sleep(PAUSE_MIN_S)
    await backend.head(DIGEST)
    assert (await backend.health()).detail == "in memory"


async def test_around_the_tries_one_bad_moment_is_no_outage(
    memory: MemoryBackend, server: Server, autojump_clock: MockClock
) -> None:
    """As put together for use: what many calls at a time meet, and overcome by trying again, is not counted."""
    bad = 30

    async def before(operation: str) -> None:
        nonlocal bad
        await trio.lowlevel.checkpoint()
        if bad:
            bad -= 1
            raise StorageUnavailable("for a moment")

    memory.before = before
    backend = wrap(memory, reads=100, writes=1)
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(backend.head, DIGEST)


async def test_a_dead_backend_fails_at_once_from_then_on(memory: MemoryBackend, autojump_clock: MockClock) -> None:
    """As put together for use, with its real bounds."""

    async def never(operation: str) -> None:
        await trio.sleep_forever()

    memory.before = never
    backend = wrap(memory, reads=100, writes=1)
    seconds: list[float] = []

    async def ask(digest: Digest) -> None:
        start = trio.current_time()
        with pytest.raises((StorageTimeout, StorageUnavailable)):
            await backend.get(digest, offset=0, length=1)
        seconds.append(trio.current_time() - start)

    async with trio.open_nursery() as nursery:
        for digest in OTHERS[:20]:
            nursery.start_soon(ask, digest)
    assert all(30 <= each <= 31 for each in seconds)
    seconds.clear()
    for digest in OTHERS[:20]:
        await ask(digest)
    assert max(seconds) == 0
