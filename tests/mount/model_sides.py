"""One side of the model: a tree that operations are done to, and what it shows. Neither compares with the other."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

NOW: Final = -1
"""Shown instead of a time that nobody set: the two sides differ in the moment, not in that it is one of this run."""
FIRST_NS: Final = 1_600_000_000 * 10**9
"""Times that are set lie before this one (2020), all others after."""

Tree = dict[str, "Item"]
"""Path below NAME (`.` for itself) -> what is there."""


@dataclass(frozen=True, slots=True)
class Item:
    """What one name shows. Of directories neither size nor links are compared; `links` are all names of one file."""

    mode: int
    uid: int
    gid: int
    nlink: int
    size_bytes: int
    mtime_ns: int
    target: str
    attributes: tuple[tuple[str, bytes], ...]
    links: tuple[str, ...] = ()
    content: bytes | None = None


def item_of(status: os.stat_result, path: str, *, read: bool) -> Item:
    is_directory, is_link = stat.S_ISDIR(status.st_mode), stat.S_ISLNK(status.st_mode)
    return Item(
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        nlink=0 if is_directory else status.st_nlink,
        size_bytes=0 if is_directory else status.st_size,
        mtime_ns=_time(status),
        target=os.readlink(path) if is_link else "",
        attributes=_attributes(path),
        content=Path(path).read_bytes() if read and stat.S_ISREG(status.st_mode) else None,
    )


def _time(status: os.stat_result) -> int:
    return status.st_mtime_ns if status.st_mtime_ns < FIRST_NS else NOW


def _attributes(path: str) -> tuple[tuple[str, bytes], ...]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)


def look(root: Path, *, read: bool, stat_of: Callable[[str], os.stat_result] = os.lstat) -> tuple[Tree, dict[str, int]]:
    """Everything at and below `root`, and the inode number of each path; with the bytes of files where `read`."""
    tree: Tree = {}
    inodes: dict[str, int] = {}
    names: dict[int, list[str]] = {}
    for path in walk(str(root)):
        below = os.path.relpath(path, root)
        status = stat_of(path)
        inodes[below] = status.st_ino
        names.setdefault(status.st_ino, []).append(below)
        tree[below] = item_of(status, path, read=read)
    for links in names.values():
        for below in links:
            tree[below] = replace(tree[below], links=tuple(sorted(links)))
    return tree, inodes


def walk(path: str) -> Iterator[str]:
    yield path
    with os.scandir(path) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk(entry.path)
        else:
            yield entry.path


def assert_alike(here: Tree, there: Tree, what: str) -> None:
    """Names each path of the mount that is not as on the disk."""
    differ = sorted(path for path in here.keys() | there.keys() if here.get(path) != there.get(path))
    assert not differ, "\n".join(
        [
            what,
            *(f"  {path}: mount {here.get(path)!s:.600}\n  {path}: disk  {there.get(path)!s:.600}" for path in differ),
        ]
    )


# one side


class Side:
    """One of the two directories, with the files that are open in it by slot. Methods return what a program sees."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, int] = {}

    def path(self, path: str) -> str:
        return f"{self.root}/{path}"

    # open files

    def open(self, slot: int, path: str, flags: int, mode: int) -> str:
        descriptor = os.open(self.path(path), flags, mode)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            return "a directory"
        self.files[slot] = descriptor
        return "a file"

    def write(self, slot: int, offset: int, data: bytes) -> int:
        return os.pwrite(self.files[slot], data, offset)

    def append(self, slot: int, data: bytes) -> int:
        os.lseek(self.files[slot], 0, os.SEEK_END)
        return os.write(self.files[slot], data)

    def read(self, slot: int, offset: int, size: int) -> bytes:
        return os.pread(self.files[slot], size, offset)

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.files[slot], size)

    def fchmod(self, slot: int, mode: int) -> None:
        os.fchmod(self.files[slot], mode)

    def futimens(self, slot: int, time_ns: int) -> None:
        os.utime(self.files[slot], ns=(time_ns, time_ns))

    def fsetxattr(self, slot: int, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self.files[slot], name, value, flags)

    def fsync(self, slot: int) -> None:
        os.fsync(self.files[slot])

    def fstat(self, slot: int) -> tuple[int, ...]:
        status = os.fstat(self.files[slot])
        return status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_size, _time(status)

    def dup(self, slot: int) -> None:
        os.close(os.dup(self.files[slot]))

    def close(self, slot: int) -> None:
        os.close(self.files.pop(slot))

    # names

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.path(path), size)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.path(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.path(path))

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.path(path))

    def link(self, path: str, new: str) -> None:
        os.link(self.path(path), self.path(new), follow_symlinks=False)

    def mkfifo(self, path: str) -> None:
        os.mkfifo(self.path(path))

    def unlink(self, path: str) -> None:
        os.unlink(self.path(path))

    def rename(self, path: str, new: str) -> None:
        os.rename(self.path(path), self.path(new))

    def fsync_path(self, path: str) -> None:
        descriptor = os.open(self.path(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    # attributes

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.path(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self.path(path), uid, gid, follow_symlinks=False)

    def utimens(self, path: str, time_ns: int) -> None:
        os.utime(self.path(path), ns=(time_ns, time_ns), follow_symlinks=False)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self.path(path), name, value, flags, follow_symlinks=False)

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self.path(path), name, follow_symlinks=False)
