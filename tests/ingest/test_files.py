"""Staged files without a mount: digests while and after writing, handles, and the count of staged bytes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path

import pytest
import trio
import trio.testing

from castore.catalog.connection import create_workspace
from castore.catalog.records import Kind
from castore.catalog.workspace import Node, WorkspaceStore
from castore.digest import Digest
from castore.errors import NotOpen, ReadOnly, StagingFull, StateError
from castore.ingest.files import ROOM_SECONDS, StagedFiles
from castore.ingest.hashing import INLINE_BYTES, QUEUE_CHUNKS, HashQueue
from castore.ingest.staged_file import StagedFile

ROOM_BYTES = 1 << 62


class Staging:
    """The staged files of a workspace, and their names, one for each inode."""

    def __init__(self, folder: Path, *, max_bytes: int = ROOM_BYTES, max_bytes_per_user: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        create_workspace(folder / "workspace.db")
        (folder / "data").mkdir(exist_ok=True)
        self.store = WorkspaceStore(folder / "workspace.db")
        self.hashes = HashQueue()
        self.staged_count = 0
        self.lost: list[int] = []
        self.files = StagedFiles(
            self.store,
            folder / "data",
            hashes=self.hashes,
            max_bytes=max_bytes,
            max_bytes_per_user=max_bytes_per_user,
            on_staged=self._count,
            on_lost=self.lost.append,
        )

    def _count(self) -> None:
        self.staged_count += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The background work, for as long as the block."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.hashes.run)
            nursery.start_soon(self.files.run)
            yield
            nursery.cancel_scope.cancel()

    def create(self, inode: int, uid: int = 1, version: int = 9) -> StagedFile:
        """A new file, open for writing."""
        self.store.insert_node(
            Node(
                inode=inode, version_inode=version, kind=Kind.FILE, mode=0o644, uid=uid, gid=0, creator_uid=uid,
                mtime_ns=1, ctime_ns=1, size_bytes=0, nlink=1, target=b"", state="receiving",
            )
        )  # fmt: skip
        self.store.insert_link(inode, version, b"%d" % inode, inode)
        return self.files.create(self.node(inode))

    def node(self, inode: int) -> Node:
        """The node of a file."""
        node = self.store.node(inode)
        assert node is not None
        return node

    async def write(self, file: StagedFile, data: bytes, chunk_bytes: int = 1 << 20) -> None:
        """Front to back, as the kernel sends it."""
        for offset in range(0, len(data), chunk_bytes):
            await self.files.write(file, offset, data[offset : offset + chunk_bytes])

    async def close_file(self, file: StagedFile) -> None:
        """What the kernel sends for a close."""
        await self.files.flush(file)
        await self.files.release(file, writable=True)

    async def digest(self, inode: int) -> Digest:
        """The digest of a closed file, once it is known."""
        with trio.fail_after(30):
            while True:
                summary = self.store.summary(inode)
                if summary is not None:
                    return summary.digest
                await self.files.released.wait()


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    """Staging without bounds."""
    made = Staging(tmp_path)
    yield made
    made.files.close()
    made.store.close()


SIZES = (0, 1, INLINE_BYTES, INLINE_BYTES + 1, 3_000_000, (QUEUE_CHUNKS + 8) << 20)


@pytest.mark.parametrize("size", SIZES)
async def test_front_to_back(staging: Staging, size: int) -> None:
    data = os.urandom(size)
    async with staging.running():
        file = staging.create(100)
        await staging.write(file, data)
        await staging.close_file(file)
        assert await staging.digest(100) == Digest.of(data)
    assert staging.node(100).size_bytes == size
    assert staging.files.path(100).read_bytes() == data
    assert staging.files.open_file(100) is None
    assert (staging.staged_count, staging.files.staged_bytes) == (1, size)


async def test_small_files_are_hashed_at_once(staging: Staging) -> None:
    """No background work is needed: the digest is there when the close returns."""
    file = staging.create(100)
    await staging.files.write(file, 0, b"12")
    await staging.files.write(file, 2, b"345")
    await staging.close_file(file)
    summary = staging.store.summary(100)
    assert summary is not None
    assert summary.digest == Digest.of(b"12345")


async def test_a_write_that_is_cancelled_while_it_waits_to_be_hashed(staging: Staging) -> None:
    """By its deadline, in a host that stood still. Its bytes are on the disk: a digest without them would be wrong."""
    data = os.urandom(3 << 20)
    file = staging.create(100)
    await staging.files.write(file, 0, data[: 1 << 20])
    with trio.CancelScope(deadline=-inf) as scope:
        await staging.files.write(file, 1 << 20, data[1 << 20 : 2 << 20])
    assert scope.cancelled_caught
    await staging.files.write(file, 2 << 20, data[2 << 20 :])
    async with staging.running():
        await staging.close_file(file)
        assert await staging.digest(100) == Digest.of(data)
    assert staging.files.open_file(100) is None


async def test_a_close_that_is_cancelled(staging: Staging) -> None:
    data = os.urandom(3 << 20)
    file = staging.create(100)
    await staging.write(file, data)
    for step in (staging.files.flush(file), staging.files.release(file, writable=True)):
        with trio.CancelScope(deadline=-inf):
            await step
    async with staging.running():
        assert await staging.digest(100) == Digest.of(data)
        await trio.testing.wait_all_tasks_blocked()
    assert staging.files.open_file(100) is None


async def test_a_workspace_that_cannot_be_read_stops_nothing(
    staging: Staging, caplog: pytest.LogCaptureFixture
) -> None:
    file = staging.create(100)
    await staging.files.write(file, 0, bytes(1 << 20))
    staging.store.close()  # for the disk that fails
    with pytest.raises(StateError):
        await staging.files.release(file, writable=True)
    async with staging.running():
        with trio.fail_after(30):
            while staging.files.open_file(100) is not None:
                await trio.testing.wait_all_tasks_blocked()
        done: list[int] = []
        await staging.hashes.put(lambda: done.append(1), lambda: done.append(2))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert done == [1, 2]
    assert "whether staged file 64 is unlinked is looked at again at the next start: " in caplog.text
    caplog.clear()


async def test_bytes_that_cannot_be_removed_stop_nothing(staging: Staging, caplog: pytest.LogCaptureFixture) -> None:
    data = os.urandom(3 << 20)
    async with staging.running():
        file = staging.create(100)
        await staging.write(file, data)
        staging.store.delete_link(9, b"100")
        staging.store.update_node(100, nlink=0)
        staging.files.path(100).rename(staging.files.folder / "aside")
        staging.files.path(100).mkdir()  # for the disk that refuses
        await staging.close_file(file)
        other = staging.create(101)
        await staging.write(other, data)
        await staging.close_file(other)
        assert await staging.digest(101) == Digest.of(data)
        await trio.testing.wait_all_tasks_blocked()
    assert [record.getMessage() for record in caplog.records] == [
        f"staged bytes 64 stay until the next start: [Errno 21] Is a directory: '{staging.files.path(100)}'"
    ]
    assert (staging.store.node(100), staging.files.staged_bytes) == (None, len(data))
    caplog.clear()


@pytest.mark.parametrize("how", ["backwards", "overwritten", "cut", "extended", "written after its digest"])
async def test_any_other_order(staging: Staging, how: str) -> None:
    data = bytearray(os.urandom(300_000))
    async with staging.running():
        file = staging.create(100)
        if how == "backwards":
            await staging.files.write(file, 100_000, bytes(data[100_000:]))
            await staging.files.write(file, 0, bytes(data[:100_000]))
        else:
            await staging.write(file, bytes(data), 100_000)
        if how == "written after its digest":
            await staging.files.flush(file)
            await staging.digest(100)
        if how in ("overwritten", "written after its digest"):
            data[5:10] = b"hello"
            await staging.files.write(file, 5, b"hello")
        elif how == "cut":
            del data[150_000:]
            staging.files.truncate(file, 150_000)
        elif how == "extended":
            data += bytes(50_000)
            staging.files.truncate(file, 350_000)
        await staging.close_file(file)
        assert await staging.digest(100) == Digest.of(data)
    assert staging.node(100).size_bytes == staging.files.staged_bytes == len(data)


async def test_a_change_makes_the_digest_unknown(staging: Staging) -> None:
    """From the moment on that the bytes differ, not from the next close."""
    async with staging.running():
        file = staging.create(100)
        await staging.write(file, b"first")
        await staging.close_file(file)
        await staging.digest(100)
        file = staging.files.open(staging.node(100), writable=True)
        assert staging.node(100).state == "staged"
        await staging.files.write(file, 0, b"F")
        assert staging.store.summary(100) is None
        assert staging.node(100).state == "receiving"
        await staging.close_file(file)
        assert await staging.digest(100) == Digest.of(b"First")


async def test_a_file_cut_to_nothing_is_hashed_as_it_is_written_again(staging: Staging) -> None:
    """As O_TRUNC does: no background work reads it once more."""
    file = staging.create(100)
    await staging.files.write(file, 0, b"first")
    await staging.close_file(file)
    file = staging.files.open(staging.node(100), writable=True)
    for word in (b"second", b"third"):
        staging.files.truncate(file, 0)
        await staging.files.write(file, 0, word[:3])
        await staging.files.write(file, 3, word[3:])
        await staging.files.flush(file)
        summary = staging.store.summary(100)
        assert summary is not None
        assert summary.digest == Digest.of(word)
    await staging.files.release(file, writable=True)


async def test_a_file_cut_to_nothing_while_it_is_hashed(staging: Staging) -> None:
    """What was queued before is not in the digest of what comes after."""
    data = os.urandom(INLINE_BYTES * 2)
    file = staging.create(100)
    await staging.files.write(file, 0, data)
    assert file.pending
    staging.files.truncate(file, 0)
    await staging.files.write(file, 0, data[::-1])
    async with staging.running():
        await staging.close_file(file)
        assert await staging.digest(100) == Digest.of(data[::-1])


async def test_the_first_change_of_a_staged_file_is_told_and_no_other(staging: Staging) -> None:
    """To the uploader, which ends the put of what is not wanted any more."""
    file = staging.create(100)
    await staging.files.write(file, 0, b"first")
    await staging.close_file(file)
    assert staging.lost == []
    file = staging.files.open(staging.node(100), writable=True)
    assert staging.lost == [], "opened, and not changed"
    await staging.files.write(file, 0, b"F")
    assert staging.lost == [100]
    await staging.files.write(file, 1, b"I")
    assert staging.lost == [100]
    await staging.close_file(file)
    async with staging.running():
        await staging.digest(100)
    file = staging.files.open(staging.node(100), writable=True)
    staging.files.truncate(file, 2)
    assert staging.lost == [100, 100]


async def test_two_writers(staging: Staging) -> None:
    """The last one to close makes the digest."""
    async with staging.running():
        one = staging.create(100)
        two = staging.files.open(staging.node(100), writable=True)
        await staging.files.write(one, 0, b"aaaa")
        await staging.files.write(two, 2, b"bb")
        await staging.close_file(one)
        await staging.files.write(two, 0, b"c")
        await staging.close_file(two)
        assert await staging.digest(100) == Digest.of(b"cabb")


async def test_what_handles_cannot_do(staging: Staging) -> None:
    file = staging.create(100)
    await staging.files.write(file, 0, b"bytes")
    await staging.close_file(file)
    reading = staging.files.open(staging.node(100), writable=False)
    assert staging.files.read(reading, 1, 100) == b"ytes"
    with pytest.raises(NotOpen):
        await staging.files.write(reading, 0, b"x")
    staging.files.publish([(staging.node(100), None)])
    assert not staging.files.path(100).exists()
    assert staging.files.read(reading, 0, 2) == b"by"
    with pytest.raises(ReadOnly):
        staging.files.truncate(reading, 0)
    await staging.files.release(reading, writable=False)
    assert (staging.files.staged_bytes, staging.files.open_file(100)) == (0, None)


async def test_unlinked_while_open(staging: Staging) -> None:
    file = staging.create(100)
    await staging.files.write(file, 0, b"bytes")
    staging.store.delete_link(9, b"100")
    staging.store.update_node(100, nlink=0)
    assert staging.files.read(file, 0, 10) == b"bytes"
    await staging.close_file(file)
    assert not staging.files.path(100).exists()
    assert staging.store.node(100) is None
    assert staging.files.staged_bytes == 0


async def test_bounds(tmp_path: Path) -> None:
    """Refused with nothing written and nothing counted; what goes makes room again, also for others."""
    staging = Staging(tmp_path, max_bytes=100, max_bytes_per_user=60)
    one, two = staging.create(100, uid=1), staging.create(200, uid=2)
    await staging.files.write(one, 0, bytes(60))
    for file, offset, data in ((one, 60, b"x"), (two, 0, bytes(41))):
        with pytest.raises(StagingFull):
            await staging.files.write(file, offset, data)
    with pytest.raises(StagingFull):
        staging.files.truncate(two, 41)
    assert (staging.files.staged_bytes, staging.files.path(200).stat().st_size) == (60, 0)
    await staging.files.write(one, 10, bytes(50))
    assert staging.files.staged_bytes == 60, "what is written over is counted once"
    staging.files.truncate(one, 30)
    await staging.files.write(two, 0, bytes(60))
    assert staging.files.staged_bytes == 90
    staging.files.change_owner(200, 2, 1, 60)
    with pytest.raises(StagingFull):
        await staging.files.write(one, 30, b"x")
    await staging.close_file(two)
    staging.files.remove(200, 1, 60)
    await staging.files.write(one, 30, bytes(30))
    assert staging.files.staged_bytes == 60
    staging.files.close()
    staging.store.close()
    again = Staging(tmp_path, max_bytes=100)
    assert again.files.staged_bytes == 60 + 60, "the row of the removed file is the test's: it is counted as it stands"
    again.store.close()


async def test_a_digest_on_its_way_is_not_that_of_bytes_written_since(staging: Staging) -> None:
    """Closed, and written to by another handle before the hashing came to its end."""
    async with staging.running():
        file = staging.create(100)
        data = os.urandom(INLINE_BYTES * 2)
        await staging.files.write(file, 0, data)
        await staging.files.flush(file)
        assert file.pending, "the digest of what was there is on its way"
        await staging.files.write(file, 0, b"x")
        await staging.close_file(file)
        assert await staging.digest(100) == Digest.of(b"x" + data[1:])
    assert staging.staged_count == 1


async def test_how_long_a_write_waits_for_room(staging: Staging, autojump_clock: trio.testing.MockClock) -> None:
    """ROOM_SECONDS while another version is being published; not at all for its own, which may wait for the writer."""
    files = staging.files
    files.room.max_bytes = 10
    file = staging.create(100)
    await files.write(file, 0, bytes(10))
    for version, seconds in ((9, 0.0), (8, ROOM_SECONDS)):
        began = trio.current_time()
        with files.room.leaving(version), pytest.raises(StagingFull):
            await files.write(file, 10, b"x")
        assert trio.current_time() - began == pytest.approx(seconds)
    assert (files.staged_bytes, file.size_bytes) == (10, 10)


async def test_at_ones_own_bound_only_ones_own_bytes_are_waited_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """The publish of another user gives back nothing that helps, also when all staged bytes are at their bound."""
    for max_bytes in (ROOM_BYTES, 20):
        staging = Staging(tmp_path / str(max_bytes), max_bytes=max_bytes, max_bytes_per_user=10)
        files = staging.files
        staging.create(100, version=7, uid=1)
        others = staging.create(101, version=8, uid=2)
        mine = staging.create(102, version=9, uid=1)
        await files.write(others, 0, bytes(10))
        await files.write(mine, 0, bytes(10))
        await files.flush(mine)
        for version, seconds in ((8, 0.0), (7, 0.0), (9, ROOM_SECONDS)):
            file = files.open_file(100)
            assert file is not None
            began = trio.current_time()
            with files.room.leaving(version), pytest.raises(StagingFull, match="uid 1 staged all"):
                await files.write(file, 0, b"x")
            assert trio.current_time() - began == pytest.approx(seconds), (max_bytes, version)
        files.close()
        staging.store.close()


async def test_what_the_disk_refuses_is_not_counted(staging: Staging) -> None:
    file = staging.create(100)
    await staging.files.write(file, 0, b"bytes")
    with pytest.raises(OSError, match=r"File too large|Invalid argument"):
        staging.files.truncate(file, 1 << 61)
    with pytest.raises(OSError, match=r"File too large|Invalid argument"):
        await staging.files.write(file, 1 << 61, b"x")
    assert staging.files.staged_bytes == 5
    await staging.close_file(file)
    assert staging.node(100).size_bytes == 5


async def test_recovery_takes_size_and_time_from_the_disk(staging: Staging) -> None:
    file = staging.create(100)
    await staging.files.write(file, 0, b"12345")
    staging.files.close()
    os.utime(staging.files.path(100), ns=(7, 7))
    staging.store.update_node(100, size_bytes=2)
    again = StagedFiles(staging.store, staging.files.folder, hashes=staging.hashes, max_bytes=ROOM_BYTES)
    assert again.staged_bytes == 2
    again.measure(staging.node(100))
    assert (staging.node(100).size_bytes, staging.node(100).mtime_ns, again.staged_bytes) == (5, 7, 5)


async def test_a_file_that_cannot_be_read_is_failed(staging: Staging) -> None:
    file = staging.create(100)
    await staging.files.write(file, 3, b"not front to back")
    await staging.close_file(file)
    staging.files.path(100).unlink()
    async with staging.running():
        with trio.fail_after(30):
            while staging.node(100).state != "failed":
                await staging.files.released.wait()
    assert "No such file" in staging.store.error(100)


async def test_a_whole_file_being_hashed_holds_up_no_writer(staging: Staging) -> None:
    """As large as the disk lets it seem: its digest would take minutes."""
    async with staging.running():
        huge = staging.create(100)
        staging.files.truncate(huge, 200 << 30)
        await staging.close_file(huge)
        data = os.urandom(QUEUE_CHUNKS << 21)
        file = staging.create(200)
        with trio.fail_after(30):
            await staging.write(file, data)
            await staging.close_file(file)
            assert await staging.digest(200) == Digest.of(data)
        assert staging.store.summary(100) is None
    # And the end of the block did not wait for it either.


async def test_the_queue_is_in_order_and_bounded() -> None:
    queue = HashQueue()
    done: list[int] = []
    for number in range(QUEUE_CHUNKS):
        await queue.put(lambda: None, lambda number=number: done.append(number))  # type: ignore[misc]
    with trio.move_on_after(0.01) as waiting:
        await queue.put(lambda: None, lambda: None)
    assert waiting.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.run)
        last = trio.Event()
        await queue.put(lambda: None, last.set)
        with trio.fail_after(30):
            await last.wait()
        nursery.cancel_scope.cancel()
    assert done == list(range(QUEUE_CHUNKS))
