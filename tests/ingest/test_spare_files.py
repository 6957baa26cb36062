"""Files that are made ahead: how many there are, where they go, and what is left of an earlier daemon's."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from castore.ingest.spare_files import SPARES, SpareFiles
from tests.mount.store import WAIT_SECONDS, wait_until


@asynccontextmanager
async def running(spares: SpareFiles) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spares.run)
        yield
        nursery.cancel_scope.cancel()


async def until_there_are(folder: Path, count: int) -> None:
    def wait() -> None:
        wait_until(lambda: len(os.listdir(folder)) >= count, f"{count} files are made")

    await trio.to_thread.run_sync(wait)


async def take_when_there(spares: SpareFiles, place: str) -> None:
    """The thread that makes them comes back a moment after the last is made."""
    with trio.fail_after(WAIT_SECONDS):
        while True:
            if spares.take(place):
                return
            await trio.sleep(0.01)


async def test_they_are_made_when_they_are_wanted_and_no_more(tmp_path: Path) -> None:
    folder, target = tmp_path / "spare", tmp_path / "data"
    folder.mkdir()
    target.mkdir()
    (folder / "of an earlier daemon").write_bytes(b"bytes")
    spares = SpareFiles(folder)
    spares.clear()
    assert os.listdir(folder) == []
    async with running(spares):
        await trio.testing.wait_all_tasks_blocked()
        assert not spares.take(f"{target}/early"), "nobody said that files would come"
        await until_there_are(folder, SPARES)
        await take_when_there(spares, f"{target}/first")
        for number in range(SPARES // 2 - 2):
            assert spares.take(f"{target}/{number}")
            spares.expect()
        await trio.testing.wait_all_tasks_blocked()
        assert len(os.listdir(folder)) == SPARES // 2 + 1, "more than half are left"
        assert spares.take(f"{target}/more")
        assert spares.take(f"{target}/and more")
        await until_there_are(folder, SPARES)
        assert len(os.listdir(folder)) == SPARES
    assert len(os.listdir(target)) == SPARES // 2 + 1
    assert {(item.stat().st_size, item.stat().st_mode & 0o777) for item in os.scandir(target)} == {(0, 0o600)}


async def test_without_a_folder_to_make_them_in_each_file_is_made_when_it_is_created(tmp_path: Path) -> None:
    spares = SpareFiles(tmp_path / "gone")
    async with running(spares):
        assert not spares.take(f"{tmp_path}/a")
        await trio.testing.wait_all_tasks_blocked()
        assert not spares.take(f"{tmp_path}/a")
    assert os.listdir(tmp_path) == []


async def test_one_that_cannot_be_moved_is_kept_for_later(tmp_path: Path) -> None:
    """The file is made in its place, and whoever makes it there is told what is wrong with that place, if anything."""
    folder, refused = tmp_path / "spare", tmp_path / "refused"
    folder.mkdir()
    refused.mkdir()  # for the disk that refuses
    spares = SpareFiles(folder)
    spares.expect()
    async with running(spares):
        await until_there_are(folder, SPARES)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            assert not spares.take(str(refused))
        assert len(os.listdir(folder)) == SPARES
    for number in range(SPARES):
        assert spares.take(f"{tmp_path}/{number}"), "each of them is of use"
    assert os.listdir(folder) == []


async def test_what_cannot_be_removed_stays_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "of an earlier daemon").write_bytes(b"bytes")
    spares = SpareFiles(tmp_path)
    spares.clear()
    assert os.listdir(tmp_path) == ["3"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/3: stays where files are made ahead; remove it yourself: Is a directory"
    ]
    async with running(spares):
        spares.expect()
        await take_when_there(spares, f"{tmp_path}/taken")  # those before it are made all the same
