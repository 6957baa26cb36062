"""The probe of a folder's file system: whether it keeps what the `local` backend counts on. Blocking, but for `probe`.

It works in a folder of its own beside the objects, and holds a lock on it (`flock`) for as long as it lives: a folder
that nobody locks was left by a probe that was killed, and the next one removes it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import secrets
import shutil
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio

from castore.mountinfo import read_mounts
from castore.storage.backends.durable import DurableTree
from castore.storage.backends.oserrors import storage_errors
from castore.storage.probing import Question, Reply, ask_all
from castore.storage.spi import ProbeReport

T = TypeVar("T")

LARGE_BYTES: Final = (4 << 30) + 1
"""Past the end of what file systems with 32-bit sizes can hold. Written as a hole: it takes no room."""
LISTED_FILES: Final = 1000
"""Files of the question about listings: more than one answer of the kernel's to a reader of a folder holds."""

CLEAN_S: Final = 10.0
"""Seconds to remove the folder again; a disk that takes longer hangs."""

_FOLDER: Final = re.compile(r"\.castore-probe-[0-9a-f]{16}")
_VOLATILE: Final = frozenset({"tmpfs", "ramfs", "rootfs"})
"""File systems that live in memory."""
_NUMBERS: Final = {
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x794C7630: "overlay",
    0x6969: "nfs",
}
"""What statfs(2) calls file systems, by their names in mountinfo; of these, ext4 stands for ext2 and ext3, too."""
_STATFS_BYTES: Final = 512
"""More than any `struct statfs` has."""
_RACERS: Final = 8


async def probe_local(backend_id: str, root: Path) -> ProbeReport:
    """Ask everything, and leave nothing. Raises StorageError when nothing can be written there."""

    async def in_thread(work: Callable[[], T]) -> T:
        with storage_errors(f"backend {backend_id}: probe"):
            # Abandoned when a disk hangs: what such a thread still makes is removed by the next probe.
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    made: list[_Place] = []
    handed_over = threading.Lock()

    def make() -> None:
        made.append(_Place(root))
        if not handed_over.acquire(blocking=False):  # nobody waits for it any more
            made[0].close()

    try:
        await in_thread(make)
        (place,) = made
        asked = [
            Question(name, text, expected, partial(in_thread, partial(work, place)), consequence)
            for name, text, expected, work, consequence in _QUESTIONS
        ]
        return ProbeReport(place.fs_type, await ask_all(asked))
    finally:
        if not handed_over.acquire(blocking=False):
            with trio.move_on_after(CLEAN_S, shield=True):
                await in_thread(made[0].close)


class _Place:
    """A folder that is locked and empty. Making one removes those that nobody locks."""

    def __init__(self, root: Path) -> None:
        self._tree = DurableTree(root)
        self._tree.require_root()
        for name in self._tree.names(""):
            if _FOLDER.fullmatch(name):
                _remove_unless_locked(root / name)
        self.path = root / f".castore-probe-{secrets.token_hex(8)}"
        self.path.mkdir(0o700)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # without locks on this file system, the next probe leaves it alone
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.fs_type = _fs_type(self.path)

    def file(self, name: str, data: bytes = b"", flags: int = 0) -> int:
        """A descriptor of a new file; the caller closes it."""
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
        os.write(fd, data)
        return fd

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def _fs_type(folder: Path) -> str:
    real = folder.resolve()
    above = [mount for mount in read_mounts() if real.is_relative_to(mount.mountpoint)]
    if not above:  # a chroot whose root is no mountpoint: what lies above it cannot be seen
        return _fs_type_by_number(folder)
    deepest = max(len(mount.mountpoint.parts) for mount in above)
    return [mount.fs_type for mount in above if len(mount.mountpoint.parts) == deepest][-1]  # the last is on top


def _fs_type_by_number(folder: Path) -> str:
    """By `f_type` of statfs(2), a long at the beginning of its answer, which os.statvfs leaves out."""
    answer = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(folder), answer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    number = struct.unpack_from("@l", answer)[0] & 0xFFFFFFFF
    return _NUMBERS.get(number, f"type {number:#x}")


def _remove_unless_locked(folder: Path) -> None:
    with suppress(OSError):  # somebody else removes it, or works in it
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(fd)


def _survives(place: _Place) -> Reply:
    return Reply("no" if place.fs_type in _VOLATILE else "yes", place.fs_type)


def _syncs(place: _Place) -> Reply:
    try:
        fd = place.file("synced", b"x")
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        fd = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        return Reply("not supported", str(exc.strerror))
    return Reply("yes", "file and folder")


