"""Sources for `put`: bytes at hand, or a staged file whose blocks are checked while they are read. Stores nothing."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from castore.digest import BlobSummary, Digest, block_checksum
from castore.errors import SourceChanged

if TYPE_CHECKING:
    from castore.storage.spi import Source

CHUNK_BYTES: Final = 256 * 1024
"""Bytes asked for at a time: two blocks. 128 KiB reads at half the speed (a page fault for each fresh buffer),
1 MiB gains nothing."""


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    def open(self) -> BinaryIO:
        return io.BytesIO(self._data)


class FileSource:
    """A file, checked block by block against its summary while it is read.

    The check catches a file that changed, or that the disk gives back differently from what was written.
    Readers raise SourceChanged at the first block that differs, and OSError as the disk does. Reads as large as
    a block or larger go straight into the reader's buffer.
    """

    def __init__(self, path: Path, summary: BlobSummary) -> None:
        self.path = path
        self.summary = summary

    @property
    def size_bytes(self) -> int:
        return self.summary.size_bytes

    def open(self) -> BinaryIO:
        return io.BufferedReader(_CheckedReader(self.path, self.summary), self.summary.block_size_bytes)


class _CheckedReader(io.RawIOBase):
    """Gives out only bytes of whole blocks that were checked after they were read."""

    def __init__(self, path: Path, summary: BlobSummary) -> None:
        super().__init__()
        self._path = path
        self._summary = summary
        self._position = 0
        self._kept = bytearray()
        self._kept_index = -1
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(self._fd).st_size
        if size != summary.size_bytes:
            self.close()
            raise SourceChanged(f"{path}: {size} bytes on disk, {summary.size_bytes} expected")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._summary.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: object) -> int:
        target = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        done = 0
        while done < len(target) and self._position < self._summary.size_bytes:
            index, start = divmod(self._position, self._summary.block_size_bytes)
            size = self._block_bytes(index)
            if start == 0 and size <= len(target) - done:
                self._load(index, target[done : done + size])
                count = size
            elif done:
                break
            else:
                count = self._copy_part(index, start, target)
            done += count
            self._position += count
        return done

    def _block_bytes(self, index: int) -> int:
        block_size = self._summary.block_size_bytes
        return min(block_size, self._summary.size_bytes - index * block_size)

    def _copy_part(self, index: int, start: int, target: memoryview) -> int:
        """Part of a block, by way of a block of our own: what is given out must have been checked as a whole."""
        if index != self._kept_index:
            self._kept_index = -1
            self._kept = bytearray(self._block_bytes(index))
            self._load(index, memoryview(self._kept))
            self._kept_index = index
        count = min(len(target), len(self._kept) - start)
        target[:count] = memoryview(self._kept)[start : start + count]
        return count

    def _load(self, index: int, block: memoryview) -> None:
        offset = index * self._summary.block_size_bytes
        done = 0
        while done < len(block):
            count = os.preadv(self._fd, [block[done:]], offset + done)
            if count == 0:
                raise SourceChanged(f"{self._path}: ends at byte {offset + done}, {self._summary.size_bytes} expected")
            done += count
        if block_checksum(block, self._summary.checksum_algorithm) != self._summary.checksum(index):
            raise SourceChanged(f"{self._path}: block {index} is not what was written")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        super().close()


def read_exactly(digest: Digest, source: Source) -> Generator[bytes]:
    """All bytes of the source of `digest`, in order, in chunks of at most CHUNK_BYTES. Blocking: use it in a thread.

    Raises SourceChanged when the source holds fewer or more bytes than `size_bytes`, cannot be read, or says so
    itself. Close the generator to close the source's reader.
    """
    remaining = promised = source.size_bytes
    try:
        with source.open() as reader:
            while chunk := reader.read(min(CHUNK_BYTES, remaining + 1)):
                remaining -= len(chunk)
                if remaining < 0:
                    raise SourceChanged(f"source of {digest}: more than the {promised} bytes promised")
                yield chunk
    except OSError as exc:
        raise SourceChanged(f"source of {digest} cannot be read: {exc}") from exc
    if remaining:
        raise SourceChanged(f"source of {digest}: ends {remaining} bytes before the {promised} promised")
