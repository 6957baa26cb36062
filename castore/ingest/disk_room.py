"""The room on the staging disk: what users' bytes may take of it, whoever writes them. It counts nobody's bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from castore.errors import StagingFull

RESERVE_BYTES: Final = 16 * 1024 * 1024
"""Bytes of users leave that much of the disk, or a sixteenth of a small one, to the workspace: else nothing could be
removed from a full one, since that is written down too."""
_RESERVE_SHARE: Final = 16


class DiskRoom:
    """The room on the disk of one folder, for writers in many threads: together they leave the reserve alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._under_way_bytes = 0
        """What `taken` allowed, and may not be on the disk yet."""

    def left_bytes(self, disk: os.statvfs_result) -> int:
        """What is left for bytes of users, when the disk looks like that."""
        return max(0, room_bytes(disk) - self._under_way_bytes)

    @contextmanager
    def taken(self, size_bytes: int) -> Iterator[None]:
        """Inside, so many bytes are written. Raises StagingFull when they do not fit beside what others write now."""
        with self._lock:
            self.check(size_bytes)
            self._under_way_bytes += size_bytes
        try:
            yield
        finally:
            with self._lock:
                self._under_way_bytes -= size_bytes

    def check(self, size_bytes: int) -> None:
        """Raise StagingFull when so many bytes do not fit now."""
        if size_bytes > self.left_bytes(os.statvfs(self._folder)):
            raise StagingFull("the disk of the staging folder is full")


def room_bytes(disk: os.statvfs_result) -> int:
    """What a disk has for bytes of users: what is free, less what the workspace may need."""
    reserve = min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // _RESERVE_SHARE)
    return max(0, disk.f_bavail * disk.f_frsize - reserve)
