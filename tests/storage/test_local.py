"""What `LocalBackend` promises beyond the contract of all backends: its folder, rights, space, leftovers."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from castore.digest import MANIFEST_ALGORITHM, Digest
from castore.errors import (
    ObjectMissing,
    ObjectTruncated,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageTimeout,
    StorageUnavailable,
)
from castore.storage.backends.durable import ROOT_MARK
from castore.storage.backends.local import LOW_FREE_BYTES, LocalBackend
from castore.storage.conformance_sources import BlockingSource
from castore.storage.deadline import DeadlineBackend
from castore.storage.layout import key_of
from castore.storage.retry import RetryingBackend
from castore.storage.source import BytesSource
from castore.storage.wrapping import Operation, Wrapping
from castore.verify.reading import ObjectReader, Reading

T = TypeVar("T")
DATA = bytes(range(256)) * 40
DIGEST = Digest.of(DATA)
OTHER_DATA = b"other bytes"
OTHER = Digest.of(OTHER_DATA)
LARGE = bytes(range(251)) * 5000
LARGE_DIGEST = Digest.of(LARGE)
ABSENT = Digest.of(b"absent")

CALLS: dict[str, Callable[[LocalBackend], Awaitable[object]]] = {
    "put": lambda backend: backend.put(OTHER, BytesSource(OTHER_DATA)),
    "get": lambda backend: backend.get(DIGEST, offset=0, length=10),
    "get nothing": lambda backend: backend.get(DIGEST, offset=0, length=0),
    "head": lambda backend: backend.head(DIGEST),
    "delete": lambda backend: backend.delete(DIGEST),
    "list": lambda backend: listed(backend),
    "sweep": lambda backend: backend.sweep(),
}


async def listed(backend: LocalBackend) -> list[Digest]:
    async with backend.list("sha256") as objects:
        return [info.digest async for info in objects]


def leftovers(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.name.startswith(".")]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - an abandoned thread tells nobody
            await trio.sleep(0.005)


class HangingDisk(LocalBackend):
    """Reads of one object wait in their thread, as on a disk that hangs, until they may go on."""

    def __init__(self, backend_id: str, path: Path, *, read_threads: int = 16) -> None:
        super().__init__(backend_id, path, read_threads=read_threads)
        self.hanging: Digest | None = None
        self.go_on, self.went_on = threading.Event(), threading.Event()

    def _read(self, digest: Digest, buffer: memoryview, offset: int) -> bool:
        if digest != self.hanging:
            return super()._read(digest, buffer, offset)
        self.go_on.wait()
        try:
            return super()._read(digest, buffer, offset)
        finally:
            self.went_on.set()


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "castore-test", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
async def backend(tmp_path: Path) -> LocalBackend:
    backend = LocalBackend("local", tmp_path / "objects")
    await backend.create()
    return backend


async def test_create_makes_a_private_folder_and_may_be_repeated(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "objects"
    backend = LocalBackend("local", path)
    assert not path.exists()
    for _ in range(2):
        await backend.create()
        assert [file.name for file in path.iterdir()] == [ROOT_MARK]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path, path.parent, path.parent.parent)} == {0o700}
    assert "castore" in (path / ROOT_MARK).read_text()


async def test_create_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageUnavailable, match=r"backend local: create .*file"):
        await LocalBackend("local", tmp_path / "file").create()


async def test_objects_are_private_files_under_their_key(backend: LocalBackend) -> None:
    await backend.put(DIGEST, BytesSource(DATA))
    stored = backend.path / key_of(DIGEST)
    assert stored.read_bytes() == DATA
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert {stat.S_IMODE(stored.parents[level].stat().st_mode) for level in range(4)} == {0o700}
    assert leftovers(backend.path) == []
    assert (await backend.head(DIGEST)).modified_ns == stored.stat().st_mtime_ns


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("state", ["is not there", f"has no {ROOT_MARK}"])
async def test_a_disk_that_is_not_mounted_is_no_empty_disk(tmp_path: Path, name: str, state: str) -> None:
    path = tmp_path / "objects"
    if state != "is not there":
        path.mkdir()
    backend = LocalBackend("local", path)
    with pytest.raises(StorageUnavailable, match=f"objects {state}: mount it or run `castore init`"):
        await CALLS[name](backend)
    health = await backend.health()
    assert health.status == "fail"
    assert state in health.detail
    assert list(tmp_path.rglob("*")) == ([] if state == "is not there" else [path])


@pytest.mark.parametrize("name", CALLS)
async def test_a_disk_that_goes_away_under_way(tmp_path: Path, name: str) -> None:
    path = tmp_path / "objects"
    backend = LocalBackend("local", path)
    with tmpfs(path, "size=2m"):
        await backend.create()
        await backend.put(DIGEST, BytesSource(DATA))
        await backend.put(OTHER, BytesSource(OTHER_DATA))
        assert await backend.get(DIGEST, offset=0, length=10) == DATA[:10]
    with pytest.raises(StorageUnavailable):
        await CALLS[name](backend)
    assert list(path.iterdir()) == []


async def test_folders_that_an_operator_removed_are_made_again(backend: LocalBackend) -> None:
    leaf = (backend.path / key_of(DIGEST)).parent
    for removed in (leaf, leaf.parent, leaf.parent.parent):
        await backend.put(DIGEST, BytesSource(DATA))
        subprocess.run(["rm", "-r", removed], check=True)
        with pytest.raises(ObjectMissing):
            await backend.get(DIGEST, offset=0, length=1)
    await backend.put(DIGEST, BytesSource(DATA))
    assert await backend.get(DIGEST, offset=0, length=len(DATA)) == DATA


@pytest.mark.parametrize("length", [10, 5000])
async def test_what_another_process_does_to_an_object_is_seen_at_once(backend: LocalBackend, length: int) -> None:
    stored = backend.path / key_of(DIGEST)
    await backend.put(DIGEST, BytesSource(DATA))
    for _ in range(3):
        assert await backend.get(DIGEST, offset=0, length=length) == DATA[:length]

    replacement = backend.path / "replacement"
    replacement.write_bytes(DATA[::-1])
    replacement.rename(stored)
    for _ in range(3):
        assert await backend.get(DIGEST, offset=0, length=length) == DATA[::-1][:length]

    os.truncate(stored, length - 1)
    for _ in range(3):
        with pytest.raises(ObjectTruncated, match=rf"{DIGEST} ends before byte {length}"):
            await backend.get(DIGEST, offset=0, length=length)

    stored.unlink()
    for _ in range(3):
        with pytest.raises(ObjectMissing, match=f"backend local: no object {DIGEST}"):
            await backend.get(DIGEST, offset=0, length=length)


async def test_strangers_are_not_listed(backend: LocalBackend) -> None:
    await backend.put(DIGEST, BytesSource(DATA))
    leaf = (backend.path / key_of(DIGEST)).parent
    (leaf / ".castore-put-0123456789abcdef").write_bytes(b"left")
    (leaf / DIGEST.hex[:-1]).write_bytes(b"too short")
    (leaf / OTHER.hex).write_bytes(b"in the wrong folder")
    (leaf / f"{DIGEST.hex}.bak").write_bytes(b"copy")
    flipped = DIGEST.hex[:-1] + ("0" if DIGEST.hex[-1] != "0" else "1")
    (leaf / flipped).mkdir()
    (leaf.parent / "zz").mkdir()
    (leaf.parent / "00file").write_bytes(b"")
    (leaf.parent.parent / "notes.txt").write_bytes(b"")
    (backend.path / "lost+found").mkdir()
    assert await listed(backend) == [DIGEST]


async def test_sweep_removes_only_old_leftovers(backend: LocalBackend) -> None:
    await backend.put(DIGEST, BytesSource(DATA))
    manifest = Digest.of(DATA, MANIFEST_ALGORITHM)
    await backend.put(manifest, BytesSource(DATA))
    strangers = []
    for digest in (DIGEST, manifest):
        leaf = (backend.path / key_of(digest)).parent
        old, new, other = leaf / f".castore-put-{0:016x}", leaf / f".castore-put-{1:016x}", leaf / ".somebody-elses"
        for file in (old, new, other):
            file.write_bytes(b"left")
        os.utime(old, (0, 0))
        os.utime(other, (0, 0))
        strangers += [new, other]
    assert await backend.sweep() == 2
    assert sorted(leftovers(backend.path)) == sorted(strangers)
    assert await backend.sweep() == 0
    assert await backend.sweep(grace_s=0) == 2
    assert await backend.get(DIGEST, offset=0, length=len(DATA)) == DATA
    assert await backend.get(manifest, offset=0, length=len(DATA)) == DATA


async def test_sweep_leaves_a_put_alone_that_is_under_way(backend: LocalBackend) -> None:
    source = BlockingSource(DATA, 4096)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.put, DIGEST, source)
        await trio.to_thread.run_sync(source.blocked.wait)
        assert await LocalBackend("another", backend.path).sweep(grace_s=0) == 0
        assert len(leftovers(backend.path)) == 1
        source.go_on.set()
    assert await backend.get(DIGEST, offset=0, length=len(DATA)) == DATA


async def test_a_cancelled_put_leaves_nothing_behind(backend: LocalBackend) -> None:
    source = BlockingSource(DATA, 4096)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.put, DIGEST, source)
        await trio.to_thread.run_sync(source.blocked.wait)
        nursery.cancel_scope.cancel()
    assert len(leftovers(backend.path)) == 1
    source.go_on.set()
    await until(lambda: not leftovers(backend.path))
    with pytest.raises(ObjectMissing):
        await backend.head(DIGEST)


async def test_a_cancelled_put_reads_no_further(backend: LocalBackend) -> None:
    data = bytes(20 << 20)
    source = BlockingSource(data, 1 << 20)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.put, Digest.of(data), source)
        await trio.to_thread.run_sync(source.blocked.wait)
        nursery.cancel_scope.cancel()
    source.go_on.set()
    await trio.to_thread.run_sync(source.all_closed.wait)
    assert source.given_bytes <= 2 << 20


async def test_a_cancelled_get_leaves_the_buffer_to_its_owner(tmp_path: Path) -> None:
    data = bytes(16 << 20)
    digest = Digest.of(data)
    writer = LocalBackend("local", tmp_path)
    await writer.create()
    await writer.put(digest, BytesSource(data))
    mine = b"\xee" * len(data)
    cancelled = 0
    for number in range(20):
        backend = LocalBackend("local", tmp_path, read_threads=1)
        buffer = bytearray(len(data))
        with trio.move_on_after(0.0002 * number) as scope:
            await backend.get(digest, offset=0, length=len(data), into=buffer)
        buffer[:] = mine
        await backend.head(digest)  # gets the only thread when the get is done with it
        assert buffer == mine
        cancelled += scope.cancelled_caught
    assert cancelled


async def test_cached_bytes_need_no_thread_where_the_file_system_can_tell(tmp_path: Path) -> None:
    backend = HangingDisk("local", tmp_path, read_threads=1)
    await backend.create()
    for digest, data in ((DIGEST, DATA), (OTHER, OTHER_DATA)):
        await backend.put(digest, BytesSource(data))
        await backend.get(digest, offset=0, length=len(data))
    with (tmp_path / key_of(DIGEST)).open("rb") as file:
        try:
            can_tell = os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except OSError:
            can_tell = False

    backend.hanging = ABSENT
    with trio.move_on_after(0.05):
        await backend.get(ABSENT, offset=0, length=1)  # keeps the only thread
    answered = False
    with trio.move_on_after(5 if can_tell else 0.05):
        answered = await backend.get(DIGEST, offset=0, length=len(DATA)) == DATA
    assert answered == can_tell
    backend.go_on.set()


async def test_a_large_cached_read_lets_other_tasks_run(backend: LocalBackend) -> None:
    data = bytes(32 << 20)
    digest = Digest.of(data)
    await backend.put(digest, BytesSource(data))
    await backend.get(digest, offset=0, length=len(data))
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await backend.get(digest, offset=0, length=len(data))
        nursery.cancel_scope.cancel()
    assert turns >= 16


async def test_puts_that_are_cancelled_at_any_moment_are_whole_or_absent(backend: LocalBackend) -> None:
    data = bytes(1 << 20)
    digest = Digest.of(data)
    absent = 0
    for number in range(40):
        with trio.move_on_after(number * 0.0001):
            await backend.put(digest, BytesSource(data))
        try:
            assert await backend.get(digest, offset=0, length=len(data)) == data
        except ObjectMissing:
            absent += 1
        await until(lambda: not leftovers(backend.path))
        await backend.delete(digest)
    assert absent


async def test_a_full_disk(tmp_path: Path) -> None:
    backend = LocalBackend("local", tmp_path / "objects")
    with tmpfs(backend.path, "size=2m"):
        await backend.create()
        await backend.put(OTHER, BytesSource(OTHER_DATA))
        data = bytes(3 << 20)
        with pytest.raises(StorageFull, match=f"backend local: put {Digest.of(data)}: No space left on device"):
            await backend.put(Digest.of(data), BytesSource(data))
        assert await listed(backend) == [OTHER]
        assert leftovers(backend.path) == []
        await backend.put(DIGEST, BytesSource(DATA))
        assert await backend.get(DIGEST, offset=0, length=len(DATA)) == DATA
        health = await backend.health()
        assert health.status == "warn"
        assert health.detail.endswith("has only 1 MiB left")


async def test_a_disk_without_room_for_another_file(tmp_path: Path) -> None:
    backend = LocalBackend("local", tmp_path / "objects")
    with tmpfs(backend.path, "size=4g,nr_inodes=20"):
        await backend.create()
        blobs = [bytes([number]) for number in range(20)]
        with pytest.raises(StorageFull):
            await put_all(backend, blobs)
        assert leftovers(backend.path) == []
        health = await backend.health()
        assert health.status == "warn"
        assert "more files" in health.detail


async def put_all(backend: LocalBackend, blobs: list[bytes]) -> None:
    for data in blobs:
        await backend.put(Digest.of(data), BytesSource(data))


async def test_a_read_only_disk(tmp_path: Path) -> None:
    backend = LocalBackend("local", tmp_path / "objects")
    with tmpfs(backend.path, "size=4g"):
        await backend.create()
        await backend.put(DIGEST, BytesSource(DATA))
        health = await backend.health()
        assert health.status == "pass"
        assert health.free_bytes is not None
        assert health.free_bytes > LOW_FREE_BYTES
        subprocess.run(["mount", "-o", "remount,ro", backend.path], check=True)
        assert (await backend.health()).status == "fail"
        with pytest.raises(StorageUnavailable, match=f"put {OTHER}: Read-only file system"):
            await backend.put(OTHER, BytesSource(OTHER_DATA))
        with pytest.raises(StorageUnavailable):
            await backend.delete(DIGEST)
        assert await backend.get(DIGEST, offset=0, length=len(DATA)) == DATA


@contextmanager
def as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", CALLS)
async def test_a_folder_that_may_not_be_used(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        backend = LocalBackend("local", Path(folder) / "objects")
        os.chmod(folder, 0o755)
        await backend.create()
        await backend.put(DIGEST, BytesSource(DATA))
        with as_nobody():
            with pytest.raises(StorageDenied, match="Permission denied"):
                await CALLS[name](backend)
            assert (await backend.health()).status == "fail"


async def test_a_folder_that_may_be_read_but_not_written() -> None:
    with tempfile.TemporaryDirectory() as folder:
        backend = LocalBackend("local", Path(folder) / "objects")
        os.chmod(folder, 0o755)
        await backend.create()
        os.chmod(backend.path, 0o755)
        with as_nobody():
            with pytest.raises(StorageDenied, match=f"backend local: put {DIGEST}: Permission denied"):
                await backend.put(DIGEST, BytesSource(DATA))
            with pytest.raises(StorageDenied):
                await LocalBackend("local", Path(folder) / "other").create()
            health = await backend.health()
        assert (health.status, health.detail) == ("fail", f"{backend.path} cannot be written")
        assert [file.name for file in backend.path.iterdir()] == [ROOT_MARK]


async def test_a_disk_that_hangs_costs_a_thread_and_no_caller(tmp_path: Path) -> None:
    backend = HangingDisk("local", tmp_path)
    await backend.create()
    await backend.put(DIGEST, BytesSource(DATA))
    backend.hanging = DIGEST
    buffer = bytearray(b"\xee" * len(DATA))
    with pytest.raises(StorageTimeout):
        await DeadlineBackend(backend, base_s=0.05).get(DIGEST, offset=0, length=len(DATA), into=buffer)
    await backend.put(OTHER, BytesSource(OTHER_DATA))
    assert await backend.get(OTHER, offset=0, length=len(OTHER_DATA)) == OTHER_DATA
    backend.go_on.set()
    await trio.to_thread.run_sync(backend.went_on.wait)
    assert buffer == b"\xee" * len(DATA)


class Given(bytearray):
    """A taker that keeps what it is given."""

    update = bytearray.extend


async def scanned(backend: Wrapping | LocalBackend, length: int, *, offset: int = 0) -> list[bytes]:
    """What the taker of each try was given."""
    tries: list[Given] = []

    def begin() -> Given:
        tries.append(Given())
        return tries[-1]

    assert await backend.scan(LARGE_DIGEST, offset=offset, length=length, begin=begin) is tries[-1]
    return [bytes(given) for given in tries]


async def test_a_scan_hands_over_what_a_get_gives(backend: LocalBackend) -> None:
    await backend.put(LARGE_DIGEST, BytesSource(LARGE))
    assert await scanned(backend, len(LARGE)) == [LARGE]
    assert await scanned(backend, 300_000, offset=5) == [LARGE[5:300_005]]
    with pytest.raises(ObjectTruncated):
        await scanned(backend, len(LARGE) + 1)
    await backend.delete(LARGE_DIGEST)
    with pytest.raises(ObjectMissing):
        await scanned(backend, 1)


class FailsOnce(Wrapping):
    """Its first call is done, and then said to have failed."""

    has_failed = False

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        answer = await call()
        if not self.has_failed:
            self.has_failed = True
            raise StorageUnavailable("once")
        return answer


async def test_a_scan_that_is_tried_again_begins_anew(backend: LocalBackend) -> None:
    await backend.put(LARGE_DIGEST, BytesSource(LARGE))
    assert await scanned(RetryingBackend(FailsOnce(backend)), len(LARGE)) == [LARGE, LARGE]
    reading = await ObjectReader(RetryingBackend(FailsOnce(backend))).judge(LARGE_DIGEST, len(LARGE))
    assert reading == Reading(None, LARGE_DIGEST, len(LARGE))


async def test_a_try_of_a_scan_that_comes_late_is_nobodys(backend: LocalBackend) -> None:
    """A disk hangs, the scan is tried again and done, and only then the first try begins."""
    await backend.put(LARGE_DIGEST, BytesSource(LARGE))
    go_on, tries = threading.Event(), iter([True])
    late: list[Given] = []

    def begin() -> Given:
        taker = Given()
        if next(tries, False):
            go_on.wait()
            late.append(taker)
        return taker

    patient = RetryingBackend(DeadlineBackend(backend, base_s=0.1, read_base_s=0.1))

    done = await patient.scan(LARGE_DIGEST, offset=0, length=len(LARGE), begin=begin)
    assert not late
    go_on.set()
    await until(lambda: bool(late))
    assert [bytes(done), bytes(late[0])] == [LARGE, b""]


class Waits(Given):
    """A taker that waits within its first piece."""

    def __init__(self, go_on: threading.Event) -> None:
        super().__init__()
        self.go_on, self.taken = go_on, 0

    def update(self, piece: memoryview) -> None:  # type: ignore[override]
        self.taken += 1
        self.go_on.wait()


async def test_a_cancelled_scan_reads_no_further(backend: LocalBackend) -> None:
    await backend.put(LARGE_DIGEST, BytesSource(LARGE))
    taker = Waits(threading.Event())

    async with trio.open_nursery() as nursery:

        async def scan() -> None:
            await backend.scan(LARGE_DIGEST, offset=0, length=len(LARGE), begin=lambda: taker)

        nursery.start_soon(scan)
        await until(lambda: bool(taker.taken))
        nursery.cancel_scope.cancel()
    taker.go_on.set()
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name == "castore local"])
    assert taker.taken == 1


async def check_it_holds_nothing(backend: LocalBackend) -> None:
    with pytest.raises(ObjectMissing):
        await backend.get(DIGEST, offset=0, length=1)
    with pytest.raises(ObjectMissing):
        await backend.head(DIGEST)
    async with backend.list("sha256") as objects:
        assert [item async for item in objects] == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
async def test_what_is_no_file_is_no_object(backend: LocalBackend, make: Callable[[Path], None]) -> None:
    """Opening a pipe would even wait for whoever writes to it."""
    await backend.put(DIGEST, BytesSource(DATA))
    stored = backend.path / key_of(DIGEST)
    stored.unlink()
    make(stored)
    with trio.fail_after(5):
        for _ in range(2):
            await check_it_holds_nothing(backend)


async def test_a_file_where_a_folder_was_holds_no_object(backend: LocalBackend) -> None:
    """Said to be unreachable, it would never be repaired, nor anybody told that it is gone."""
    await backend.put(DIGEST, BytesSource(DATA))
    folder = (backend.path / key_of(DIGEST)).parent
    shutil.rmtree(folder)
    folder.touch()
    await check_it_holds_nothing(backend)
    with pytest.raises(StorageUnavailable, match=re.escape(f"Not a directory ({folder})")):
        await backend.put(DIGEST, BytesSource(DATA))
    folder.unlink()
    folder.mkdir()
    (backend.path / key_of(DIGEST)).mkdir()
    with pytest.raises(StorageUnavailable, match=re.escape(f"Is a directory ({DIGEST.hex})")):
        await backend.put(DIGEST, BytesSource(DATA))


async def test_a_root_that_is_a_file_is_no_loss_of_objects(backend: LocalBackend) -> None:
    shutil.rmtree(backend.path)
    backend.path.touch()
    for call in (backend.head(DIGEST), backend.get(DIGEST, offset=0, length=1)):
        with pytest.raises(StorageUnavailable, match="is not a directory: mount it or run `castore init`"):
            await call


@pytest.mark.parametrize("name", CALLS)
async def test_all_that_leaves_is_a_storage_error(backend: LocalBackend, name: str) -> None:
    await backend.put(DIGEST, BytesSource(DATA))
    algorithm = backend.path / "sha256"
    algorithm.rename(backend.path / "moved")
    os.symlink("sha256", algorithm)  # a loop
    with pytest.raises(StorageError, match="Too many levels of symbolic links"):
        await CALLS[name](backend)
