"""The one asyncio loop of the process, in one thread, for client libraries that need it. The only import of asyncio.

Not a bridge for anything else: trio code runs in trio, and what runs here runs no trio. Everybody who has an
`AsyncioThread` shares the loop, and the last to close it ends it. The thread starts with the first call, so that
a process may fork before that, and is a daemon thread, so that a crash never waits for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn, TypeVar, TypeVarTuple

import outcome
import trio

from castore.errors import StorageUnavailable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

THREAD_NAME: Final = "castore asyncio"

LoopLock = asyncio.Lock
"""For what runs in the loop and nowhere else. Making one needs no loop."""


class AsyncioThread:
    """A share in the process's asyncio loop. Making one starts nothing."""

    def __init__(self) -> None:
        self._loop: _Loop | None = None
        self._closed = False

    async def run(self, function: Callable[[*Ts], Coroutine[Any, Any, T]], *args: *Ts) -> T:
        """What `function(*args)` returns or raises as a task of the asyncio loop.

        When the caller is cancelled, that task is cancelled and waited for: nothing of it runs any more when this
        returns. If it comes to its result all the same, that is returned, as trio does.
        Raises StorageUnavailable when the task is cancelled by anybody else.
        """
        if self._closed:
            raise RuntimeError("this share in the asyncio loop is closed")
        if self._loop is None:
            self._loop = _Loop.join()
        loop = self._loop.asyncio_loop
        trio_task = trio.lowlevel.current_task()
        trio_token = trio.lowlevel.current_trio_token()
        asyncio_task: asyncio.Task[T] | None = None
        raise_cancel: Callable[[], NoReturn] | None = None

        async def call() -> T:
            return await function(*args)

        def start() -> None:
            nonlocal asyncio_task
            asyncio_task = loop.create_task(call())
            asyncio_task.add_done_callback(finish)

        def finish(task: asyncio.Task[T]) -> None:
            result = outcome.capture(task.result)
            trio_token.run_sync_soon(trio.lowlevel.reschedule, trio_task, outcome.Value(result))

        def cancel() -> None:
            if asyncio_task is not None:  # the loop keeps the order of `start` and `cancel`; None: it is over
                asyncio_task.cancel()

        def abort(raiser: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
            nonlocal raise_cancel
            raise_cancel = raiser
            loop.call_soon_threadsafe(cancel)
            return trio.lowlevel.Abort.FAILED  # not before `finish` says so

        loop.call_soon_threadsafe(start)
        result: outcome.Outcome[T] = await trio.lowlevel.wait_task_rescheduled(abort)
        asyncio_task = None  # it refers to the exception, and that to all its frames
        if isinstance(result, outcome.Error) and isinstance(result.error, asyncio.CancelledError):
            if raise_cancel is not None:
                raise_cancel()
            raise StorageUnavailable("the request was cancelled by the client library")
        return result.unwrap()

    async def aclose(self) -> None:
        """Give the share back, and wait for the thread's end if it was the last. Idempotent.

        Nothing may be under way by this share.
        """
        self._closed = True
        loop, self._loop = self._loop, None
        thread = loop.leave() if loop is not None else None
        if thread is None:
            await trio.lowlevel.checkpoint()
        else:
            await trio.to_thread.run_sync(thread.join, abandon_on_cancel=True)


class _Loop:
    """The loop, its thread, and how many share it."""

    _lock: Final = threading.Lock()
    _current: _Loop | None = None

    def __init__(self) -> None:
        self.asyncio_loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._shares = 0
        self._thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.asyncio_loop) as runner:
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        await self._stop.wait()

    @classmethod
    def join(cls) -> _Loop:
        """One more share in the loop, which runs from the first on."""
        with cls._lock:
            if cls._current is None:
                cls._current = cls()
            cls._current._shares += 1
            return cls._current

    def leave(self) -> threading.Thread | None:
        """One share less; the thread that now ends if it was the last."""
        with self._lock:
            self._shares -= 1
            if self._shares:
                return None
            _Loop._current = None
            self.asyncio_loop.call_soon_threadsafe(self._stop.set)
            return self._thread
