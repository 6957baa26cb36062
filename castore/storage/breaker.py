"""A circuit breaker: nobody waits for a backend that fails call after call. Never does a call again.

It knows what this process met, and no more: where objects are, and which of them are good, the catalog says.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, TypeVar

import trio

from castore.errors import SourceChanged, StorageError, StorageTimeout, StorageUnavailable
from castore.storage.spi import BackendHealth, ObjectInfo, StorageBackend
from castore.storage.wrapping import Operation, Steps, Wrapping

T = TypeVar("T")

FAILURES: Final = 5
"""Calls in a row that fail, each after all its tries, until a backend is left alone. Fewer are a bad moment."""
PAUSE_MIN_S: Final = 1.0
PAUSE_MAX_S: Final = 15.0
"""Bounds of the pause before one call is let through, in seconds. It doubles with each that fails. At most so long
does a backend that answers again stay unused; a call in 15 s is no burden to one that does not."""

_DEAD: Final = (StorageTimeout, StorageUnavailable)
"""What a backend that cannot do its work raises. Any other error is an answer."""

_log = logging.getLogger(__name__)


class BreakerBackend(Wrapping):
    """Hands calls on, until `failures` of them in a row fail, about more than one object: with StorageTimeout or
    StorageUnavailable.

    From then on the backend is *open*, as an electric circuit is: calls raise StorageUnavailable at once. After a
    pause, one call at a time is let through. The first answer closes it: bytes, or any error but these two. So neither
    errors that waiting does not mend nor one object that the backend cannot give make an outage. The pause is random
    between half and all of a bound that begins at `pause_min_s` and doubles up to `pause_max_s`.

    A call that is cancelled says nothing. Of a listing the first step counts, and alone is refused. `health` is always
    asked, and says when the backend is open; `aclose` goes straight through.
    """

    def __init__(
        self,
        inner: StorageBackend,
        *,
        failures: int = FAILURES,
        pause_min_s: float = PAUSE_MIN_S,
        pause_max_s: float = PAUSE_MAX_S,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        super().__init__(inner)
        self._enough = failures
        self._pause_min_s = pause_min_s
        self._pause_max_s = pause_max_s
        self._uniform = uniform
        self._failed = 0
        self._subjects: set[str] = set()
        self._open: _Open | None = None

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        trial = self._enter(operation)
        try:
            result = await call()
        except _DEAD as exc:
            self._no_answer(operation, exc, trial)
            raise
        except SourceChanged:
            raise  # says nothing of the backend
        except (StorageError, StopAsyncIteration):
            self._answer()
            raise
        finally:
            if trial is not None:
                trial.under_way = False
        self._answer()
        return result

    @asynccontextmanager
    async def _list(self, algorithm: str, prefix: str) -> AsyncIterator[AsyncIterator[ObjectInfo]]:
        operation = Operation("list", f"{algorithm}:{prefix}")
        begun = False

        async def around(call: Callable[[], Awaitable[ObjectInfo]]) -> ObjectInfo:
            nonlocal begun
            if begun:  # most steps ask nothing of the backend: they prove nothing
                return await call()
            begun = True
            return await self._around(operation, call)

        async with self._inner.list(algorithm, prefix=prefix) as objects:
            yield Steps(objects, around)

    async def health(self) -> BackendHealth:
        health = await self._inner.health()
        state = self._open
        if state is None:
            return health
        status = "warn" if health.status == "pass" else health.status
        return replace(health, status=status, detail=f"{health.detail}; calls fail at once {state}")

    def _enter(self, operation: Operation) -> _Open | None:
        """The open state of which this call is the trial; None when there is none. Raises when it may not begin."""
        state = self._open
        if state is None:
            return None
        if state.under_way or trio.current_time() < state.until:
            raise StorageUnavailable(
                f"backend {self.backend_id}: {operation.name} {operation.subject}: not asked, {state}"
            )
        state.under_way = True
        state.until = trio.current_time() + state.pause_s  # unless it is cancelled, the outcome decides anew
        return state

    def _no_answer(self, operation: Operation, error: StorageError, trial: _Open | None) -> None:
        state = self._open
        if state is None:
            self._failed += 1
            self._subjects.add(operation.subject)
            if self._failed >= self._enough and len(self._subjects) > 1:
                self._open = state = _Open(str(error))
                self._pause(state, self._pause_min_s)
                _log.warning(
                    "backend %s is left alone after %d calls in a row that failed: %s",
                    self.backend_id,
                    self._failed,
                    error,
                )
        elif state is trial:
            state.reason = str(error)
            self._pause(state, min(self._pause_max_s, 2 * state.bound_s))

    def _pause(self, state: _Open, bound_s: float) -> None:
        state.bound_s = bound_s
        state.pause_s = self._uniform(bound_s / 2, bound_s)
        state.until = trio.current_time() + state.pause_s

    def _answer(self) -> None:
        self._failed = 0
        self._subjects.clear()
        state, self._open = self._open, None
        if state is not None:
            _log.warning("backend %s answers again; it was left alone %s", self.backend_id, state.since)


class _Open:
    """Since when and why a backend is open, and when it is asked again. `str()` says the first two."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.since = f"since {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        self.bound_s = 0.0
        self.pause_s = 0.0
        self.until = 0.0
        self.under_way = False

    def __str__(self) -> str:
        return f"{self.since}, because calls failed one after the other, the last with: {self.reason}"
