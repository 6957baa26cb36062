"""Blocks of blobs in files of a folder that several processes share: read, written, listed. Bounds and trusts nothing.

`FOLDER/blocks/ALGORITHM/ab/HEX.START` holds the bytes of a blob from byte START on, SEGMENT_BYTES of them at most, with
holes where blocks are absent. No index: a block is there when its checksum says so. All who write a byte of such a file
write the same one, so nobody locks, nothing is synced, and what a crash tore is merely absent.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from castore.digest import BlobSummary, block_checksum
from castore.errors import StateError

SEGMENT_BYTES: Final = 8 * 1024 * 1024
"""Of a blob in one file: what one get brings at most, and what is evicted at a time. 1 TiB is 131,072 files."""

USE_NOTED_S: Final = 60.0
"""A file's time of last use is written at most once in so many seconds: order by the minute is enough to evict by."""

UNIT_BYTES: Final = 512
"""Of `st_blocks`, whatever the file system's own unit is (stat(2))."""

DIRECT_BYTES: Final = 1024 * 1024
"""Pieces from here on may go past the page cache: for smaller ones, waiting for the disk costs more than the copy."""
_SECTOR: Final = 4096
"""Offsets and lengths of these are multiples of it: of the largest sectors that disks have (open(2), "O_DIRECT")."""

_FOLDER: Final = "blocks"
_NAME: Final = re.compile(r"[0-9a-f]{64}\.[0-9]{1,19}")
_ALGORITHM: Final = re.compile("[a-z0-9-]+")
_BYTE: Final = re.compile("[0-9a-f]{2}")
_ZEROS: Final = bytes(1 << 17)
_PRIVATE_FILE: Final = 0o600
_PRIVATE_FOLDER: Final = 0o700

_TAG: Final = b"Signature: 8a477f597d28d172789f06886806bc55\n# Made by castore: what lies here can be fetched again.\n"
"""CACHEDIR.TAG (bford.info/cachedir): backup programs leave such a folder out."""

Runs = list[tuple[int, int]]
"""Blocks, as (first, end) with `end` exclusive, ascending, with a gap between neighbours."""


@dataclass(slots=True)
class Found:
    """What a read found: the blocks that are missing, how many of these were there with wrong bytes, a disk's error."""

    missing: Runs = field(default_factory=list)
    bad: int = 0
    error: OSError | None = None

    def lacks(self, first: int, end: int) -> None:
        """Add blocks to the missing ones; called in ascending order."""
        if first >= end:
            return
        if self.missing and self.missing[-1][1] == first:
            first = self.missing.pop()[0]
        self.missing.append((first, end))

    def add(self, later: Found) -> None:
        """Join what was found in later blocks."""
        for first, end in later.missing:
            self.lacks(first, end)
        self.bad += later.bad
        self.error = self.error or later.error


@dataclass(frozen=True, slots=True)
class CachedFile:
    """One file of the folder: its path, what it takes on the disk, and when it was last used."""

    path: str
    disk_bytes: int
    used_ns: int


