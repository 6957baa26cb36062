"""Buffers for blocks, used again once nobody refers to them any more. Who may have one when is not decided here.

A buffer is counted as long as anybody holds a slice of it: memory, the queue of the disk cache, a reply on its way to
the kernel. So what is counted is what is there, and a slice stays true however long it is held.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from typing import Final
from weakref import ref

FREE_BYTES: Final = 16 * 1024 * 1024
"""Buffers kept for their next use: filling fresh memory takes 270 us a MiB more, a quarter of what a get takes here."""

SMALL_BYTES: Final = 64 * 1024
"""Smaller buffers are the C library's, and not counted: it uses their memory again without holes."""

_UNIT: Final = 128 * 1024
"""Buffers have multiples of it. One that comes back is used for what needs half of it at least."""

_new_bytearray: Final = ctypes.pythonapi.PyByteArray_FromStringAndSize
_new_bytearray.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)
_new_bytearray.restype = ctypes.py_object


class _Use(ref["ctypes.Array[ctypes.c_ubyte]"]):
    """Of a mapping, by one buffer."""

    __slots__ = ("mapping",)
    mapping: mmap.mmap


class Buffers:
    """Gives out buffers, on one thread; any thread may let go of them.

    Each is a mapping of its own. The C library keeps what is freed between two things that live, and with many readers
    nearly as much again as is in use: 150 MB with 64 of them.
    """

    def __init__(self) -> None:
        self._used_bytes = 0
        self._uses: dict[int, _Use] = {}
        self._back: deque[mmap.mmap] = deque()
        self._free: list[mmap.mmap] = []
        """The one that came back last is at the end."""
        self._free_bytes = 0

    def take(self, size_bytes: int) -> memoryview:
        """A writable buffer with any bytes. A fresh one takes memory when it is filled, not before."""
        if size_bytes < SMALL_BYTES:
            return memoryview(_unfilled(size_bytes))
        mapping = self._mapping(-(-size_bytes // _UNIT) * _UNIT)
        self._used_bytes += len(mapping)
        array = (ctypes.c_ubyte * size_bytes).from_buffer(mapping)
        use = _Use(array, self._came_back)
        use.mapping = mapping
        self._uses[id(use)] = use
        return memoryview(array).cast("B")

    def used_bytes(self) -> int:
        """In buffers that somebody refers to, as of now."""
        while self._back:
            mapping = self._back.popleft()
            self._used_bytes -= len(mapping)
            self._free.append(mapping)
            self._free_bytes += len(mapping)
        while self._free_bytes > FREE_BYTES:
            self._free_bytes -= len(self._free.pop(0))
        return self._used_bytes

    def free(self) -> None:
        """Keep nothing for the next use."""
        self.used_bytes()
        self._free.clear()
        self._free_bytes = 0

    def _mapping(self, size_bytes: int) -> mmap.mmap:
        self.used_bytes()
        best, best_bytes = -1, 2 * size_bytes + 1
        for index, mapping in enumerate(self._free):
            if size_bytes <= len(mapping) < best_bytes:
                best, best_bytes = index, len(mapping)
        if best >= 0:
            self._free_bytes -= best_bytes
            return self._free.pop(best)
        return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _came_back(self, use: ref[ctypes.Array[ctypes.c_ubyte]]) -> None:
        self._back.append(self._uses.pop(id(use)).mapping)


def _unfilled(size_bytes: int) -> bytearray:
    """Without zeros in it, which would take memory, and time (docs.python.org/3/c-api/bytearray.html)."""
    buffer: bytearray = _new_bytearray(None, size_bytes)
    return buffer
