"""The disk cache: what it keeps, what it never gives, and how much it holds. With real files and real file systems."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from castore.blobs.cache_files import SEGMENT_BYTES, CacheFiles, CacheWriter
from castore.blobs.cache_room import EVICT_TO, FULL_AT, CacheRoom
from castore.blobs.disk_cache import LINGER_BYTES, QUEUE_BYTES, TINY_BATCH, DiskCache
from castore.blobs.reader import BlobReader
from castore.catalog.records import Blob
from castore.catalog.tiny import TinyBlobs
from castore.digest import SHA256_BLOCKS, XXH3, BlobSummary, Digest
from castore.errors import CastoreError, StateError, StorageUnavailable
from tests.blobs.blob_world import BLOCK, MIB, World, read_all, until

LARGE = 1 << 40
"""A bound that is never reached."""


def cache_at(folder: Path, max_bytes: int = LARGE, same_disk: frozenset[str] = frozenset()) -> DiskCache:
    files = CacheFiles(folder)
    files.prepare()
    return DiskCache(files, max_bytes, same_disk=same_disk)


@asynccontextmanager
async def reading(world: World, cache: DiskCache) -> AsyncIterator[BlobReader]:
    """A reader that remembers nothing but what the disk cache holds, as after a restart of the daemon."""
    reader = BlobReader(world.catalog, world.backends, memory_bytes=0, on_bad_location=world.report, cache=cache)
    async with trio.open_nursery() as nursery:
        await nursery.start(reader.run)
        yield reader
        nursery.cancel_scope.cancel()


async def read(world: World, cache: DiskCache, blob: Blob, offset: int = 0, length: int = LARGE) -> bytes:
    """Read in a daemon's life of its own: what it fetched is in the cache when this returns."""
    async with reading(world, cache) as reader:
        return bytes(await reader.open(blob).read(offset, length))


def files_of(cache: DiskCache) -> list[Path]:
    return sorted(Path(file.path) for file in CacheFiles(Path(cache.state().dir)).walk() if file.path)


