"""Tries calls again that failed for a temporary reason. Never anything else, and never without a bound.

A loop of our own: tenacity adds 14 microseconds to each call that succeeds at once, more than a local read of
4 KiB takes altogether, and has no notion of a listing that resumes.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, TypeVar

import trio

from castore.errors import StorageError
from castore.storage.pages import Pages
from castore.storage.spi import ObjectInfo, StorageBackend
from castore.storage.wrapping import Operation, Wrapping

T = TypeVar("T")

TRIES: Final = 4
"""Calls in all. With the delays below, a failure is certain after 0.7 s of waiting at most: callers have
deadlines of their own, and other locations to ask."""
LAST_TRY_S: Final = 30.0
"""Seconds after the first try in which others begin. So a call that gets no answers ends after these and one deadline,
and not after four: that outlasts a server's fail-over, and a person's patience."""
BASE_DELAY_S: Final = 0.1
MAX_DELAY_S: Final = 5.0
"""Bounds of the wait before the first and before any further try, in seconds."""
RETRY_AFTER_MAX_S: Final = 10.0
"""The longest that a backend's own wish to be left alone is heeded, in seconds. Some ask for hours."""

_PAGE_OBJECTS: Final = 100
"""Objects handed over at a time: one costs 40 microseconds by itself, as it changes tasks twice."""


class RetryingBackend(Wrapping):
    """Does a call up to `tries` times, as long as it raises a temporary StorageError; then raises the last one.

    Waits before each further try for a random time between 0 and a bound that begins at `base_delay_s` and doubles
    up to `max_delay_s` ("full jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).
    An error's `retry_after_s` comes on top, up to RETRY_AFTER_MAX_S. A try that would begin more than `last_try_s`
    after the first, or after a deadline of the caller's, is not waited for: the error is raised at once.
    A listing that fails begins anew and goes on behind the last object it gave; each object gives it `tries` and
    `last_try_s` again.
    """

    def __init__(
        self,
        inner: StorageBackend,
        *,
        tries: int = TRIES,
        last_try_s: float = LAST_TRY_S,
        base_delay_s: float = BASE_DELAY_S,
        max_delay_s: float = MAX_DELAY_S,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        super().__init__(inner)
        self._tries = tries
        self._last_try_s = last_try_s
        self._base_delay_s = base_delay_s
        self._max_delay_s = max_delay_s
        self._uniform = uniform

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        began = trio.current_time()
        failures = 0
        while True:
            try:
                return await call()
            except StorageError as exc:
                failures += 1
                delay_s = self._delay_s(exc, failures, began)
                if delay_s is None:
                    raise
            await trio.sleep(delay_s)

    def list(self, algorithm: str, *, prefix: str = "") -> AbstractAsyncContextManager[AsyncIterator[ObjectInfo]]:
        return self._list_again(algorithm, prefix)

    @asynccontextmanager
    async def _list_again(self, algorithm: str, prefix: str) -> AsyncIterator[AsyncIterator[ObjectInfo]]:
        async with self._pages(algorithm, prefix) as pages:

            async def next_page() -> Sequence[ObjectInfo]:
                async for page in pages:
                    if isinstance(page, StorageError):
                        raise page
                    return page
                return ()

            yield Pages(next_page)

    @trio.as_safe_channel
    async def _pages(self, algorithm: str, prefix: str) -> AsyncGenerator[Sequence[ObjectInfo] | StorageError]:
        # The error is the last page: raised here, it would come only after the caller had taken the end for the end.
        began = trio.current_time()
        failures = 0
        last: ObjectInfo | None = None
        page: list[ObjectInfo] = []
        while True:
            try:
                async with self._inner.list(algorithm, prefix=prefix) as objects:
                    async for info in objects:
                        if last is not None and info.digest <= last.digest:
                            continue
                        failures, last = 0, info
                        page.append(info)
                        if len(page) == _PAGE_OBJECTS:
                            yield page
                            page = []
                        began = trio.current_time()
                if page:
                    yield page
                return
            except StorageError as exc:
                failures += 1
                delay_s = self._delay_s(exc, failures, began)
                if delay_s is None:
                    if page:
                        yield page
                    yield exc.with_traceback(None)
                    return
            await trio.sleep(delay_s)

    def _delay_s(self, error: StorageError, failures: int, began: float) -> float | None:
        """Seconds to wait before the next try; None when there is to be none."""
        if not error.temporary or failures == self._tries:
            return None
        delay_s = self._uniform(0, min(self._max_delay_s, self._base_delay_s * 2 ** (failures - 1)))
        if error.retry_after_s is not None:
            delay_s += min(error.retry_after_s, RETRY_AFTER_MAX_S)
        last = min(began + self._last_try_s, trio.current_effective_deadline())
        return None if trio.current_time() + delay_s > last else delay_s
