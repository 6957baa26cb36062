"""The asyncio thread: what runs there, what cancelling it does, and when it ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import pytest
import trio

from castore.errors import StorageUnavailable
from castore.storage.asyncio_thread import THREAD_NAME, AsyncioThread

PATIENCE_S = 30.0


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture
async def thread() -> AsyncIterator[AsyncioThread]:
    assert threads() == []
    thread = AsyncioThread()
    yield thread
    await thread.aclose()
    assert threads() == []


async def add(first: int, second: int) -> int:
    await asyncio.sleep(0)
    return first + second


async def in_which_thread() -> threading.Thread:
    return threading.current_thread()


async def test_results_and_exceptions_come_back(thread: AsyncioThread) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("a reason")

    assert await thread.run(add, 2, 3) == 5
    with pytest.raises(KeyError, match="a reason"):
        await thread.run(fail)
    assert await thread.run(in_which_thread) in threads()


async def test_what_cannot_even_be_called_raises_too(thread: AsyncioThread) -> None:
    with pytest.raises(TypeError, match="missing"):
        await thread.run(add)  # type: ignore[arg-type]


async def test_many_calls_run_at_once(thread: AsyncioThread) -> None:
    count = 100
    barrier = asyncio.Barrier(count)

    async def meet(number: int) -> int:
        await barrier.wait()
        return number

    numbers: list[int] = []

    async def call(number: int) -> None:
        numbers.append(await thread.run(meet, number))

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(call, number)
    assert sorted(numbers) == list(range(count))


async def test_cancelling_waits_for_the_end_of_the_task(thread: AsyncioThread) -> None:
    started = threading.Event()
    ended: list[str] = []

    async def slow() -> None:
        started.set()
        try:
            await asyncio.sleep(PATIENCE_S)
        finally:
            for _ in range(100):  # an end that takes its time
                await asyncio.sleep(0)
            ended.append("cleaned up")

    with trio.fail_after(PATIENCE_S / 2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(thread.run, slow)
            await trio.to_thread.run_sync(started.wait)
            nursery.cancel_scope.cancel()
    assert ended == ["cleaned up"]
    assert nursery.cancel_scope.cancelled_caught


async def test_a_deadline_is_a_cancellation(thread: AsyncioThread) -> None:
    with trio.move_on_after(0.01) as scope:
        await thread.run(asyncio.sleep, PATIENCE_S)
    assert scope.cancelled_caught


async def test_what_is_cancelled_before_it_starts_is_cancelled(thread: AsyncioThread) -> None:
    await thread.run(add, 0, 0)
    with trio.CancelScope() as scope:
        scope.cancel()
        await thread.run(asyncio.sleep, PATIENCE_S)
    assert scope.cancelled_caught


async def test_a_result_in_spite_of_the_cancellation_counts(thread: AsyncioThread) -> None:
    started = threading.Event()

    async def stubborn() -> str:
        started.set()
        try:
            await asyncio.sleep(PATIENCE_S)
        except asyncio.CancelledError:
            return "done all the same"
        return "not cancelled"

    results = []

    async def call() -> None:
        results.append(await thread.run(stubborn))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.to_thread.run_sync(started.wait)
        nursery.cancel_scope.cancel()
    assert results == ["done all the same"]


async def test_a_task_that_somebody_else_cancels_is_an_error(thread: AsyncioThread) -> None:
    async def cancel_oneself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with pytest.raises(StorageUnavailable, match="cancelled by the client library"):
        await thread.run(cancel_oneself)


async def test_everybody_shares_one_thread_and_the_last_ends_it() -> None:
    first, second = AsyncioThread(), AsyncioThread()
    assert threads() == []
    assert await first.run(in_which_thread) is await second.run(in_which_thread)
    await first.aclose()
    await first.aclose()
    assert len(threads()) == 1
    assert await second.run(add, 1, 1) == 2
    await second.aclose()
    assert threads() == []
    with pytest.raises(RuntimeError, match="closed"):
        await second.run(add, 1, 1)


async def test_closing_what_was_never_used(thread: AsyncioThread) -> None:
    await AsyncioThread().aclose()
    assert threads() == []


def test_it_outlives_a_trio_run_and_comes_back_after_its_end() -> None:
    thread = AsyncioThread()
    assert trio.run(thread.run, add, 1, 2) == 3
    assert trio.run(thread.run, add, 3, 4) == 7
    trio.run(thread.aclose)
    again = AsyncioThread()
    assert trio.run(again.run, add, 5, 6) == 11
    trio.run(again.aclose)
    assert threads() == []


def test_a_process_that_never_closes_it_ends_all_the_same() -> None:
    program = (
        "import asyncio, trio\n"
        "from castore.storage.asyncio_thread import AsyncioThread\n"
        "trio.run(AsyncioThread().run, asyncio.sleep, 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