class CacheFiles:
    """All files of one folder. Every method but `__init__` touches the disk: for threads, any number at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blocks = f"{folder}/{_FOLDER}"

    def prepare(self) -> None:
        """Make the folder where it is absent, and try whether it can be written. Raises StateError with the reason."""
        try:
            os.makedirs(self.blocks, _PRIVATE_FOLDER, exist_ok=True)
            owner = os.lstat(self.blocks)
            if not stat.S_ISDIR(owner.st_mode) or owner.st_uid != os.geteuid():
                raise StateError(
                    f"cache.dir = {str(self.folder)!r}: {self.blocks} belongs to uid {owner.st_uid}, not to uid "
                    f"{os.geteuid()}: give each user a folder of its own"
                )
            os.chmod(self.blocks, _PRIVATE_FOLDER)
            with suppress(FileExistsError):
                tag = os.open(f"{self.folder}/CACHEDIR.TAG", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                with open(tag, "wb") as file:
                    file.write(_TAG)
            os.close(self.open_lock())
        except OSError as exc:
            raise StateError(
                f"cache.dir = {str(self.folder)!r}: cannot be used ({exc.strerror}); "
                "make it a folder that castore may write, or set cache.max_bytes = 0"
            ) from exc

    def open_lock(self) -> int:
        """A descriptor of the file that whoever evicts locks. Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(f"{self.folder}/lock", flags, _PRIVATE_FILE)

    def tells_what_waits(self) -> bool:
        """Whether the file system can read without waiting, as those of local disks can; others may hang anywhere."""
        try:
            with open(f"{self.folder}/CACHEDIR.TAG", "rb") as file:
                file.read()
                return os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except OSError:
            return False

    # blocks

    def read(self, summary: BlobSummary, first: int, target: memoryview, *, nowait: bool = False) -> Found:
        """Fill `target`, which begins at block `first` and ends where a block does, with what is there and right.

        What is absent, too short, or no file is missing; so is what a failing disk does not give, with its `error`.
        With `nowait`, bytes come from memory, or BlockingIOError is raised.
        """
        flags = os.RWF_NOWAIT if nowait else 0
        found = Found()
        size = summary.block_size_bytes
        for name, index, end, offset in _segments(summary, first, len(target)):
            place = target[(index - first) * size : (end - first) * size]
            try:
                descriptor = os.open(f"{self.blocks}/{name}", _READ_FLAGS)
                try:
                    here = _read_file(descriptor, summary, index, end, offset, place, flags)
                finally:
                    os.close(descriptor)
            except FileNotFoundError:
                here = Found([(index, end)])
            except BlockingIOError:
                raise
            except OSError as exc:
                here = Found([(index, end)], error=exc)
            found.add(here)
        return found

    @staticmethod
    def fits(summary: BlobSummary) -> bool:
        """Whether all of a blob is in one file."""
        return 0 < summary.size_bytes <= segment_bytes(summary.block_size_bytes)

    def adopt(self, summary: BlobSummary, source: Path) -> None:
        """Take over a file that holds all of a blob that `fits`; it must lie on the same file system. Raises OSError.

        It costs as much as removing the file, so it is done on the loop.
        """
        target = f"{self.blocks}/{_name(summary, 0)}"
        try:
            os.rename(source, target)
        except FileNotFoundError:
            for folder in reversed(Path(target).parents[:2]):
                os.makedirs(folder, _PRIVATE_FOLDER, exist_ok=True)
            os.rename(source, target)
        os.utime(target)

    # all of them

    def walk(self) -> Iterator[CachedFile]:
        """Every file that the cache made, and every folder as a file that cannot be evicted (`used_ns` 0, path "").

        What vanishes meanwhile is left out. Raises OSError for a disk that fails.
        """
        for folder in self._folders():
            with suppress(FileNotFoundError), os.scandir(folder) as entries:
                yield CachedFile("", os.stat(folder).st_blocks * UNIT_BYTES, 0)
                for entry in entries:
                    if _NAME.fullmatch(entry.name):
                        with suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            yield CachedFile(entry.path, status.st_blocks * UNIT_BYTES, status.st_mtime_ns)

    def clear(self) -> tuple[int, int]:
        """Remove every file that the cache made, and the folders that are empty then: (files, bytes).

        Raises OSError.
        """
        files, freed = 0, 0
        for file in self.walk():
            if file.path:
                with suppress(FileNotFoundError):
                    os.unlink(file.path)
                    files, freed = files + 1, freed + file.disk_bytes
        for folder in reversed([*self._folders()]):
            with suppress(OSError):  # not empty: somebody else's file, or one that was written meanwhile
                os.rmdir(folder)
        return files, freed

    def forget(self, summary: BlobSummary) -> None:
        """Remove what is cached of one blob. What cannot be removed is evicted in its time."""
        for start in range(0, summary.size_bytes, segment_bytes(summary.block_size_bytes)):
            with suppress(OSError):
                os.unlink(os.path.join(self.blocks, _name(summary, start)))

    def _folders(self) -> Iterator[str]:
        for algorithm in _names(self.blocks, _ALGORITHM):
            yield algorithm
            yield from _names(algorithm, _BYTE)


