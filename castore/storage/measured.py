"""Counts what a backend was asked and how it answered, beside the calls. Changes no call and no answer."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from castore.durations import Durations
from castore.errors import StorageError
from castore.storage.spi import StorageBackend
from castore.storage.wrapping import Operation, Wrapping

T = TypeVar("T")


class CallStats:
    """The calls of one backend since the program began. What is tried again counts each time."""

    def __init__(self) -> None:
        self.durations: defaultdict[str, Durations] = defaultdict(Durations)
        """By operation, of the calls that ended with an answer or an error; for `list` of each step."""
        self.errors: Counter[str] = Counter()
        """By kind: the error's class, written like `storage_timeout`."""
        self.read_bytes = 0
        """Bytes of gets that succeeded."""
        self.written_bytes = 0
        """Bytes of puts that succeeded."""
        self.in_progress = 0


class MeasuredBackend(Wrapping):
    """Counts every call in `stats`. A call that is cancelled is not counted: it says nothing of the backend."""

    def __init__(self, inner: StorageBackend, stats: CallStats) -> None:
        super().__init__(inner)
        self._stats = stats

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        stats = self._stats
        started = trio.current_time()
        stats.in_progress += 1
        try:
            result = await call()
        except StorageError as exc:
            stats.errors[kind_of(type(exc))] += 1
            stats.durations[operation.name].add(trio.current_time() - started)
            raise
        except StopAsyncIteration:
            stats.durations[operation.name].add(trio.current_time() - started)
            raise
        finally:
            stats.in_progress -= 1
        stats.durations[operation.name].add(trio.current_time() - started)
        if operation.name == "get":
            stats.read_bytes += operation.size_bytes
        elif operation.name == "put":
            stats.written_bytes += operation.size_bytes
        return result


def kind_of(error: type[StorageError]) -> str:
    """`storage_timeout` for StorageTimeout: one of the classes of `castore.errors`, however a backend derives it."""
    known = next(kind for kind in error.__mro__ if kind.__module__ == StorageError.__module__)
    return _CAPITAL.sub("_", known.__name__).lower()


_CAPITAL: Final = re.compile(r"(?<!^)(?=[A-Z])")
