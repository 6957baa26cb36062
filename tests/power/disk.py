"""A disk for tests that forgets, when its power is cut, what was not synced. A FUSE file system in memory, no real one.

python -m tests.power.disk MNT IMAGE [--deaf PATTERN] [--seed N]
    serves what is in the file IMAGE, if there is one, at MNT. SIGTERM is the power cut: what is durable then becomes
    the new IMAGE, and the mount goes.

It keeps to the letter of fsync(2), where real file systems are kinder: bytes and size of a file are durable once that
file was synced, a name once its directory was. Without a seed all else is lost; with one, each later change of a file
or of a directory is kept or lost by chance, in the order in which they were made. `--deaf` makes it lie about fsync of
paths that match: what that sync was good for is lost, too.
"""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import random
import signal
import stat
import sys
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import pyfuse3
import trio

ROOM_BYTES: Final = 1 << 30
"""What it says that it has, used or not."""


@dataclass
class Inode:
    """What is now, what is durable, and the changes in between."""

    number: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, int] = field(default_factory=dict)
    durable_data: bytearray = field(default_factory=bytearray)
    durable_names: dict[bytes, int] = field(default_factory=dict)
    changes: list[tuple[Any, ...]] = field(default_factory=list)
    path: str = ""
    links: int = 1
    open_count: int = 0

    def change(self, *change: Any) -> None:
        """Make a change that is not durable yet."""
        _apply(self.data, self.names, change)
        self.changes.append(change)

    def sync(self) -> None:
        """All changes until now are durable."""
        for change in self.changes:
            _apply(self.durable_data, self.durable_names, change)
        self.changes.clear()

    def cut(self, draw: random.Random | None) -> None:
        """The power is gone: of the changes, those that chance keeps are there."""
        for change in self.changes:
            if draw is not None and draw.random() < 0.5:
                _apply(self.durable_data, self.durable_names, change)
        self.changes.clear()
        self.data, self.names = bytearray(self.durable_data), dict(self.durable_names)
        self.open_count = 0


def _apply(data: bytearray, names: dict[bytes, int], change: tuple[Any, ...]) -> None:
    match change:
        case ("write", offset, written):
            data.extend(bytes(max(0, offset - len(data))))
            data[offset : offset + len(written)] = written
        case ("size", size):
            del data[size:]
            data.extend(bytes(size - len(data)))
        case ("names", set_names, gone):  # all of one system call: journals keep it together
            for name in gone:
                names.pop(name, None)
            names.update(set_names)


