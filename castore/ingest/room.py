"""The room that users have for staged bytes: counted in memory, bounded by the configuration. It touches no disk."""

from __future__ import annotations

from castore.errors import StagingFull


class StagingRoom:
    """Bytes staged by all users together and by each. `max_bytes_per_user` 0 means no bound of its own."""

    def __init__(self, bytes_by_user: dict[int, int], *, max_bytes: int, max_bytes_per_user: int = 0) -> None:
        self.max_bytes = max_bytes
        self.staged_bytes = sum(bytes_by_user.values())
        self._max_bytes_per_user = max_bytes_per_user
        self._bytes_by_user = bytes_by_user

    def reserve(self, uid: int, grow_bytes: int) -> None:
        """A file is about to grow (or, negative, to shrink). Raises StagingFull, with nothing counted."""
        if grow_bytes > 0:
            if self.staged_bytes + grow_bytes > self.max_bytes:
                raise StagingFull(f"staging is full: ingest.staging_max_bytes is {self.max_bytes}")
            if self._max_bytes_per_user and self._of(uid) + grow_bytes > self._max_bytes_per_user:
                raise StagingFull(f"uid {uid} staged all of ingest.max_bytes_per_user {self._max_bytes_per_user}")
        self.take(uid, grow_bytes)

    def take(self, uid: int, size_bytes: int) -> None:
        """Count bytes, whatever the bounds; negative ones are given back."""
        self.staged_bytes += size_bytes
        rest = self._of(uid) + size_bytes
        if rest > 0:
            self._bytes_by_user[uid] = rest
        else:
            self._bytes_by_user.pop(uid, None)

    def _of(self, uid: int) -> int:
        return self._bytes_by_user.get(uid, 0)
