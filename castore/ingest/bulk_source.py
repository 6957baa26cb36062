"""A directory of the host as an import reads it: walked, and its files copied and hashed. Knows nothing of a workspace.

All of it blocks, for threads of trio's. Names are looked up in open directories, so a tree may be deeper than the
longest path, and no symbolic link below its root is followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from castore.digest import BlobHasher, BlobSummary
from castore.errors import AccessDenied, NotADirectory, NotFound, NotPermitted, SourceChanged, StateError, TreeError
from castore.ingest.disk_room import DiskRoom

CHUNK_BYTES: Final = 1024 * 1024
"""Bytes read, hashed and written at a time: the buffer of a copy."""

_KINDS: Final = {stat.S_IFBLK: "device", stat.S_IFCHR: "device", stat.S_IFSOCK: "socket", stat.S_IFIFO: "fifo"}
STAT_BLOCK_BYTES: Final = 512
"""The unit of `st_blocks`, see stat(2)."""


@dataclass(slots=True, eq=False)
class Folder:
    """A directory of the source, open until `Walk.close_folder`. `above` is None for the root.

    `inode` and `uses` are for whoever copies: its directory in the workspace, and what is under way below it.
    """

    path: bytes
    above: Folder | None
    descriptor: int
    status: os.stat_result
    attributes: dict[bytes, bytes]
    inode: int = 0
    is_new: bool = False
    uses: int = 1

    @property
    def name(self) -> bytes:
        """Its name in `above`."""
        return os.path.basename(self.path)


@dataclass(frozen=True, slots=True)
class Item:
    """A file or symbolic link. `target` is empty unless it is a link."""

    folder: Folder
    name: bytes
    status: os.stat_result
    attributes: dict[bytes, bytes]
    target: bytes

    @property
    def path(self) -> bytes:
        """As the user would write it."""
        return self.folder.path + b"/" + self.name

    @property
    def is_file(self) -> bool:
        """Whether it has bytes."""
        return stat.S_ISREG(self.status.st_mode)

    @property
    def key(self) -> tuple[int, int]:
        """What all names of one file share."""
        return self.status.st_dev, self.status.st_ino


@dataclass(frozen=True, slots=True)
class Enter:
    """The walk comes to a directory; what lies in it follows."""

    folder: Folder


@dataclass(frozen=True, slots=True)
class Leave:
    """All of a directory was walked."""

    folder: Folder


Step = Enter | Item | Leave


class Count:
    """How much was read so far, for whoever shows progress. Each is written by one thread at a time."""

    __slots__ = ("file_count", "name_count", "size_bytes")

    def __init__(self) -> None:
        self.file_count = 0
        self.name_count = 0
        self.size_bytes = 0


class Walk:
    """A walk over a directory, a symbolic link to it followed. A context manager: at its end no folder is open.

    `avoid` has (device, inode) of directories that must not be walked; an inode 0 stands for all of a device. The root
    must be at `place`, if given.
    """

    def __init__(
        self, root: bytes, *, avoid: frozenset[tuple[int, int]] = frozenset(), place: tuple[int, int] | None = None
    ) -> None:
        self._root = root
        self._place = place
        self._avoid = avoid
        self._open: set[Folder] = set()

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *exc: object) -> None:
        for folder in list(self._open):
            self.close_folder(folder)

    def close_folder(self, folder: Folder) -> None:
        """Nothing more is read from it."""
        self._open.remove(folder)
        os.close(folder.descriptor)

    def steps(self) -> Iterator[Step]:
        """Each directory before what lies in it. Memory and descriptors grow with the depth alone.

        Raises NotPermitted for what cannot be packaged, TreeError for what cannot be read, SourceChanged for what went
        away since its name was read.
        """
        root = self._open_folder(self._root, None)
        yield Enter(root)
        stack = [(root, _names(root))]
        try:
            while stack:
                folder, names = stack[-1]
                name = next(names, None)
                if name is None:
                    stack.pop()
                    if os.fstat(folder.descriptor).st_mtime_ns != folder.status.st_mtime_ns:
                        raise SourceChanged(f"{shown(folder.path)}: changed while it was read")
                    yield Leave(folder)
                    continue
                step = self._look_at(folder, name)
                if isinstance(step, Enter):
                    stack.append((step.folder, _names(step.folder)))
                yield step
        finally:
            for _, names in stack:
                names.close()

    def _look_at(self, folder: Folder, name: bytes) -> Enter | Item:
        path = folder.path + b"/" + name
        try:
            status = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                return Enter(self._open_folder(path, folder))
            return _item(folder, name, status)
        except FileNotFoundError as exc:
            raise SourceChanged(f"{shown(path)}: went away while {shown(self._root)} was read") from exc
        except OSError as exc:
            raise mapped(exc, path) from exc

    def _open_folder(self, path: bytes, above: Folder | None) -> Folder:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            if above is None:
                descriptor = os.open(path, flags)
            else:
                descriptor = os.open(os.path.basename(path), flags | os.O_NOFOLLOW, dir_fd=above.descriptor)
        except OSError as exc:
            raise mapped(exc, path) from exc
        folder = Folder(path, above, descriptor, os.fstat(descriptor), {})
        self._open.add(folder)
        place = (folder.status.st_dev, folder.status.st_ino)
        if above is None and self._place not in (None, place):
            raise NotFound(f"{shown(path)}: is another directory for the daemon, which sees other mounts than you")
        if {(folder.status.st_dev, 0), place} & self._avoid:
            raise NotPermitted(f"{shown(path)}: belongs to the store itself and is not imported into it")
        folder.attributes = _attributes(descriptor)
        return folder


def count(walk: Walk, so_far: Count) -> None:
    """Walk everything once, so that what cannot be packaged is refused before anything is copied.

    A file with several names counts once, each of its names as a name.
    """
    linked = LinkedFiles()
    for step in walk.steps():
        if isinstance(step, Leave):
            walk.close_folder(step.folder)
        elif isinstance(step, Item) and step.is_file:
            trio.from_thread.check_cancelled()
            so_far.name_count += 1
            if linked.find(step) is None:
                so_far.file_count += 1
                so_far.size_bytes += step.status.st_size
                linked.add(step, 1)


class LinkedFiles:
    """Files with several names whose other names are still to come, and a number for each. Forgets what is complete."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], tuple[int, int]] = {}

    def find(self, item: Item) -> int | None:
        """The number that another name of the item was added with; one name less is to come."""
        found = self._numbers.pop(item.key, None) if item.status.st_nlink > 1 else None
        if found is None:
            return None
        number, left = found
        if left > 1:
            self._numbers[item.key] = number, left - 1
        return number

    def add(self, item: Item, number: int) -> None:
        """The first name of a file."""
        if item.status.st_nlink > 1:
            self._numbers[item.key] = number, item.status.st_nlink - 1


