"""Events to a file of JSON lines, which is set aside when it is long. Knows nothing of where events come from.

A line is there whole and synced when `send` returns. What a kill or a full disk left of one goes at the next.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import trio

from castore.config_events import EventFileSettings
from castore.errors import DeliveryError

HALF_LINE_MAX_BYTES: Final = 1 << 20
"""How far the beginning of a half line is looked for: no event is nearly that long."""
_MODE: Final = 0o640
"""Those who collect logs read it by their group."""


class EventFile:
    """A sink. One process at a time writes to the file; whoever wants to may rename it."""

    name: Final = "file"

    def __init__(self, settings: EventFileSettings) -> None:
        self.settings = settings
        self.batch_events = 500

    @property
    def place(self) -> str:
        """Where events go, for people."""
        return str(self.settings.path)

    async def send(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Append a line for each. Raises DeliveryError; some lines may be there then."""
        lines = [json.dumps(document, separators=(",", ":")).encode() + b"\n" for document in documents]
        try:
            await trio.to_thread.run_sync(self._append, lines)
        except OSError as exc:
            raise DeliveryError(f"{self.settings.path}: {exc.strerror}") from exc

    async def aclose(self) -> None:
        """Nothing is kept open."""

    def _append(self, lines: Sequence[bytes]) -> None:
        left = list(lines)
        while left:
            with self._opened() as (descriptor, size):
                part: list[bytes] = []
                while left and (not size or size + len(left[0]) <= self.settings.rotate_bytes):
                    size += len(left[0])
                    part.append(left.pop(0))
                _write(descriptor, b"".join(part))
            if left:
                _set_aside(self.settings.path, self.settings.rotate_keep)

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int]]:
        """The file, made if it is not there, and its size without a half line at its end."""
        path = self.settings.path
        is_new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, _MODE)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DeliveryError(f"{path}: is not a plain file")
            if is_new:
                _sync_folder(path.parent)
            yield descriptor, _cut_half_line(descriptor, path)
        finally:
            os.close(descriptor)


def _cut_half_line(descriptor: int, path: Path) -> int:
    """The size of the file, now that it ends with a whole line."""
    size = os.fstat(descriptor).st_size
    begin = max(0, size - HALF_LINE_MAX_BYTES)
    if not size or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    end = os.pread(descriptor, size - begin, begin).rfind(b"\n") + 1
    if begin and not end:
        raise DeliveryError(f"{path}: has no lines at its end: it is no file of events")
    os.ftruncate(descriptor, begin + end)
    return begin + end


def _write(descriptor: int, data: bytes) -> None:
    """Append all of it, synced, or nothing."""
    size = os.fstat(descriptor).st_size
    try:
        done = 0
        while done < len(data):
            done += os.write(descriptor, data[done:])
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def _set_aside(path: Path, keep: int) -> None:
    """Rename PATH to PATH.1, that to PATH.2, and so on, up to the first number that is free; beyond `keep` they go."""
    number = 1
    while number < keep and os.path.lexists(f"{path}.{number}"):
        number += 1
    for to in range(number, 0, -1):
        source = path if to == 1 else Path(f"{path}.{to - 1}")
        source.replace(f"{path}.{to}")
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