class Disk(pyfuse3.Operations):
    """The file system."""

    enable_writeback_cache = False

    def __init__(self, image: Path, deaf: str, log: Path) -> None:
        super().__init__()
        self._image = image
        self._deaf = deaf
        self._log = log.open("a", buffering=1)
        if image.exists():
            self._inodes: dict[int, Inode] = pickle.loads(image.read_bytes())
        else:
            self._inodes = {1: Inode(1, stat.S_IFDIR | 0o755, os.getuid(), os.getgid(), time.time_ns())}
        self._next = max(self._inodes) + 1

    def cut(self, seed: int | None) -> None:
        """Write what is durable, and can be reached by a durable name, to the image."""
        draw = None if seed is None else random.Random(seed)
        for number in sorted(self._inodes):
            self._inodes[number].cut(draw)
        found, pending = {1}, [1]
        while pending:
            for number in self._inodes[pending.pop()].names.values():
                if number not in found:
                    found.add(number)
                    pending.append(number)
        self._image.write_bytes(pickle.dumps({number: self._inodes[number] for number in sorted(found)}))

    # looking

    def _attributes(self, inode: Inode) -> pyfuse3.EntryAttributes:
        attributes = pyfuse3.EntryAttributes()
        attributes.st_ino = inode.number
        attributes.st_mode, attributes.st_uid, attributes.st_gid = inode.mode, inode.uid, inode.gid
        attributes.st_size = len(inode.target or inode.data)
        attributes.st_blocks = -(-attributes.st_size // 512)
        attributes.st_nlink = inode.links
        attributes.st_atime_ns = attributes.st_mtime_ns = attributes.st_ctime_ns = inode.mtime_ns
        attributes.entry_timeout = attributes.attr_timeout = 60
        return attributes

    def _child(self, parent: int, name: bytes) -> Inode:
        try:
            return self._inodes[self._inodes[parent].names[name]]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(self._child(parent_inode, name))

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(self._inodes[inode])

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._inodes[inode].target

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for name, number in sorted(self._inodes[fh].names.items(), key=lambda item: item[1]):
            if number > start_id and not pyfuse3.readdir_reply(
                token, name, self._attributes(self._inodes[number]), number
            ):
                return

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_blocks = data.f_bfree = data.f_bavail = ROOM_BYTES // 4096
        data.f_files = data.f_ffree = data.f_favail = 1 << 20
        data.f_namemax = 255
        return data

    # names

    def _make(self, parent: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext, target: bytes = b"") -> Inode:
        inode = Inode(self._next, mode, ctx.uid, ctx.gid, time.time_ns(), target)
        inode.path = f"{self._inodes[parent].path}/{os.fsdecode(name)}"
        self._next += 1
        self._inodes[inode.number] = inode
        self._inodes[parent].change("names", {name: inode.number}, ())
        return inode

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(self._make(parent_inode, name, stat.S_IFDIR | mode & ~ctx.umask, ctx))

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(self._make(parent_inode, name, mode & ~ctx.umask, ctx))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(self._make(parent_inode, name, stat.S_IFLNK | 0o777, ctx, target))

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._inodes[new_parent_inode].change("names", {new_name: inode}, ())
        self._inodes[inode].links += 1
        return self._attributes(self._inodes[inode])

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self._child(parent_inode, name).links -= 1
        self._inodes[parent_inode].change("names", {}, (name,))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if self._child(parent_inode, name).names:
            raise pyfuse3.FUSEError(errno.ENOTEMPTY)
        self._inodes[parent_inode].change("names", {}, (name,))

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        moved = self._child(parent_inode_old, name_old)
        replaced = self._inodes[parent_inode_new].names.get(name_new)
        if replaced is not None:
            self._inodes[replaced].links -= 1
        moved.path = f"{self._inodes[parent_inode_new].path}/{os.fsdecode(name_new)}"
        if parent_inode_old == parent_inode_new:
            self._inodes[parent_inode_new].change("names", {name_new: moved.number}, (name_old,))
            return
        self._inodes[parent_inode_new].change("names", {name_new: moved.number}, ())
        self._inodes[parent_inode_old].change("names", {}, (name_old,))

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        found = self._inodes[inode]
        if fields.update_size:
            found.change("size", attr.st_size)
        if fields.update_mode:
            found.mode = stat.S_IFMT(found.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            found.uid = attr.st_uid
        if fields.update_gid:
            found.gid = attr.st_gid
        if fields.update_mtime:
            found.mtime_ns = attr.st_mtime_ns
        return self._attributes(found)

    # files

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_TRUNC:
            self._inodes[inode].change("size", 0)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        inode = self._make(parent_inode, name, stat.S_IFREG | mode & ~ctx.umask, ctx)
        return pyfuse3.FileInfo(fh=inode.number), self._attributes(inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return bytes(self._inodes[fh].data[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        inode = self._inodes[fh]
        inode.change("write", off, bytes(buf))
        inode.mtime_ns = time.time_ns()
        return len(buf)

    async def flush(self, fh: int) -> None:
        """Closing makes nothing durable."""

    async def release(self, fh: int) -> None:
        """What has no name any more stays until the cut."""

    async def releasedir(self, fh: int) -> None:
        """An open directory is its inode number."""

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._sync(fh)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self._sync(fh)

    def _sync(self, number: int) -> None:
        inode = self._inodes[number]
        self._log.write(f"{inode.path or '/'}\n")
        if not (self._deaf and fnmatchcase(inode.path or "/", self._deaf)):
            inode.sync()


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnt", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--deaf", default="")
    parser.add_argument("--seed", type=int)
    given = parser.parse_args()
    disk = Disk(given.image, given.deaf, given.image.with_suffix(".log"))
    options = set(pyfuse3.default_options) | {"fsname=forgetful", "allow_other"}
    pyfuse3.init(disk, str(given.mnt), options)

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    break
            disk.cut(given.seed)
            os._exit(0)  # nothing more is answered; whoever cut the power takes the mount away

    trio.run(serve)
    return 0


if __name__ == "__main__":
    sys.exit(main())
