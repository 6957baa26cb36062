"""The bounds on staged bytes: reached, refused with nothing counted, and free again."""

from __future__ import annotations

import pytest

from castore.errors import StagingFull
from castore.ingest.room import StagingRoom


def test_all_users_together() -> None:
    room = StagingRoom({1: 60}, max_bytes=100)
    room.reserve(2, 40)
    with pytest.raises(StagingFull, match="staging_max_bytes is 100"):
        room.reserve(3, 1)
    assert room.staged_bytes == 100
    room.take(1, -60)
    room.reserve(3, 60)
    assert room.staged_bytes == 100


def test_each_user() -> None:
    room = StagingRoom({}, max_bytes=1000, max_bytes_per_user=10)
    room.reserve(1, 10)
    room.reserve(2, 10)
    with pytest.raises(StagingFull, match="uid 1 staged all"):
        room.reserve(1, 1)
    room.reserve(1, -4)
    room.reserve(1, 4)
    assert room.staged_bytes == 20


def test_shrinking_is_never_refused() -> None:
    room = StagingRoom({1: 500}, max_bytes=100, max_bytes_per_user=10)
    room.reserve(1, -100)
    assert room.staged_bytes == 400