class CacheWriter:
    """Writes blocks, one caller at a time. Keeps the file that it wrote last open until another one's turn, or `close`.

    A busy loop takes milliseconds to let a thread go on after a system call: there is one for each piece of a file.
    """

    def __init__(self, files: CacheFiles) -> None:
        self._blocks = files.blocks
        self._name = ""
        self._descriptor = -1
        self._may_go_past = True
        """Whether the file system has let writes past its page cache, so far."""
        self.direct_bytes = 0
        """Written that way."""

    def write(self, summary: BlobSummary, first: int, data: memoryview, *, past_page_cache: bool = False) -> None:
        """Write whole blocks, which are right, from index `first` on. Raises OSError; what was written then stays.

        With `past_page_cache`, large pieces go to the disk at once, where file system and buffer allow it: for bytes
        that the kernel keeps for the mount already.
        """
        size = summary.block_size_bytes
        for name, index, end, offset in _segments(summary, first, len(data)):
            if name != self._name:
                self.close()
                self._descriptor = self._open(f"{self._blocks}/{name}")
                self._name = name
            piece = data[(index - first) * size : (end - first) * size]
            is_direct = past_page_cache and self._may_go_past and len(piece) >= DIRECT_BYTES and not offset % _SECTOR
            done = self._write_direct(piece, offset) if is_direct else 0
            _write_all(self._descriptor, piece[done:], offset + done)
            if is_direct and not done:
                self._may_go_past = False  # a file system without it, or a buffer at an odd place

    def _write_direct(self, data: memoryview, offset: int) -> int:
        """How many bytes went to the disk; the others are for the page cache, which says why they cannot be written."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        done = 0
        with suppress(OSError):
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            done = os.pwrite(self._descriptor, data[: len(data) - len(data) % _SECTOR], offset)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)
        self.direct_bytes += done
        return done

    def close(self) -> None:
        """Close the last file. Idempotent."""
        if self._name:
            self._name = ""
            os.close(self._descriptor)

    def _open(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(path, flags, _PRIVATE_FILE)
        except FileNotFoundError:
            _make_folder(os.path.dirname(path))
            return os.open(path, flags, _PRIVATE_FILE)


def _make_folder(path: str) -> None:
    """Most often nothing but the last of its folders is absent."""
    try:
        os.mkdir(path, _PRIVATE_FOLDER)
    except FileExistsError:
        return
    except FileNotFoundError:
        # One by one: makedirs gives the folders in between the process's default mode.
        for folder in reversed([Path(path), *Path(path).parents[:3]]):
            os.makedirs(folder, _PRIVATE_FOLDER, exist_ok=True)


_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def segment_bytes(block_size: int) -> int:
    """How many bytes of a blob one file holds: whole blocks, one at least."""
    return block_size * max(1, SEGMENT_BYTES // block_size)


def _name(summary: BlobSummary, start: int) -> str:
    digest = summary.digest.hex
    return f"{summary.digest.algorithm}/{digest[:2]}/{digest}.{start}"


def _segments(summary: BlobSummary, first: int, length: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, first block, end, offset in the file) of each file that holds some of `length` bytes from a block on."""
    size = summary.block_size_bytes
    per_file = segment_bytes(size) // size
    index, end = first, first - (-length // size)
    while index < end:
        segment = index // per_file
        stop = min(end, (segment + 1) * per_file)
        yield _name(summary, segment * per_file * size), index, stop, (index - segment * per_file) * size
        index = stop


def _data(descriptor: int, status: os.stat_result, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of `start` to `stop` (exclusive) that are no holes: reading holes, and hashing them, takes time."""
    stop = min(stop, status.st_size)
    if status.st_blocks * UNIT_BYTES >= status.st_size:
        if start < stop:
            yield start, stop
        return
    while start < stop:
        try:
            data = os.lseek(descriptor, start, os.SEEK_DATA)
            hole = min(stop, os.lseek(descriptor, data, os.SEEK_HOLE))
        except OSError:  # nothing but a hole up to the end
            return
        if data >= stop:
            return
        yield data, hole
        start = hole


def _read_file(
    descriptor: int, summary: BlobSummary, first: int, end: int, offset: int, place: memoryview, flags: int
) -> Found:
    """Fill `place` with the blocks `first` to `end` (exclusive) of a segment, the first at `offset`. Raises OSError."""
    status = os.fstat(descriptor)
    found = Found()
    if not stat.S_ISREG(status.st_mode):
        found.lacks(first, end)
        return found
    size = summary.block_size_bytes
    index = first
    is_used = False
    for start, stop in _data(descriptor, status, offset, offset + len(place)):
        # All blocks that have some data here, and have not been looked at.
        low = max(index, first + (start - offset) // size)
        high = max(low, min(end, first - (offset - stop) // size))
        wanted = place[(low - first) * size : (high - first) * size]
        read = _read_into(descriptor, wanted, offset + (low - first) * size, flags)
        if read < len(wanted):
            high = low + read // size
        found.lacks(index, low)
        for number in range(low, high):
            block = place[(number - first) * size : (number - first + 1) * size]
            if _is_right(descriptor, summary, number, block, offset + (number - first) * size, found):
                is_used = True
            else:
                found.lacks(number, number + 1)
        index = high
    found.lacks(index, end)
    if is_used and time.time() - status.st_mtime > USE_NOTED_S:
        with suppress(OSError):  # a read-only disk: everything is as old as it was
            os.utime(descriptor)
    return found


def _is_right(descriptor: int, summary: BlobSummary, index: int, block: memoryview, offset: int, found: Found) -> bool:
    expected = summary.checksum(index)
    if block_checksum(block, summary.checksum_algorithm) == expected:
        return True
    # Another process may be writing it just now: the second look finds all of it.
    if _read_into(descriptor, block, offset, 0) == len(block):
        if block_checksum(block, summary.checksum_algorithm) == expected:
            return True
        # A file system may fill with zeros what was lost in a power cut: absent, not altered.
        found.bad += bytes(block) != (_ZEROS[: len(block)] if len(block) <= len(_ZEROS) else bytes(len(block)))
    return False


def _read_into(descriptor: int, target: memoryview, offset: int, flags: int) -> int:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done, flags)
        if count == 0:
            break
        done += count
    return done


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _names(folder: str, pattern: re.Pattern[str]) -> list[str]:
    """The paths of the folders in a folder whose names match."""
    try:
        with os.scandir(folder) as entries:
            return [
                entry.path for entry in entries if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except FileNotFoundError:
        return []
