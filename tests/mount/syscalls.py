"""System calls that Python's library lacks, for tests."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_STATX_FORCE_SYNC: Final = 0x2000
_STATX_BASIC_STATS: Final = 0x7FF
_TIME: Final = "qI4x"
_STATX: Final = struct.Struct(f"=IIQIIIH2xQQQQ{_TIME}{_TIME}{_TIME}{_TIME}")
"""Of the 256 bytes of `struct statx` (statx(2)), those up to stx_mtime."""
_DIRENT: Final = struct.Struct("=QqHB")
"""Of a `struct linux_dirent64` (getdents(2)), what comes before its name."""


def forced_stat(path: str) -> os.stat_result:
    """As os.lstat, but of what the file system says now, not of what the kernel keeps. Raises OSError."""
    buffer = ctypes.create_string_buffer(256)
    flags = _AT_SYMLINK_NOFOLLOW | _AT_STATX_FORCE_SYNC
    if _LIBC.statx(_AT_FDCWD, os.fsencode(path), flags, _STATX_BASIC_STATS, buffer):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    fields = _STATX.unpack_from(buffer)
    _, _, _, nlink, uid, gid, mode, inode, size_bytes, _, _ = fields[:11]
    changed, modified = fields[15:17], fields[17:19]
    whole = (mode, inode, 0, nlink, uid, gid, size_bytes, modified[0], modified[0], changed[0])
    extra = {f"st_{name}_ns": time[0] * 10**9 + time[1] for name, time in (("mtime", modified), ("ctime", changed))}
    return os.stat_result(whole, extra)


def listed(path: str, buffer_bytes: int) -> list[tuple[bytes, int]]:
    """Name and number of each entry, `.` and `..` too, as a program gets them that asks for so few at a time."""
    found: list[tuple[bytes, int]] = []
    buffer = ctypes.create_string_buffer(buffer_bytes)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while (count := _LIBC.getdents64(descriptor, buffer, buffer_bytes)) > 0:
            start = 0
            while start < count:
                inode, _, length, _ = _DIRENT.unpack_from(buffer, start)
                found.append((buffer.raw[start + _DIRENT.size : start + length].split(b"\0")[0], inode))
                start += length
        if count:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(descriptor)
    return found
