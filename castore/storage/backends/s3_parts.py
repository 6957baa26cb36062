"""A source, read part by part in threads, for a backend that sends parts from memory. Sends nothing itself."""

from __future__ import annotations

import hashlib
import threading
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Final

import trio

from castore.digest import Digest
from castore.errors import SourceChanged
from castore.storage.spi import Source

MAX_PARTS: Final = 10_000
"""Parts that an upload may have at most (Amazon S3 user guide, "multipart upload limits")."""
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
    """Bytes to send, and their MD5."""

    data: bytes
    md5: bytes

    @property
    def md5_base64(self) -> str:
        return b64encode(self.md5).decode()


class PartReader:
    """Reads a source once, in order. Each read is one visit to a thread, which is abandoned on cancellation.

    An abandoned thread closes the source's reader when it comes back; else `close` does.
    """

    def __init__(self, digest: Digest, source: Source, limiter: trio.CapacityLimiter) -> None:
        self._digest = digest
        self._source = source
        self._limiter = limiter
        self._left = source.size_bytes
        self._reader: BinaryIO | None = None
        self._busy = threading.Lock()
        self._closed = False

    async def read(self, size_bytes: int) -> Part:
        """The next `size_bytes`, which have to be there. With the last of them it proves that there are no more.

        Raises SourceChanged when there are fewer or more, when the source cannot be read, and when it says so itself.
        """
        return await trio.to_thread.run_sync(
            self._read, size_bytes, abandon_on_cancel=True, limiter=self._limiter, thread_name="castore source"
        )

    def close(self) -> None:
        """Close the source's reader, or have the thread that reads just now do it. Idempotent."""
        self._closed = True
        self._close_if_idle()

    def _read(self, size_bytes: int) -> Part:
        try:
            with self._busy:
                if self._closed:
                    raise SourceChanged(f"source of {self._digest}: no longer wanted")
                data = self._read_exactly(size_bytes)
        finally:
            if self._closed:
                self._close_if_idle()
        return Part(data, hashlib.md5(data, usedforsecurity=False).digest())

    def _read_exactly(self, size_bytes: int) -> bytes:
        try:
            if self._reader is None:
                self._reader = self._source.open()
            data = self._reader.read(size_bytes) if size_bytes else b""
            self._left -= len(data)
            more = self._reader.read(1) if not self._left else b""
        except OSError as exc:
            raise SourceChanged(f"source of {self._digest} cannot be read: {exc}") from exc
        promised = self._source.size_bytes
        if len(data) < size_bytes:
            raise SourceChanged(f"source of {self._digest}: ends {self._left} bytes before the {promised} promised")
        if more:
            raise SourceChanged(f"source of {self._digest}: more than the {promised} bytes promised")
        return data

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