def _names(folder: Folder) -> Generator[bytes]:
    try:
        with os.scandir(folder.descriptor) as entries:
            for entry in entries:
                yield os.fsencode(entry.name)
    except OSError as exc:
        raise mapped(exc, folder.path) from exc


def _item(folder: Folder, name: bytes, status: os.stat_result) -> Item:
    target, attributes = b"", {}
    if stat.S_ISLNK(status.st_mode):
        target = os.readlink(name, dir_fd=folder.descriptor)
    elif stat.S_ISREG(status.st_mode):
        # There is no call for it that takes an open directory.
        attributes = _attributes(b"/proc/self/fd/%d/%s" % (folder.descriptor, name))
    else:
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "file of an unknown kind")
        raise NotPermitted(f"{shown(folder.path + b'/' + name)}: is a {kind}, which cannot be packaged")
    return Item(folder, name, status, attributes, target)


def _attributes(place: int | bytes) -> dict[bytes, bytes]:
    """The extended attributes that users set: `user.*`, but for what castore computes. None where there are none."""
    try:
        names = os.listxattr(place, follow_symlinks=isinstance(place, int))
        return {os.fsencode(name): os.getxattr(place, name) for name in names if name.startswith("user.")}
    except OSError:
        return {}  # a file system without them, or the file is gone: then opening it says so


# copying


@dataclass(frozen=True, slots=True)
class Copied:
    """A file whose bytes lie in staging, as it was when they were read."""

    item: Item
    status: os.stat_result
    summary: BlobSummary