def _renames(place: _Place) -> Reply:
    old, new = os.urandom(100_000), os.urandom(100_000)
    fd = place.file("object", old)
    try:
        os.close(place.file("temporary", new))
        os.rename(place.path / "temporary", place.path / "object")
        if os.pread(fd, len(old), 0) != old:
            return Reply("no", "whoever has the old file open reads other bytes")
    finally:
        os.close(fd)
    if (place.path / "object").read_bytes() != new or (place.path / "temporary").exists():
        return Reply("no", "the new file is not in its place")
    return Reply("yes", "old readers read on, new ones read the new file")


def _exclusive(place: _Place) -> Reply:
    made: list[bool] = []

    def make() -> None:
        try:
            os.close(place.file("exclusive", flags=os.O_EXCL))
            made.append(True)
        except FileExistsError:
            made.append(False)

    threads = [threading.Thread(target=make) for _ in range(_RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Reply("yes" if made.count(True) == 1 else "no", f"{made.count(True)} of {_RACERS} made it")


def _lists(place: _Place) -> Reply:
    folder = place.path / "listed"
    folder.mkdir(0o700)
    names = [f"{number:064x}" for number in range(LISTED_FILES)]
    for name in names:
        os.close(place.file(f"listed/{name}"))
    for name in names[::2]:
        os.unlink(folder / name)
    listed = sorted(os.listdir(folder))
    if listed != names[1::2]:
        return Reply("no", f"{len(listed)} names for {len(names[1::2])} files")
    return Reply("yes", "just what is there")


def _large(place: _Place) -> Reply:
    fd = place.file("large")
    try:
        os.pwrite(fd, b"x", LARGE_BYTES - 1)
        right = os.fstat(fd).st_size == LARGE_BYTES and os.pread(fd, 1, LARGE_BYTES - 1) == b"x"
    except OSError as exc:
        return Reply("no", str(exc.strerror))
    finally:
        os.close(fd)
    return Reply("yes" if right else "no", "its last byte is read" if right else "it is cut")


def _locks(place: _Place) -> Reply:
    first = place.file("locked")
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = place.file("locked")
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Reply("yes", "the second has to wait")
        finally:
            os.close(second)
    except OSError as exc:
        return Reply("not supported", str(exc.strerror))
    finally:
        os.close(first)
    return Reply("no", "two hold it")


def _private(place: _Place) -> Reply:
    os.close(place.file("private"))
    mode = (place.path / "private").stat().st_mode & 0o777
    return Reply("yes" if mode == 0o600 else "no", f"{mode:04o}")


def _tells_case(place: _Place) -> Reply:
    os.close(place.file("case"))
    same = (place.path / "CASE").exists()
    return Reply("no" if same else "yes", "one name" if same else "two names")


def _reads_at_once(place: _Place) -> Reply:
    fd = place.file("cached", b"x" * 4096)
    try:
        count = os.preadv(fd, [bytearray(4096)], 0, os.RWF_NOWAIT)
    except OSError as exc:
        return Reply("not supported", str(exc.strerror))
    finally:
        os.close(fd)
    return Reply("yes" if count == 4096 else "no", f"{count} of 4096 bytes")


_LOST: Final = "what is published does not survive power loss: put `path` on a file system of a disk, mounted to sync"

_QUESTIONS: Final[tuple[tuple[str, str, str, Callable[[_Place], Reply], str], ...]] = (
    (
        "durable",
        "the file system below",
        "not one in memory",
        _survives,
        "everything stored here is lost at the next start of the host: put `path` on a file system of a disk",
    ),
    ("sync", "fsync of a file and of its folder", "both succeed", _syncs, _LOST),
    (
        "rename",
        "a rename over an object that is being read",
        "each reader has one or the other, whole",
        _renames,
        "a put can show half an object: put `path` on another file system",
    ),
    (
        "exclusive",
        f"{_RACERS} tries to make the same file at a time",
        "one makes it",
        _exclusive,
        "two puts can write into one file: put `path` on another file system",
    ),
    (
        "list-after-write",
        f"a folder of {LISTED_FILES} new files, half of them removed",
        "lists what is there",
        _lists,
        "lists of what is stored are wrong: a rebuild would miss packages, and garbage collection objects",
    ),
    (
        "large",
        "a file of more than 4 GiB",
        "its last byte can be read",
        _large,
        "larger files cannot be published to this backend: put `path` on another file system",
    ),
    ("locks", "a second lock on a file that is locked", "has to wait", _locks, ""),
    ("private", "the mode of a file made for its owner alone", "0600", _private, ""),
    ("case", "names that differ in case", "two files", _tells_case, ""),
    ("read-at-once", "reading what is in memory without waiting", "can be asked for", _reads_at_once, ""),
)
"""Name, question, what is expected, who asks, and what follows where castore counts on it."""
