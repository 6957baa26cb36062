"""One thread for work that must stay in one: each call waits its turn. Not for work that may be abandoned."""

from __future__ import annotations

import queue
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio

T = TypeVar("T")


class OneThread:
    """Runs calls one after the other, in a thread of trio's that is theirs alone. Made by `one_thread`.

    A database's pages are allocated by whoever reads them. Read by one of trio's threads now and by another one then,
    they stay in a heap of each: 16 MiB of cache became 120 MB, in a rebuild of a million entries.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work(*arguments)` in the thread; what it returns or raises. It may use `trio.from_thread`."""
        done = trio.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def call() -> None:
            try:
                results.append(work(*arguments))
            except BaseException as exc:
                errors.append(exc)
            trio.from_thread.run_sync(done.set)

        self._calls.put(call)
        with trio.CancelScope(shield=True):
            await done.wait()
        for error in errors:
            raise error
        return results[0]

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


@asynccontextmanager
async def one_thread() -> AsyncIterator[OneThread]:
    """A thread until the block ends."""
    thread = OneThread()
    error: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_shielded, thread)
        try:
            yield thread
        except Exception as exc:
            error = exc  # raised outside, so that it is not part of a group
        finally:
            thread._calls.put(None)
    if error is not None:
        raise error


async def _shielded(thread: OneThread) -> None:
    """Its end is the word, so that no call is left without an answer."""
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(thread._serve)