def change(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def end_backends(world: World) -> None:
    for backend in world.backends.values():
        backend.error = StorageUnavailable("the server is down")


@pytest.mark.parametrize("checksums", [XXH3, SHA256_BLOCKS])
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7, SEGMENT_BYTES, SEGMENT_BYTES + 1])
async def test_what_was_read_once_is_read_while_every_backend_is_down(
    world: World, tmp_path: Path, checksums: str, size: int
) -> None:
    data = os.urandom(size)
    blob = await world.add(data, checksums=checksums)
    assert await read(world, cache_at(tmp_path / "cache"), blob) == data
    end_backends(world)
    cache = cache_at(tmp_path / "cache")
    assert await read(world, cache, blob) == data
    assert cache.stats.disk_hits == -(-size // BLOCK)
    assert (cache.stats.disk_misses, cache.stats.gets) == (0, 0)


async def test_a_long_blob_is_read_in_requests_of_the_kernel(world: World, tmp_path: Path, large: bytes) -> None:
    blob = await world.add(large)
    cache = cache_at(tmp_path / "cache")
    async with reading(world, cache) as reader:
        assert await read_all(reader.open(blob), request=MIB) == large
        await until(lambda: cache.queued_bytes == 0)
    assert cache.stats.disk_written_bytes == len(large)
    assert len(files_of(cache)) == len(large) // SEGMENT_BYTES
    end_backends(world)
    async with reading(world, cache) as reader:
        assert await read_all(reader.open(blob), request=MIB) == large


async def test_only_what_is_missing_is_fetched(world: World, tmp_path: Path) -> None:
    data = os.urandom(40 * BLOCK + 100)
    blob = await world.add(data)
    for index in (0, 7, 8, 40):
        assert await read(world, cache_at(tmp_path / "cache"), blob, index * BLOCK, 1) == data[index * BLOCK :][:1]
    seen = world["first"].gets
    seen.clear()
    cache = cache_at(tmp_path / "cache")
    assert await read(world, cache, blob) == data
    assert [(get.offset // BLOCK, get.length // BLOCK) for get in seen] == [(1, 6), (9, 31)]
    assert (cache.stats.disk_hits, cache.stats.disk_misses) == (4, 37)


async def test_many_gaps_are_fetched_at_once(world: World, tmp_path: Path) -> None:
    data = os.urandom(20 * BLOCK)
    blob = await world.add(data)
    for index in range(0, 20, 2):
        await read(world, cache_at(tmp_path / "cache"), blob, index * BLOCK, 1)
    seen = world["first"].gets
    seen.clear()
    assert await read(world, cache_at(tmp_path / "cache"), blob) == data
    assert [(get.offset // BLOCK, get.length // BLOCK) for get in seen] == [(1, 19)]
    end_backends(world)
    assert await read(world, cache_at(tmp_path / "cache"), blob) == data


async def test_a_sparse_file_takes_what_its_blocks_take(world: World, tmp_path: Path) -> None:
    blob = await world.add(os.urandom(60 * BLOCK))
    cache = cache_at(tmp_path / "cache")
    await read(world, cache, blob, 50 * BLOCK, 1)
    (file,) = files_of(cache)
    assert file.stat().st_size == 51 * BLOCK
    assert file.stat().st_blocks * 512 < 2 * BLOCK


async def test_zeros_that_are_right_are_found_in_a_file(world: World, tmp_path: Path) -> None:
    data = bytes(3 * BLOCK)
    blob = await world.add(data)
    assert await read(world, cache_at(tmp_path / "cache"), blob) == data
    end_backends(world)
    assert await read(world, cache_at(tmp_path / "cache"), blob) == data


@pytest.mark.parametrize("checksums", [XXH3, SHA256_BLOCKS])
@pytest.mark.parametrize("where", [0, BLOCK + 1, 5 * BLOCK + 6])
async def test_an_altered_byte_is_noticed_and_mended(
    world: World, tmp_path: Path, checksums: str, where: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = os.urandom(5 * BLOCK + 7)
    blob = await world.add(data, checksums=checksums)
    await read(world, cache_at(tmp_path / "cache"), blob)
    world["first"].gets.clear()
    cache = cache_at(tmp_path / "cache")
    (file,) = files_of(cache)
    change(file, where)
    assert await read(world, cache, blob) == data
    assert cache.stats.disk_bad == 1
    assert [get.offset // BLOCK for get in world["first"].gets] == [where // BLOCK]
    assert file.read_bytes() == data
    assert "1 blocks of sha256:" in caplog.text
    assert world.reports == []
    end_backends(world)
    assert await read(world, cache_at(tmp_path / "cache"), blob) == data


async def test_damage_without_a_backend_is_an_error_and_no_wrong_byte(world: World, tmp_path: Path) -> None:
    blob = await world.add(os.urandom(2 * BLOCK))
    cache = cache_at(tmp_path / "cache")
    await read(world, cache, blob)
    change(files_of(cache)[0], BLOCK)
    end_backends(world)
    async with reading(world, cache_at(tmp_path / "cache")) as reader:
        with pytest.raises(StorageUnavailable):
            await reader.open(blob).read(0, 2 * BLOCK)
        assert len(await reader.open(blob).read(0, BLOCK)) == BLOCK


@pytest.mark.parametrize("length", [0, 1, BLOCK, 3 * BLOCK - 1])
async def test_a_truncated_file_has_what_is_left_of_it(world: World, tmp_path: Path, length: int) -> None:
    data = os.urandom(3 * BLOCK)
    blob = await world.add(data)
    await read(world, cache_at(tmp_path / "cache"), blob)
    cache = cache_at(tmp_path / "cache")
    (file,) = files_of(cache)
    os.truncate(file, length)
    assert await read(world, cache, blob) == data
    assert (cache.stats.disk_hits, cache.stats.disk_bad) == (length // BLOCK, 0)
    assert file.read_bytes() == data


@pytest.mark.parametrize(
    "what", ["file", "folder", "everything", "a link instead", "a folder instead", "a pipe instead"]
)
async def test_whatever_happens_to_a_file_reads_go_on(world: World, tmp_path: Path, what: str) -> None:
    data = os.urandom(3 * BLOCK)
    blob = await world.add(data)
    folder = tmp_path / "cache"
    cache = cache_at(folder)
    async with reading(world, cache) as reader:
        await reader.open(blob).read(0, LARGE)
        await until(lambda: cache.queued_bytes == 0 and len(files_of(cache)) == 1)
        (file,) = files_of(cache)
        subprocess.run(["rm", "-r", {"folder": file.parent, "everything": folder}.get(what, file)], check=True)
        if what == "a link instead":
            file.symlink_to("/etc/passwd")
        elif what == "a folder instead":
            file.mkdir()
        elif what == "a pipe instead":
            os.mkfifo(file)
        for _ in range(2):
            assert await reader.open(blob).read(0, LARGE) == data
    if "instead" not in what:
        assert file.read_bytes() == data
        assert folder.stat().st_mode & 0o777 == 0o700 or what != "everything"


async def test_files_are_private(world: World, tmp_path: Path) -> None:
    blob = await world.add(b"secret")
    cache = cache_at(tmp_path / "deep/cache")
    await read(world, cache, blob)
    (file,) = files_of(cache)
    assert file.stat().st_mode & 0o777 == 0o600
    folder = file.parent
    while folder != tmp_path / "deep/cache":
        assert folder.stat().st_mode & 0o077 == 0, folder
        folder = folder.parent


async def test_blocks_of_another_size_are_no_danger(tmp_path: Path) -> None:
    """Two stores that share a folder, with blocks of different sizes for the same bytes."""
    data = os.urandom(9 * MIB + 5)
    for number, size in enumerate((BLOCK, 4096, 3000, 16 * MIB, BLOCK)):
        (tmp_path / f"{number}").mkdir()
        world = await World(tmp_path / f"{number}", "first").create()
        try:
            blob = await world.add(data, block_size=size)
            cache = cache_at(tmp_path / "cache")
            assert await read(world, cache, blob) == data
            assert cache.stats.disk_bad == 0
        finally:
            world.close()


async def test_what_is_on_the_same_disk_is_not_copied(world: World, tmp_path: Path) -> None:
    blob = await world.add(os.urandom(BLOCK), "first")
    other = await world.add(os.urandom(BLOCK), "second")
    cache = cache_at(tmp_path / "cache", same_disk=frozenset({"first"}))
    await read(world, cache, blob)
    assert files_of(cache) == []
    await read(world, cache, other)
    assert len(files_of(cache)) == 1


async def test_a_full_queue_drops_and_never_waits(world: World, tmp_path: Path) -> None:
    blob = await world.add(os.urandom(BLOCK))
    cache = cache_at(tmp_path / "cache")
    data = memoryview(bytes(BLOCK))
    for _ in range(QUEUE_BYTES // BLOCK + 10):
        cache.keep(blob.summary, 0, data)
    assert cache.queued_bytes == QUEUE_BYTES
    assert cache.stats.disk_dropped == 10


# what waits for more


class NotingTiny(TinyBlobs):
    """Notes how many blobs each transaction has."""

    batches: list[int]

    def put(self, blobs: Iterable[tuple[Digest, bytes]]) -> None:
        batch = list(blobs)
        self.batches.append(len(batch))
        super().put(batch)


async def test_small_blobs_wait_for_others_and_share_a_transaction(world: World, tmp_path: Path) -> None:
    tiny = NotingTiny(tmp_path / "tiny.db", LARGE)
    tiny.batches = []
    files = CacheFiles(tmp_path / "cache")
    files.prepare()
    cache = DiskCache(files, LARGE, tiny=tiny, tiny_bytes=8192)
    blobs = [await world.add(os.urandom(16)) for _ in range(TINY_BATCH + 8)]
    async with reading(world, cache) as reader:
        for blob in blobs[:8]:
            await reader.open(blob).read(0, 16)
            await trio.sleep(0.001)  # as long as a request takes
        await until(lambda: cache.queued_bytes == 0)
        assert len(tiny.batches) <= 2, tiny.batches
        for blob in blobs[8:]:
            await reader.open(blob).read(0, 16)
    assert sum(tiny.batches) == len(blobs)
    assert max(tiny.batches) <= TINY_BATCH
    assert len(tiny.batches) <= 6, tiny.batches
    cache.close()


async def test_what_is_much_does_not_wait(world: World, tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    """The clock stands still: nothing is written because it has waited long enough."""
    blob = await world.add(os.urandom(LINGER_BYTES))
    cache = cache_at(tmp_path / "cache")
    async with reading(world, cache) as reader:
        await reader.open(blob).read(0, LINGER_BYTES)
        deadline = time.monotonic() + 20
        while cache.queued_bytes:
            assert time.monotonic() < deadline, "it waits"
            await trio.lowlevel.checkpoint()
    assert cache.stats.disk_written_bytes == LINGER_BYTES


# small blobs


def with_tiny(folder: Path, max_bytes: int = LARGE) -> DiskCache:
    files = CacheFiles(folder / "cache")
    files.prepare()
    return DiskCache(files, LARGE, tiny=TinyBlobs(folder / "tiny.db", max_bytes), tiny_bytes=8192)


async def read_tiny(world: World, folder: Path, blobs: list[Blob]) -> tuple[list[bytes], DiskCache]:
    cache = with_tiny(folder)
    async with reading(world, cache) as reader:
        read = [bytes(await reader.open(blob).read(0, LARGE)) for blob in blobs]
    cache.close()
    return read, cache


@pytest.mark.parametrize("checksums", [XXH3, SHA256_BLOCKS])
@pytest.mark.parametrize("block_size", [BLOCK, 4096, 1000])
async def test_small_blobs_need_neither_backend_nor_file(
    world: World, tmp_path: Path, checksums: str, block_size: int
) -> None:
    data = [os.urandom(size) for size in (1, 4096, 8191, 8192)]
    blobs = [await world.add(each, checksums=checksums, block_size=block_size) for each in data]
    assert (await read_tiny(world, tmp_path, blobs))[0] == data
    end_backends(world)
    read, cache = await read_tiny(world, tmp_path, blobs)
    assert read == data
    assert files_of(cache) == []
    assert (cache.stats.gets, cache.stats.disk_misses) == (0, 0)


async def test_a_larger_blob_is_in_a_file(world: World, tmp_path: Path) -> None:
    blob = await world.add(os.urandom(8193))
    _, cache = await read_tiny(world, tmp_path, [blob])
    assert len(files_of(cache)) == 1


@pytest.mark.parametrize("damaged", [b"", b"short", bytes(5000)])
async def test_a_small_blob_that_is_damaged_is_mended(
    world: World, tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    data = os.urandom(5000)
    blob = await world.add(data)
    tiny = TinyBlobs(tmp_path / "tiny.db", LARGE)
    tiny.put([(blob.summary.digest, damaged)])
    read, cache = await read_tiny(world, tmp_path, [blob])
    assert read == [data]
    assert cache.stats.disk_bad == 1
    assert tiny.get(blob.summary.digest) == data
    assert "is damaged, and fetched again" in caplog.text
    tiny.close()


async def test_a_damaged_database_of_small_blobs_is_made_anew(world: World, tmp_path: Path) -> None:
    data = os.urandom(5000)
    blob = await world.add(data)
    (tmp_path / "tiny.db").write_bytes(b"no database" * 1000)
    for _ in range(2):
        read, cache = await read_tiny(world, tmp_path, [blob])
        assert read == [data]
    assert cache.stats.gets == 0


async def test_a_database_that_breaks_while_it_is_used_fails_no_read(world: World, tmp_path: Path) -> None:
    data = [os.urandom(5000) for _ in range(50)]
    blobs = [await world.add(each) for each in data]
    await read_tiny(world, tmp_path, blobs)
    cache = with_tiny(tmp_path)
    with (tmp_path / "tiny.db").open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(300_000))
    async with reading(world, cache) as reader:
        for blob, each in zip(blobs, data, strict=True):
            assert await reader.open(blob).read(0, LARGE) == each
    cache.close()


def test_the_oldest_small_blobs_make_room(tmp_path: Path) -> None:
    tiny = TinyBlobs(tmp_path / "tiny.db", 4 * MIB)
    blobs = [(Digest.of(data), data) for data in (os.urandom(4000) for _ in range(3000))]
    for start in range(0, len(blobs), 100):
        tiny.put(blobs[start : start + 100])
        assert tiny.used_bytes() <= 4 * MIB
    assert tiny.get(blobs[-1][0]) == blobs[-1][1]
    assert tiny.get(blobs[0][0]) is None
    assert sum(tiny.get(digest) is not None for digest, _ in blobs) > 400
    assert (tmp_path / "tiny.db").stat().st_size < 6 * MIB
    tiny.close()


def test_two_processes_put_small_blobs(tmp_path: Path) -> None:
    one, other = TinyBlobs(tmp_path / "tiny.db", LARGE), TinyBlobs(tmp_path / "tiny.db", LARGE)
    one.put([(Digest.of(b"one"), b"one")])
    other.put([(Digest.of(b"other"), b"other"), (Digest.of(b"one"), b"one")])
    assert (one.get(Digest.of(b"other")), other.get(Digest.of(b"one"))) == (b"other", b"one")
    one.close()
    other.close()


# how much it holds


def disk_bytes(folder: Path) -> int:
    """As du says it, of what the cache made."""
    total = 0
    for path, folders, files in os.walk(folder / "blocks"):
        for name in [*folders, *files]:
            total += os.lstat(os.path.join(path, name)).st_blocks * 512
    return total


def summary_of(number: int, size: int) -> BlobSummary:
    from castore.digest import BlobHasher

    hasher = BlobHasher()
    hasher.update(number.to_bytes(8, "big") + bytes(size - 8))
    return hasher.finish()


def fill(files: CacheFiles, numbers: range, size: int, room: CacheRoom | None = None) -> list[Path]:
    """Blobs of `size` bytes written as they come, each used a minute after the one before."""
    paths: list[Path] = []
    writer = CacheWriter(files)
    for number in numbers:
        data = memoryview(number.to_bytes(8, "big") + os.urandom(size - 8))
        summary = summary_of(number, size)
        if room is not None and not room.make(size):
            continue
        writer.write(summary, 0, data)
        writer.close()
        path = Path(files.blocks) / "sha256" / summary.digest.hex[:2] / f"{summary.digest.hex}.0"
        if path.exists():
            os.utime(path, (number * 60, number * 60))
        paths.append(path)
    return paths


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    files = CacheFiles(tmp_path)
    files.prepare()
    paths = fill(files, range(1, 101), 64 * 1024)
    os.utime(paths[0], (10**9, 10**9))  # used since
    room = CacheRoom(files, LARGE)
    room.count()
    before = room.used_bytes
    room.evict(before - 10 * 64 * 1024)
    assert [path.exists() for path in paths] == [True] + [False] * 10 + [True] * 89
    assert room.used_bytes == disk_bytes(tmp_path)
    assert room.evicted == 10


async def test_use_is_noted(world: World, tmp_path: Path) -> None:
    blob = await world.add(os.urandom(BLOCK))
    cache = cache_at(tmp_path / "cache")
    await read(world, cache, blob)
    (file,) = files_of(cache)
    os.utime(file, (1000, 1000))
    await read(world, cache, blob)
    assert file.stat().st_mtime > 10**9


def test_the_bound_holds_at_every_moment(tmp_path: Path) -> None:
    bound = 8 * MIB
    files = CacheFiles(tmp_path)
    files.prepare()
    room = CacheRoom(files, bound)
    most = 0
    for number in range(1, 400):
        fill(files, range(number, number + 1), 96 * 1024, room)
        most = max(most, disk_bytes(tmp_path))
    assert most <= bound
    assert most > bound * EVICT_TO * 0.8


def test_the_bound_counts_what_other_processes_write(tmp_path: Path) -> None:
    bound = 16 * MIB
    files = CacheFiles(tmp_path)
    files.prepare()
    rooms = [CacheRoom(files, bound) for _ in range(3)]
    most = 0
    for number in range(1, 1200):
        fill(files, range(number, number + 1), 64 * 1024, rooms[number % 3])
        most = max(most, disk_bytes(tmp_path))
    assert bound * EVICT_TO * 0.8 < most <= bound


def test_a_smaller_bound_is_reached_at_once(tmp_path: Path) -> None:
    files = CacheFiles(tmp_path)
    files.prepare()
    fill(files, range(1, 101), 64 * 1024)
    room = CacheRoom(files, 2 * MIB)
    assert room.make(4096)
    assert disk_bytes(tmp_path) < 2 * MIB * FULL_AT


def test_one_process_evicts_at_a_time(tmp_path: Path) -> None:
    files = CacheFiles(tmp_path)
    files.prepare()
    fill(files, range(1, 101), 64 * 1024)
    other = files.open_lock()
    fcntl.flock(other, fcntl.LOCK_EX)
    room = CacheRoom(files, 2 * MIB)
    assert not room.make(4096)
    os.close(other)
    assert room.make(4096)


def test_what_is_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    files = CacheFiles(tmp_path)
    files.prepare()
    fill(files, range(1, 5), 64 * 1024)
    assert not CacheRoom(files, MIB).make(2 * MIB)


def test_what_others_put_there_stays_and_does_not_count(tmp_path: Path) -> None:
    files = CacheFiles(tmp_path)
    files.prepare()
    paths = fill(files, range(1, 5), 64 * 1024)
    theirs = [tmp_path / "notes", paths[0].parent / "notes", paths[0].parent / f"{'0' * 64}.0.swp"]
    for path in theirs:
        path.write_bytes(bytes(MIB))
    room = CacheRoom(files, LARGE)
    room.count()
    assert room.used_bytes < MIB
    removed, freed = files.clear()
    assert (removed, freed) == (4, 4 * 64 * 1024)
    assert all(path.exists() for path in theirs)
    assert not any(path.exists() for path in paths)
    assert files.clear() == (0, 0)


# disks that fail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB and 200 files."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,nr_inodes=200", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def free_bytes(path: Path) -> int:
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


async def test_a_cache_leaves_its_disk_some_room(world: World, small_disk: Path, large: bytes) -> None:
    blob = await world.add(large)
    cache = cache_at(small_disk / "cache")
    async with reading(world, cache) as reader:
        assert await read_all(reader.open(blob), request=MIB) == large
        await until(lambda: cache.queued_bytes == 0)
    assert free_bytes(small_disk) >= 32 * MIB * 0.05
    assert cache.state().used_bytes > 16 * MIB
    assert cache.state().problem == ""


async def test_a_cache_makes_way_for_other_files_of_its_disk(world: World, small_disk: Path) -> None:
    blobs = [await world.add(os.urandom(4 * MIB)) for _ in range(4)]
    cache = cache_at(small_disk / "cache")
    for blob in blobs[:3]:
        await read(world, cache, blob)
    (small_disk / "theirs").write_bytes(bytes(19 * MIB))
    cache = cache_at(small_disk / "cache")
    await read(world, cache, blobs[3])
    assert free_bytes(small_disk) >= 32 * MIB * 0.05
    assert len(files_of(cache)) < 4


async def test_a_disk_on_which_no_file_can_be_made(world: World, small_disk: Path) -> None:
    data = os.urandom(BLOCK)
    blob = await world.add(data)
    cache = cache_at(small_disk / "cache")
    async with reading(world, cache) as reader:
        for number in range(200):
            try:
                (small_disk / f"theirs-{number}").touch()
            except OSError:
                break
        for _ in range(3):
            assert await reader.open(blob).read(0, LARGE) == data
        await until(lambda: cache.stats.disk_dropped > 0)
        assert await reader.open(blob).read(0, LARGE) == data
    with pytest.raises(StateError, match="No space left on device"):
        cache_at(small_disk / "another")


async def test_a_disk_that_turns_read_only(world: World, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, more = os.urandom(BLOCK), os.urandom(BLOCK)
    blob, other = await world.add(data), await world.add(more)
    cache = cache_at(small_disk / "cache")
    await read(world, cache, blob)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    async with reading(world, cache) as reader:
        for _ in range(3):
            assert await reader.open(other).read(0, LARGE) == more
        await until(lambda: "cannot be written" in cache.state().problem)
        assert await reader.open(other).read(0, LARGE) == more
        end_backends(world)
        assert await reader.open(blob).read(0, LARGE) == data
        with pytest.raises(CastoreError):
            await reader.open(other).read(0, LARGE)
    assert caplog.text.count("is not filled for a while") == 1


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"cache\.dir = '.*/file/cache': cannot be used \(Not a directory\)"):
        CacheFiles(tmp_path / "file/cache").prepare()


def test_a_folder_of_another_user_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    os.chown(tmp_path / "blocks", 12345, 12345)
    with pytest.raises(StateError, match="belongs to uid 12345"):
        CacheFiles(tmp_path).prepare()
