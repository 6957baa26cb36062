"""Room for whole objects on their way from one backend to another: in memory, or in files without a name.

A file without a name is gone when its process is, however that ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, Final

import trio

from castore.digest import BlobSummary
from castore.storage.source import BytesSource, FileSource
from castore.storage.spi import Source
from castore.verify.reading import LARGE_BYTES

ASIDE_BYTES: Final = 4 * 1024**3
"""Files that wait to be put, all together. A larger object goes alone: it fits where it was staged once."""


class Aside:
    """One object, while it is on its way. `keep` takes its bytes, then `source` gives them."""

    def __init__(self, size_bytes: int, file: IO[bytes] | None) -> None:
        self._data = bytearray(size_bytes) if file is None else None
        self._file = file

    def keep(self, offset: int, piece: memoryview) -> None:
        """Take a piece. Raises OSError when there is no room for it."""
        if self._data is not None:
            self._data[offset : offset + len(piece)] = piece
            return
        assert self._file is not None
        while piece:
            count = os.pwrite(self._file.fileno(), piece, offset)
            offset, piece = offset + count, piece[count:]

    def source(self, summary: BlobSummary) -> Source:
        """All that was kept, to be put. A file's blocks are checked once more, against `summary`, as they are read."""
        if self._data is not None:
            return BytesSource(bytes(self._data))
        assert self._file is not None
        return FileSource(Path(f"/proc/self/fd/{self._file.fileno()}"), summary)


class AsideRoom:
    """Hands out `Aside`s below `folder`, in the order asked for, their files within a bound."""

    def __init__(self, folder: Path, *, max_bytes: int = ASIDE_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._turn = trio.StrictFIFOLock()
        self._freed = trio.Event()

    @asynccontextmanager
    async def take(self, size_bytes: int) -> AsyncIterator[Aside]:
        """Room for one object. Raises OSError when there can be no file."""
        charge = size_bytes if size_bytes > LARGE_BYTES else 0
        if charge:
            async with self._turn:
                while self._used_bytes and self._used_bytes + charge > self._max_bytes:
                    self._freed = trio.Event()
                    await self._freed.wait()
                self._used_bytes += charge
        try:
            with ExitStack() as stack:
                file = None
                if charge:
                    file = stack.enter_context(tempfile.TemporaryFile(dir=self._folder, buffering=0))
                yield Aside(size_bytes, file)
        finally:
            self._used_bytes -= charge
            self._freed.set()