def copy_files(
    items: list[Item],
    places: list[Path],
    so_far: Count,
    disk: DiskRoom,
    new_hasher: Callable[[], BlobHasher] = BlobHasher,
) -> list[Copied]:
    """Copy files to these places, as long as the disk has room for them, and hash them, in one pass.

    Raises SourceChanged, TreeError; StagingFull; StateError when staging cannot be written. What it made until then
    stays.
    """
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, *(item.status.st_size for item in items), 1))))
    return [_copy(item, place, buffer, so_far, disk, new_hasher()) for item, place in zip(items, places, strict=True)]


def _copy(item: Item, place: Path, buffer: memoryview, so_far: Count, disk: DiskRoom, hasher: BlobHasher) -> Copied:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        source = os.open(item.name, flags, dir_fd=item.folder.descriptor)
    except FileNotFoundError as exc:
        raise SourceChanged(f"{shown(item.path)}: went away while it was imported") from exc
    except OSError as exc:
        raise mapped(exc, item.path) from exc
    try:
        return _copy_open(item, source, place, buffer, so_far, disk, hasher)
    finally:
        os.close(source)


def _copy_open(
    item: Item, source: int, place: Path, buffer: memoryview, so_far: Count, disk: DiskRoom, hasher: BlobHasher
) -> Copied:
    before = os.fstat(source)
    if not stat.S_ISREG(before.st_mode) or before.st_size != item.status.st_size:
        raise _changed(item)
    has_holes = before.st_blocks * STAT_BLOCK_BYTES < before.st_size
    try:
        target = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise _staging_failed(exc) from exc
    try:
        while True:
            trio.from_thread.check_cancelled()
            try:
                size = os.readv(source, [buffer])
            except OSError as exc:
                raise mapped(exc, item.path) from exc
            if not size:
                break
            chunk = buffer[:size]
            hasher.update(chunk)
            if not (has_holes and bytes(chunk).count(0) == size):
                try:
                    with disk.taken(size):
                        _write(target, chunk, hasher.size_bytes - size)
                except OSError as exc:
                    raise _staging_failed(exc) from exc
            so_far.size_bytes += size
        after = os.fstat(source)
        now = (hasher.size_bytes, after.st_size, after.st_mtime_ns)
        if now != (before.st_size, before.st_size, before.st_mtime_ns):
            raise _changed(item)
        if has_holes:
            os.ftruncate(target, hasher.size_bytes)
        os.utime(target, ns=(after.st_mtime_ns, after.st_mtime_ns))
    finally:
        os.close(target)
    so_far.file_count += 1
    return Copied(item, after, hasher.finish())


def _write(target: int, chunk: memoryview, offset: int) -> None:
    done = 0
    while done < len(chunk):
        done += os.pwrite(target, chunk[done:], offset + done)


# errors and names


def absent_names(folder: Folder, names: list[tuple[bytes, bool]]) -> list[bytes]:
    """Of names, each with whether it is of a directory, those that the folder does not have as such."""
    gone = []
    for name, is_directory in names:
        try:
            status = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
        except OSError:
            gone.append(name)
            continue
        if stat.S_ISDIR(status.st_mode) != is_directory:
            gone.append(name)
    return gone


def shown(path: bytes) -> str:
    """A path as one line of text."""
    text = path.decode(errors="backslashreplace")
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def mapped(exc: OSError, path: bytes) -> TreeError:
    """The error for one of the operating system about the source."""
    if isinstance(exc, PermissionError):
        return AccessDenied(f"{shown(path)}: may not be read by uid {os.geteuid()}")
    if isinstance(exc, FileNotFoundError):
        return NotFound(f"{shown(path)}: no such file or directory")
    if isinstance(exc, NotADirectoryError):
        return NotADirectory(f"{shown(path)}: is not a directory")
    return TreeError(f"{shown(path)}: {exc.strerror}")


def _changed(item: Item) -> SourceChanged:
    return SourceChanged(f"{shown(item.path)}: changed while it was read")


def _staging_failed(exc: OSError) -> StateError:
    return StateError(f"staging cannot be written: {exc.strerror}")
