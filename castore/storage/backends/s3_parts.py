"""A source, read part by part in threads, for a backend that sends parts from memory. Sends nothing itself."""

from __future__ import annotations

import hashlib
import io
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Final

import trio

from castore.digest import Digest
from castore.errors import SourceChanged
from castore.storage.source import CHUNK_BYTES
from castore.storage.spi import Source

MAX_PARTS: Final = 10_000
"""Parts that an upload may have at most (Amazon S3 user guide, "multipart upload limits")."""
MAX_OBJECT_BYTES: Final = 5 << 40
"""The largest object that every server takes (the same place)."""
_PART_STEP_BYTES: Final = 1 << 20
"""Parts grow in steps of this."""


def part_sizes(size_bytes: int, chunk_bytes: int) -> Iterator[int]:
    """Sizes of the parts of an object: all `chunk_bytes` but the last, or as much more as keeps them to MAX_PARTS."""
    least = -(-size_bytes // MAX_PARTS)
    part = chunk_bytes if least <= chunk_bytes else -(-least // _PART_STEP_BYTES) * _PART_STEP_BYTES
    for start in range(0, size_bytes, part):
        yield min(part, size_bytes - start)


@dataclass(frozen=True, slots=True, repr=False)
class Part:
    """Bytes to send, the whole of `stream`, and their MD5."""

    stream: io.BytesIO
    md5: bytes

    @property
    def md5_base64(self) -> str:
        return b64encode(self.md5).decode()


class Buffers:
    """A bound on the bytes in memory, and their memory, which is used again and again while any part is under way.

    There are `count` shares of `share_bytes`. A part takes as many as it fills, and never more than there are: one that
    is larger than all of them is alone. Fresh memory for each part would cost as much again: what threads free, the
    allocator keeps for these threads.
    """

    def __init__(self, count: int, share_bytes: int) -> None:
        self._count = count
        self._share_bytes = share_bytes
        self._free = trio.Semaphore(count, max_value=count)
        self._turn = trio.Lock()
        self._idle: list[io.BytesIO] = []

    async def take(self, size_bytes: int) -> io.BytesIO:
        """A stream for a part of that size, of any length and content, as soon as there is room."""
        taken = 0
        async with self._turn:  # two that each hold some of what they need would wait for each other
            try:
                while taken < self._shares(size_bytes):
                    await self._free.acquire()
                    taken += 1
            except BaseException:
                self._release(taken)
                raise
        stream = self._idle.pop() if self._idle else io.BytesIO()
        del self._idle[self._free.value :]
        return stream

    def give_back(self, size_bytes: int, stream: io.BytesIO | None) -> None:
        """Nobody uses the stream that was taken any more. None: it is lost to a thread that may still write to it."""
        self._release(self._shares(size_bytes))
        if stream is not None:
            self._idle.append(stream)
        if self._free.value == self._count:
            self._idle.clear()

    def _shares(self, size_bytes: int) -> int:
        return max(1, min(self._count, -(-size_bytes // self._share_bytes)))

    def _release(self, shares: int) -> None:
        for _ in range(shares):
            self._free.release()


class PartReader:
    """Reads a source once, in order. Each read is one visit to a thread, which is abandoned on cancellation.

    An abandoned thread closes the source's reader when it comes back; else `close` does.
    """

    def __init__(self, digest: Digest, source: Source, limiter: trio.CapacityLimiter) -> None:
        self._digest = digest
        self._source = source
        self._limiter = limiter
        self._promised = source.size_bytes
        self._left = self._promised
        self._reader: BinaryIO | None = None
        self._busy = threading.Lock()
        self._closed = False

    async def read(self, size_bytes: int, stream: io.BytesIO) -> Part:
        """The next `size_bytes`, which have to be there. With the last of them it proves that there are no more.

        They replace what is in the stream, which must not be used again when this raises. Raises SourceChanged when
        there are fewer or more, when the source cannot be read, and when it says so itself.
        """
        return await trio.to_thread.run_sync(
            self._read,
            size_bytes,
            stream,
            abandon_on_cancel=True,
            limiter=self._limiter,
            thread_name="castore source",
        )

    def close(self) -> None:
        """Close the source's reader, or have the thread that reads just now do it. Idempotent."""
        self._closed = True
        self._close_if_idle()

    def _read(self, size_bytes: int, stream: io.BytesIO) -> Part:
        try:
            with self._busy:
                if self._closed:
                    raise SourceChanged(f"source of {self._digest}: no longer wanted")
                return self._fill(size_bytes, stream)
        except OSError as exc:
            raise SourceChanged(f"source of {self._digest} cannot be read: {exc}") from exc
        finally:
            if self._closed:
                self._close_if_idle()

    def _fill(self, size_bytes: int, stream: io.BytesIO) -> Part:
        if self._reader is None:
            self._reader = self._source.open()
        if stream.seek(0, io.SEEK_END) < size_bytes:  # at once to its size, instead of growing step by step
            stream.seek(size_bytes - 1)
            stream.write(b"\0")
        stream.truncate(size_bytes)
        stream.seek(0)
        md5 = hashlib.md5(usedforsecurity=False)
        end = self._left - size_bytes
        while self._left > end:
            chunk = self._reader.read(min(CHUNK_BYTES, self._left - end))
            if not chunk:
                raise SourceChanged(
                    f"source of {self._digest}: ends {self._left} bytes before the {self._promised} promised"
                )
            md5.update(chunk)
            stream.write(chunk)
            self._left -= len(chunk)
        if not end and self._reader.read(1):
            raise SourceChanged(f"source of {self._digest}: more than the {self._promised} bytes promised")
        return Part(stream, md5.digest())

    def _close_if_idle(self) -> None:
        # Whoever ends last closes: the reading thread looks at `_closed` after it is no longer busy, and `close` sets
        # that before it looks whether anybody is.
        if self._busy.acquire(blocking=False):
            try:
                reader, self._reader = self._reader, None
                if reader is not None:
                    with suppress(OSError):  # everything that is wanted of it was read
                        reader.close()
            finally:
                self._busy.release()
