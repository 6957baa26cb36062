"""A package's tree written to a directory of the host: every byte checked, all of it there or nothing. No catalog rule.

It is written below a new directory beside the target, which a rename puts in its place at last. All names are made
relative to directories that this process made, and no symbolic link is ever followed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from castore.blobs.reader import BlobReader
from castore.catalog.reader import CatalogReader
from castore.catalog.records import Entry, Kind
from castore.digest import new_hasher
from castore.errors import AlreadyExists, BlockUnreadable, CastoreError, FormatError, NotFound
from castore.failpoint import failpoint

WORKERS: Final = 8
"""Files written at a time: hides the latency of a remote backend, within the memory that reads share."""
PIECE_BYTES: Final = 1024 * 1024
"""Read, hashed and written at a time."""
_PRIVATE: Final = 0o700
_NO_FOLLOW: Final = os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | _NO_FOLLOW
_NEAR_BYTES: Final = 2048
"""Longer paths are gone along in steps: one system call takes 4095 bytes, and a tree may be deeper."""
_MARK: Final = ".castore-export-"


@dataclass(slots=True)
class Exported:
    """How far it is."""

    file_count: int = 0
    size_bytes: int = 0


class Export:
    """Writes one tree once. `entries` are (path, entry) below `root`, a directory before what is in it."""

    def __init__(
        self,
        catalog: CatalogReader,
        blobs: BlobReader,
        root: Entry,
        entries: Iterable[tuple[bytes, Entry]],
        target: Path,
    ) -> None:
        self.done = Exported()
        self._catalog = catalog
        self._blobs = blobs
        self._root = root
        self._entries = entries
        self._target = target
        self._directories: list[tuple[bytes, Entry]] = [(b".", root)]
        self._first_names: dict[int, bytes] = {}
        self._errors: list[CastoreError | OSError] = []

    async def run(self) -> None:
        """Write it. On every error, and when it is cancelled, the target is as it was.

        Raises AlreadyExists when the target is anything but absent or an empty directory, NotFound without a directory
        to put it in, FormatError for a name that no directory can have, BlockUnreadable, StorageError, OSError.
        """
        check_target(self._target)
        _remove_leftovers(self._target)
        draft = self._target.with_name(f".{self._target.name}{_MARK}{secrets.token_hex(8)}")
        try:
            os.mkdir(draft, _PRIVATE)
        except OSError as exc:
            exc.filename = str(self._target)  # the name that its caller knows
            raise
        try:
            # Held until the end, so that nobody takes it for one that a killed export left.
            held = os.open(draft, _FOLDER)
            try:
                fcntl.flock(held, fcntl.LOCK_EX)
                await self._fill(held)
                await trio.to_thread.run_sync(self._finish, held)
                failpoint("export.filled")
                _move(draft, self._target)
            finally:
                os.close(held)
        except BaseException:
            _remove(draft)
            raise

    async def _fill(self, top: int) -> None:
        jobs, queue = trio.open_memory_channel[tuple[int, Entry]](0)
        async with trio.open_nursery() as nursery, jobs:
            for _ in range(WORKERS):
                nursery.start_soon(self._work, queue, nursery.cancel_scope)
            try:
                for path, entry in self._entries:
                    await self._make(top, path, entry, jobs)
            except (CastoreError, OSError) as exc:
                self._fail(exc, nursery.cancel_scope)
        if self._errors:
            raise self._errors[0]

    def _fail(self, error: CastoreError | OSError, scope: trio.CancelScope) -> None:
        """Raised outside, so that it is not part of a group."""
        self._errors.append(error)
        scope.cancel()

    async def _make(self, top: int, path: bytes, entry: Entry, jobs: trio.MemorySendChannel[tuple[int, Entry]]) -> None:
        name = os.path.basename(path)
        if name != entry.name or name in (b"", b".", b"..") or b"\0" in name:
            raise FormatError(f"the package has an entry that no directory can have: {entry.name!r}")
        with _near(top, path) as (folder, near):
            file = self._make_near(top, path, folder, near, entry)
        if file >= 0:
            try:
                await jobs.send((file, entry))
            except BaseException:
                os.close(file)
                raise
        await trio.lowlevel.checkpoint()

    def _make_near(self, top: int, path: bytes, folder: int, near: bytes, entry: Entry) -> int:
        """Make an entry at `near` in `folder`. The descriptor of a file that is to be written, else -1."""
        if entry.kind is Kind.DIRECTORY:
            os.mkdir(near, _PRIVATE, dir_fd=folder)
            self._directories.append((path, entry))
        elif entry.kind is Kind.SYMLINK:
            os.symlink(entry.target, near, dir_fd=folder)
            _set_owner(entry, path=near, top=folder)
            os.utime(near, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=folder, follow_symlinks=False)
        elif entry.inode in self._first_names:
            with _near(top, self._first_names[entry.inode]) as (source, first):
                os.link(first, near, src_dir_fd=source, dst_dir_fd=folder, follow_symlinks=False)
        else:
            if entry.nlink > 1:
                self._first_names[entry.inode] = path
            return os.open(near, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600, dir_fd=folder)
        return -1

    async def _work(self, queue: trio.MemoryReceiveChannel[tuple[int, Entry]], scope: trio.CancelScope) -> None:
        async for file, entry in queue:
            try:
                await self._write(file, entry)
            except (CastoreError, OSError) as exc:
                self._fail(exc, scope)
            finally:
                os.close(file)

    async def _write(self, file: int, entry: Entry) -> None:
        blob = self._catalog.blob(entry.blob_id)
        if blob is None:
            raise NotFound("the package was deleted while it was exported")
        digest = blob.summary.digest
        hasher = new_hasher(digest.algorithm)
        handle = self._blobs.open(blob)
        try:
            for offset in range(0, blob.summary.size_bytes, PIECE_BYTES):
                piece = await handle.read(offset, PIECE_BYTES)
                hasher.update(piece)
                _write_all(file, piece)
                self.done.size_bytes += len(piece)
        finally:
            handle.close()
        if hasher.digest() != digest.raw:
            raise BlockUnreadable(
                f"{digest}: the blocks are as their checksums say, and the whole is not as its digest"
            )
        for name, value in self._catalog.attributes(entry.inode).items():
            _set_attribute(file, name, value)
        _set_owner(entry, file=file)
        os.fchmod(file, entry.mode)
        os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))
        await trio.to_thread.run_sync(os.fsync, file)
        self.done.file_count += 1

    def _finish(self, top: int) -> None:
        """Modes and times of directories, the innermost first: nothing is made in them any more."""
        for path, entry in reversed(self._directories):
            with _near(top, path) as (above, near):
                folder = os.open(near, _FOLDER, dir_fd=above)
            try:
                for name, value in self._catalog.attributes(entry.inode).items():
                    _set_attribute(folder, name, value)
                _set_owner(entry, file=folder)
                os.fchmod(folder, entry.mode)
                os.utime(folder, ns=(entry.mtime_ns, entry.mtime_ns))
                os.fsync(folder)
            finally:
                os.close(folder)


def check_target(target: Path) -> None:
    """Raise AlreadyExists or NotFound unless a directory can be put there."""
    if not target.parent.is_dir():
        raise NotFound(f"{target.parent}: there is no such directory to export into; make it first")
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode) or os.listdir(target):
        raise AlreadyExists(f"{target}: exists; give a directory that is empty or not there yet")


def _move(draft: Path, target: Path) -> None:
    os.rename(draft, target)  # takes the place of an empty directory, and of nothing else
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_leftovers(target: Path) -> None:
    """What killed exports of the same target left: the kernel gave their locks back."""
    for left in target.parent.glob(f".{_escaped(target.name)}{_MARK}*"):
        try:
            held = os.open(left, _FOLDER)
        except OSError:
            continue  # somebody else's, or gone
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(left)
        except BlockingIOError:
            pass
        finally:
            os.close(held)


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


@contextmanager
def _near(top: int, path: bytes) -> Iterator[tuple[int, bytes]]:
    """A directory on the way, and the rest of the path, which a system call takes."""
    opened = -1
    try:
        while len(path) > _NEAR_BYTES:
            cut = path.rindex(b"/", 0, _NEAR_BYTES)
            below = os.open(path[:cut], _FOLDER, dir_fd=top if opened < 0 else opened)
            if opened >= 0:
                os.close(opened)
            opened, path = below, path[cut + 1 :]
        yield top if opened < 0 else opened, path
    finally:
        if opened >= 0:
            os.close(opened)


def _remove(draft: Path) -> None:
    """As far as it can be, however deep: each directory is moved to the top before it is emptied."""
    with suppress(OSError):
        folders = [draft]
        while folders:
            folder = folders.pop()
            os.chmod(folder, _PRIVATE)
            with os.scandir(folder) as found:
                items = list(found)
            for item in items:
                if item.is_dir(follow_symlinks=False):
                    os.chmod(item.path, _PRIVATE)
                    folders.append(draft / f"{_MARK}{secrets.token_hex(8)}")
                    os.rename(item.path, folders[-1])
                else:
                    os.unlink(item.path)
            if folder != draft:
                os.rmdir(folder)
        os.rmdir(draft)


def _write_all(file: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _set_attribute(file: int, name: bytes, value: bytes) -> None:
    """As `cp -a` does: a file system without extended attributes takes none."""
    if not name.startswith(b"user.castore."):
        with suppress(OSError):
            os.setxattr(file, name, value)


def _set_owner(entry: Entry, *, file: int = -1, path: bytes = b"", top: int = -1) -> None:
    """Only root can give files away."""
    if os.geteuid() != 0:
        return
    if path:
        os.chown(path, entry.uid, entry.gid, dir_fd=top, follow_symlinks=False)
    else:
        os.fchown(file, entry.uid, entry.gid)
