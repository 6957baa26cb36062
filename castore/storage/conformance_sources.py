"""Sources that misbehave on purpose, for the conformance suite. Not for production."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import BinaryIO, Final

PATIENCE_S: Final = 60.0
"""Seconds after which a backend that still has not come to an answer fails its test."""


class ScriptedSource:
    """A source that promises a size and opens whatever it is told."""

    def __init__(self, size_bytes: int, opener: Callable[[], BinaryIO]) -> None:
        self.size_bytes = size_bytes
        self.open = opener


class BlockingSource:
    """Gives the first `good_bytes` of `data`; any read beyond blocks until `go_on` is set, then gives the rest."""

    def __init__(self, data: bytes, good_bytes: int) -> None:
        self.size_bytes = len(data)
        self.blocked = threading.Event()
        """Set as soon as a read blocks."""
        self.go_on = threading.Event()
        self.all_closed = threading.Event()
        """Set while every reader that was opened is closed again."""
        self._data = data
        self._good_bytes = good_bytes
        self._lock = threading.Lock()
        self._open_readers = 0
        self._given_bytes = 0

    @property
    def given_bytes(self) -> int:
        """How many bytes all readers that are closed have given together."""
        return self._given_bytes

    def open(self) -> BinaryIO:
        self._count(1, 0)
        return io.BufferedReader(
            _PartReader(self._data, self._good_bytes, beyond=self._block, closed=lambda given: self._count(-1, given))
        )

    def _block(self) -> None:
        self.blocked.set()
        if not self.go_on.wait(PATIENCE_S):
            raise OSError("a put that was cancelled still waits for its source")

    def _count(self, readers: int, given_bytes: int) -> None:
        with self._lock:
            self._open_readers += readers
            self._given_bytes += given_bytes
            if self._open_readers:
                self.all_closed.clear()
            else:
                self.all_closed.set()


def failing_reader(data: bytes, good_bytes: int) -> BinaryIO:
    """Gives the first `good_bytes` of `data`; any read beyond raises OSError."""

    def fail() -> None:
        raise OSError("the staging disk fails")

    return io.BufferedReader(_PartReader(data, good_bytes, beyond=fail))


class _PartReader(io.RawIOBase):
    """Calls `beyond` before any read that begins behind the first `good_bytes`.

    Calls `closed` in the end, with the number of bytes that it gave.
    """

    def __init__(
        self,
        data: bytes,
        good_bytes: int,
        *,
        beyond: Callable[[], None],
        closed: Callable[[int], None] = lambda given_bytes: None,
    ) -> None:
        super().__init__()
        self._data = data
        self._good_bytes = good_bytes
        self._beyond = beyond
        self._on_close = closed
        self._position = 0
        self._given_bytes = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._data)}[whence] + offset
        return self._position

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        end = self._good_bytes
        if self._position >= self._good_bytes:
            self._beyond()
            end = len(self._data)
        part = self._data[self._position : min(self._position + len(target), end)]
        target[: len(part)] = part
        self._position += len(part)
        self._given_bytes += len(part)
        return len(part)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._on_close(self._given_bytes)
