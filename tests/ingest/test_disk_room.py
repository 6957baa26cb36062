"""The room on a small staging disk: copies that go on at one time leave the workspace's part of it alone together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from castore.errors import StagingFull
from castore.ingest.bulk import COPIES
from castore.ingest.bulk_source import Count, Item, Walk, copy_files
from castore.ingest.disk_room import DiskRoom, room_bytes
from tests.mount.small_disk import MB, SmallDisk, small_disk

RESERVE = 4 * MB
"""A sixteenth of the disk."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as made:
        yield made


async def test_copies_that_fit_one_by_one_and_not_together(disk: SmallDisk, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(COPIES):
        (source / f"{number}").write_bytes(b"x" * (16 * MB))
    disk.fill(but_bytes=RESERVE + 20 * MB)
    room, full = DiskRoom(disk.path), 0

    async def copy(item: Item) -> None:
        nonlocal full
        room.check(16 * MB)
        try:
            await trio.to_thread.run_sync(partial(copy_files, [item], [disk.path / item.name.decode()], Count(), room))
        except StagingFull:
            full += 1

    with Walk(os.fsencode(source)) as walk:
        async with trio.open_nursery() as nursery:
            for item in [step for step in walk.steps() if isinstance(step, Item)]:
                nursery.start_soon(copy, item)
    assert full >= COPIES - 1
    assert RESERVE <= disk.free_bytes() < RESERVE + 20 * MB


def test_what_is_being_written_is_taken(disk: SmallDisk) -> None:
    room = DiskRoom(disk.path)
    free = room_bytes(os.statvfs(disk.path))
    with room.taken(free - MB):
        assert room.left_bytes(os.statvfs(disk.path)) == MB
        with pytest.raises(StagingFull), room.taken(MB + 1):
            pass
        with room.taken(MB):
            assert room.left_bytes(os.statvfs(disk.path)) == 0
    assert room.left_bytes(os.statvfs(disk.path)) == free
