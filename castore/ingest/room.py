"""The room that users have for staged bytes: counted in memory, bounded by the configuration. It touches no disk.

Only a publish or a removal gives room back: what is stored stays staged until then. So who finds none waits as long as
a publish is under way, and no longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from castore.errors import StagingFull
from castore.ingest.pulse import Signal


class StagingRoom:
    """Bytes staged by all users together and by each. `max_bytes_per_user` 0 means no bound of its own."""

    def __init__(self, bytes_by_user: dict[int, int], *, max_bytes: int, max_bytes_per_user: int = 0) -> None:
        self.max_bytes = max_bytes
        self.staged_bytes = sum(bytes_by_user.values())
        self._max_bytes_per_user = max_bytes_per_user
        self._bytes_by_user = bytes_by_user
        self._leaving: Counter[int] = Counter()
        """The publishes under way of each version, by its inode."""
        self.changed = Signal()
        """Pulsed when bytes are given back, and when a publish ends, however it does."""

    def reserve(self, uid: int, grow_bytes: int) -> None:
        """A file is about to grow (or, negative, to shrink). Raises StagingFull, with nothing counted."""
        full = self.lack(uid, grow_bytes)
        if full is not None:
            raise full
        self.take(uid, grow_bytes)

    def lack(self, uid: int, grow_bytes: int) -> StagingFull | None:
        """Why a file of that user cannot grow by so much, if it cannot: of two reasons the user's own."""
        if grow_bytes > 0:
            if self.is_users_own(uid, grow_bytes):
                return StagingFull(f"uid {uid} staged all of ingest.max_bytes_per_user {self._max_bytes_per_user}")
            if self.staged_bytes + grow_bytes > self.max_bytes:
                return StagingFull(f"staging is full: ingest.staging_max_bytes is {self.max_bytes}")
        return None

    def is_users_own(self, uid: int, grow_bytes: int) -> bool:
        """Whether the user's own bound keeps a file from growing by so much: what others give back does not help."""
        return bool(self._max_bytes_per_user) and self._of(uid) + grow_bytes > self._max_bytes_per_user

    @contextmanager
    def leaving(self, version_inode: int) -> Iterator[None]:
        """A publish of that version is under way: when it succeeds, all of its bytes go."""
        self._leaving[version_inode] += 1
        try:
            yield
        finally:
            self._leaving[version_inode] -= 1
            self._leaving += Counter()  # forgets those with no publish left
            self.changed.pulse()

    def leaving_beside(self, version_inode: int) -> list[int]:
        """The other versions of which a publish is under way: one's own may wait for the very writer that asks."""
        return [other for other in self._leaving if other != version_inode]

    def take(self, uid: int, size_bytes: int) -> None:
        """Count bytes, whatever the bounds; negative ones are given back."""
        self.staged_bytes += size_bytes
        rest = self._of(uid) + size_bytes
        if rest > 0:
            self._bytes_by_user[uid] = rest
        else:
            self._bytes_by_user.pop(uid, None)
        if size_bytes < 0:
            self.changed.pulse()

    def _of(self, uid: int) -> int:
        return self._bytes_by_user.get(uid, 0)
