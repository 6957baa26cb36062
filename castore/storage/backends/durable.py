"""Files that survive power loss, in a directory tree with a marked root. Blocking; knows no digests and no keys.

A write is: temporary file in the folder it is meant for, fsync, rename, fsync of the folder and of every folder
above it that is not known to be durable. The writer holds a lock on the temporary file (`flock`, dropped by the
kernel when the process dies), so that a sweep by any process can tell a leftover from a write under way.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from castore.errors import StorageUnavailable
from castore.failpoint import failpoint

ROOT_MARK: Final = "CASTORE-OBJECTS.txt"
"""Proves that the folder is the one that was made for objects, and not the empty mountpoint of a missing disk."""

_MARK_TEXT: Final = b"""The objects of a castore backend, each under its digest.
castore knows the folder by this file: without it, the folder counts as a disk that is not mounted.
"""
_DIRECTORY_MODE: Final = 0o700
_FILE_MODE: Final = 0o600
_TEMP_NAME: Final = re.compile(r"\.castore-put-[0-9a-f]{16}")


class DurableTree:
    """The folders and files below `root`. Making one touches no disk. All methods may run in many threads at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Folders that are known to survive power loss, as paths relative to the root. The object layout bounds them:
        # 65,792 for each digest algorithm, some 8 MB when every one is in use.
        self._durable: set[str] = set()

    def create(self) -> bool:
        """Make the root, whatever is missing above it, and the mark; whether any was missing."""
        missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        for folder in reversed(missing):
            with suppress(FileExistsError):
                folder.mkdir(_DIRECTORY_MODE)
            _sync_folder(folder.parent)
        marked = (self.root / ROOT_MARK).exists()
        if not marked:
            fd = os.open(self.root / ROOT_MARK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _FILE_MODE)
            try:
                os.write(fd, _MARK_TEXT)
                os.fsync(fd)
            finally:
                os.close(fd)
            _sync_folder(self.root)
        return not marked

    def require_root(self) -> None:
        """Raise StorageUnavailable unless the root is there and bears the mark."""
        try:
            os.stat(self.root / ROOT_MARK)
        except (FileNotFoundError, NotADirectoryError) as exc:
            state = f"has no {ROOT_MARK}"
            if not self.root.is_dir():
                state = "is not a directory" if self.root.exists() else "is not there"
            raise StorageUnavailable(f"{self.root} {state}: mount it or run `castore init`") from exc

    def write(self, folder: str, name: str, *, fill: Callable[[int], None], commit: Callable[[], bool]) -> None:
        """Replace `folder/name` by what `fill` writes to the descriptor it is given, whole and durably.

        `commit` is asked once, right before the file becomes visible; when it says no, nothing does.
        """
        folder_fd, unsynced = self._open_folder(folder)
        try:
            if self._replace(folder_fd, name, fill, commit):
                os.fsync(folder_fd)
                for path in unsynced:  # last, because a journalling file system has written them by now
                    _sync_folder(self.root / path)
                if unsynced:
                    self._durable.update(_self_and_parents(folder))
        finally:
            os.close(folder_fd)

    def _replace(self, folder_fd: int, name: str, fill: Callable[[int], None], commit: Callable[[], bool]) -> bool:
        temporary = f".castore-put-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(temporary, flags, _FILE_MODE, dir_fd=folder_fd)
        try:
            with suppress(OSError):  # without locks on this file system, sweep leaves the file alone
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fill(fd)
            os.fsync(fd)
            failpoint("object.written")
            committed = commit()
            if committed:
                os.rename(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
                failpoint("object.renamed")
            else:
                os.unlink(temporary, dir_fd=folder_fd)
            return committed
        except BaseException:
            with suppress(OSError):  # the first error is the one to tell; a leftover is swept
                os.unlink(temporary, dir_fd=folder_fd)
            raise
        finally:
            os.close(fd)

    def _open_folder(self, folder: str) -> tuple[int, list[str]]:
        """A descriptor of the folder, made if need be, and the folders to sync before a file in it is durable."""
        if folder in self._durable:
            with suppress(FileNotFoundError):  # an operator may have removed it: start from nothing
                return _open_directory(self.root / folder), []
        self.require_root()
        unsynced = []
        for path in reversed(_self_and_parents(folder)):
            try:
                os.mkdir(self.root / path, _DIRECTORY_MODE)
                self._durable.discard(path)
            except FileExistsError:
                pass
            if path not in self._durable:  # made now, or by a process that may have died before its fsync
                unsynced.append(os.path.dirname(path))
        return _open_directory(self.root / folder), unsynced[::-1]

    def remove(self, folder: str, name: str) -> None:
        """Delete `folder/name` durably. Succeeds when it is not there."""
        try:
            folder_fd = _open_directory(self.root / folder)
        except FileNotFoundError:
            return self.require_root()
        try:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder_fd)
            os.fsync(folder_fd)  # also when it was gone: whoever removed it may have died before its fsync
        finally:
            os.close(folder_fd)

    def sweep(self, folder: str, *, grace_ns: int) -> int:
        """Remove the temporary files of dead writers from one folder; how many there were.

        Safe beside live writers of any process: a file goes only if nobody holds its lock and it has not changed
        for `grace_ns` (which covers the moment between making a file and locking it).
        """
        removed = 0
        for name in self.names(folder):
            if _TEMP_NAME.fullmatch(name) and _is_abandoned(self.root / folder / name, grace_ns):
                with suppress(FileNotFoundError):
                    os.unlink(self.root / folder / name)
                    removed += 1
        return removed

    def names(self, folder: str) -> list[str]:
        """The names in a folder in ascending order; none when it is not there."""
        try:
            return sorted(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []


def _is_abandoned(path: Path, grace_ns: int) -> bool:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)  # NFS locks only what is open for writing
    except FileNotFoundError:  # renamed or removed meanwhile
        return False
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or time.time_ns() - status.st_mtime_ns < grace_ns:
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:  # locked by its writer, or locks are not to be had: then nothing is certain
        return False
    finally:
        os.close(fd)


def _self_and_parents(folder: str) -> list[str]:
    """`a/b/c` -> `[a/b/c, a/b, a]`."""
    parts = folder.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _open_directory(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _sync_folder(path: Path) -> None:
    fd = _open_directory(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
