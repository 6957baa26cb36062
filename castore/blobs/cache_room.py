"""How much a folder of cached blocks may hold: counted on the disk, the longest unused out first. Reads no block.

What counts is what the disk holds, whoever wrote it: files are counted anew now and then, because other processes write
to the same folder, and own writes are added in between. One process evicts at a time.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from castore.blobs.cache_files import CachedFile, CacheFiles

FULL_AT: Final = 0.95
"""Part of the bound at which eviction begins: the rest is for what other processes wrote since files were counted."""

EVICT_TO: Final = 0.90
"""Part of the bound that eviction leaves, so that it comes once in so many writes."""

COUNT_AFTER: Final = 1 / 64
"""Part of the bound that is written before files are counted anew: three processes stay within FULL_AT's margin."""

COUNT_SECONDS: Final = 60.0
"""Before a write, an older count is made anew. Counting takes some 3 microseconds a file."""

RESERVE_BYTES: Final = 1 << 30
"""Of the file system, or RESERVE_PART of a smaller one, that the cache leaves free, whatever its bound says."""

RESERVE_PART: Final = 0.05

_ASK_SECONDS: Final = 1.0
"""The file system says how much is free once in so long, and for each write when it is nearly full."""

_DISK_UNIT: Final = 4096
"""What the smallest file takes on common file systems."""

_PASSES: Final = 64
"""Of counting and removing, until enough is removed: one, or some after the bound was made much smaller."""

_NAMED_FILES: Final = 100_000
"""Files that one pass can remove: only their names are remembered, 30 MB at the most."""


@dataclass(slots=True)
class _Count:
    disk_bytes: int = 0
    file_count: int = 0
    oldest: list[CachedFile] = field(default_factory=list)


class CacheRoom:
    """Keeps a folder within `max_bytes` and within what its file system has left. For one thread at a time."""

    def __init__(self, files: CacheFiles, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = -1
        """What the folder's files take, as last counted and with own writes since; -1 before the first count."""
        self.file_count = 0
        self.evicted = 0
        """Files that this process removed."""
        self._files = files
        self._written = 0
        self._counted_at = 0.0
        self._asked_at = -_ASK_SECONDS
        self._free_bytes = 0
        self._reserve_bytes = 0

    def make(self, size_bytes: int) -> bool:
        """Make room for a write and take it; False when there is none, or another process makes it. Raises OSError."""
        if not self._make(size_bytes):
            return False
        self.took(size_bytes)
        self._free_bytes -= size_bytes
        return True

    def has(self, size_bytes: int) -> bool:
        """Whether there is room as things are, removing nothing; for any thread."""
        return 0 <= self.used_bytes <= self.max_bytes * EVICT_TO - size_bytes

    def took(self, size_bytes: int) -> None:
        """So many bytes more are in a file. What is written again is counted twice until files are counted anew."""
        taken = -(-size_bytes // _DISK_UNIT) * _DISK_UNIT
        self.used_bytes += taken
        self._written += taken

    def _make(self, size_bytes: int) -> bool:
        age = time.monotonic() - self._counted_at
        if self.used_bytes < 0 or self._written > self.max_bytes * COUNT_AFTER or age > COUNT_SECONDS:
            self.count()
        if self.used_bytes + size_bytes <= self._bound() * FULL_AT:
            return True
        descriptor = self._files.open_lock()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            self.evict(int(self._bound() * EVICT_TO) - size_bytes)
            return self.used_bytes + size_bytes <= self._bound() * FULL_AT
        finally:
            os.close(descriptor)

    def room_bytes(self) -> int:
        """What can be kept at a time, of this process alone; counts what is there. Raises OSError."""
        self.count()
        return int(self._bound() * EVICT_TO)

    def count(self) -> None:
        """Count what is there. Raises OSError."""
        self._take(self._look(0))

    def evict(self, target_bytes: int) -> None:
        """Remove the files that were not used for longest, until the rest takes at most so many bytes.

        Raises OSError.
        """
        for _ in range(_PASSES):
            count = self._look(max(0, self.used_bytes - target_bytes))
            self._take(count)
            removed = 0
            for file in sorted(count.oldest, key=lambda file: file.used_ns):
                if self.used_bytes <= target_bytes:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(file.path)
                    removed += 1
                self.used_bytes -= file.disk_bytes
                self._free_bytes += file.disk_bytes
            self.evicted += removed
            if not removed or self.used_bytes <= target_bytes:
                return

    def _bound(self) -> float:
        """The lesser of `max_bytes` and what the file system could give."""
        now = time.monotonic()
        if now - self._asked_at > _ASK_SECONDS or self._free_bytes < self._reserve_bytes * 2:
            disk = os.statvfs(self._files.folder)
            self._asked_at = now
            self._reserve_bytes = int(min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize * RESERVE_PART))
            # A file system without room for one more file is full, whatever its size.
            self._free_bytes = disk.f_bavail * disk.f_frsize if disk.f_favail or not disk.f_files else 0
        return min(self.max_bytes, max(0, self.used_bytes + self._free_bytes - self._reserve_bytes))

    def _take(self, count: _Count) -> None:
        self.used_bytes, self.file_count = count.disk_bytes, count.file_count
        self._written = 0
        self._counted_at = time.monotonic()

    def _look(self, wanted_bytes: int) -> _Count:
        """Count all files, and name the oldest ones that together take `wanted_bytes`, _NAMED_FILES at the most."""
        count = _Count()
        heap: list[tuple[int, str, CachedFile]] = []
        named = 0
        for file in self._files.walk():
            count.disk_bytes += file.disk_bytes
            if not file.path:
                continue
            count.file_count += 1
            if wanted_bytes and (named < wanted_bytes or -heap[0][0] > file.used_ns):
                heapq.heappush(heap, (-file.used_ns, file.path, file))
                named += file.disk_bytes
                while heap and (named - heap[0][2].disk_bytes >= wanted_bytes or len(heap) > _NAMED_FILES):
                    named -= heapq.heappop(heap)[2].disk_bytes
        count.oldest = [file for _, _, file in heap]
        return count
