"""One thread for work that must stay in one: which thread it is, what it gives back, and its end."""

from __future__ import annotations

import threading
from typing import NoReturn

import pytest
import trio

from castore.registry.one_thread import one_thread


async def test_all_calls_are_in_one_thread_and_wait_for_their_turn() -> None:
    names: list[int] = []

    async def other() -> int:
        return 7

    def work(number: int) -> int:
        names.append(threading.get_ident())
        return number + trio.from_thread.run(other)

    answers: dict[int, int] = {}

    async def ask(number: int) -> None:
        answers[number] = await thread.run(work, number)
        await trio.to_thread.run_sync(threading.get_ident)

    async with one_thread() as thread, trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(ask, number)
    assert answers == {number: number + 7 for number in range(20)}
    assert len(set(names)) == 1
    assert names[0] != threading.get_ident()


async def test_what_it_raises_comes_alone() -> None:
    def fail() -> NoReturn:
        raise KeyError("one")

    with pytest.raises(KeyError, match="one"):
        async with one_thread() as thread:
            await thread.run(fail)
    with pytest.raises(ValueError, match="two"):
        async with one_thread():
            raise ValueError("two")


async def test_a_cancelled_call_is_waited_for() -> None:
    done: list[str] = []
    with trio.CancelScope() as scope:
        async with one_thread() as thread:
            scope.cancel()
            await thread.run(done.append, "done")
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert done == ["done"]
