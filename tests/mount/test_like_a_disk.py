"""ingest/ against the disk's own file system: the same random operations, the same answers, the same tree."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.store import MountedStore
from tests.mount.trees import Item, snapshot

STEPS = 1_200
_FOLDERS = ("p", "q", "r")
_NAMES = ("a", "b", "c", "d", "p", "q", "r")
_SIZES = (0, 1, 100, 4096, 70_000, 131_072, 200_001)


class _Side:
    """One of the two trees, with what is open in it. Every operation returns its answer, an errno where it fails."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, int] = {}

    def close(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()

    def path(self, path: str) -> str:
        return f"{self.root}/{path}"

    def open(self, slot: int, path: str, flags: int) -> str:
        if slot in self.files:
            os.close(self.files.pop(slot))
        descriptor = os.open(self.path(path), flags, 0o644)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            # Not kept open: a directory that is removed meanwhile answers nothing here, unlike on a disk.
            os.close(descriptor)
            return "a directory"
        self.files[slot] = descriptor
        return "a file"

    def pwrite(self, slot: int, data: bytes, offset: int) -> int:
        written = os.pwrite(self.files[slot], data, offset)
        # After a short write the next one tells why.
        return written + (os.pwrite(self.files[slot], data[written:], offset + written) if written < len(data) else 0)

    def pread(self, slot: int, length: int, offset: int) -> bytes:
        return os.pread(self.files[slot], length, offset)

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.files[slot], size)

    def fstat(self, slot: int) -> tuple[int, ...]:
        return _shown(os.fstat(self.files[slot]))

    def fsync(self, slot: int) -> None:
        os.fsync(self.files[slot])

    def close_slot(self, slot: int) -> None:
        os.close(self.files.pop(slot))

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.path(path), size)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.path(path), mode)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.path(path))

    def link(self, path: str, new: str) -> None:
        os.link(self.path(path), self.path(new), follow_symlinks=False)

    def unlink(self, path: str) -> None:
        os.unlink(self.path(path))

    def rmdir(self, path: str) -> None:
        os.rmdir(self.path(path))

    def rename(self, path: str, new: str) -> None:
        os.rename(self.path(path), self.path(new))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.path(path), mode)

    def utime(self, path: str, time_ns: int) -> None:
        os.utime(self.path(path), ns=(time_ns, time_ns), follow_symlinks=False)

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        os.setxattr(self.path(path), name, value)

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self.path(path), name)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(self.path(path)))

    def read(self, path: str) -> bytes:
        return Path(self.path(path)).read_bytes()

    def lstat(self, path: str) -> tuple[int, ...]:
        return _shown(os.lstat(self.path(path)))


def _shown(status: os.stat_result) -> tuple[int, ...]:
    """What file systems agree on: the size and the links of a directory are its own business."""
    own = () if stat.S_ISDIR(status.st_mode) else (status.st_nlink, status.st_size)
    return (status.st_mode, status.st_uid, status.st_gid, *own)


def _answer(operation: Callable[..., object], arguments: tuple[object, ...]) -> object:
    try:
        return operation(*arguments)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    except KeyError:
        return "not open"


def _step(numbers: random.Random, time_ns: int) -> tuple[str, tuple[object, ...]]:
    """One operation with its arguments."""

    def path() -> str:
        return "/".join([*numbers.choices(_FOLDERS, k=numbers.choice((0, 0, 1, 1, 2))), numbers.choice(_NAMES)])

    slot, size = numbers.randrange(4), numbers.choice(_SIZES)
    mode = numbers.choice((0o600, 0o644, 0o755, 0o777))
    flags = numbers.choice(
        (
            os.O_RDONLY,
            os.O_RDWR,
            os.O_RDWR | os.O_CREAT,
            os.O_RDWR | os.O_CREAT,
            os.O_RDWR | os.O_CREAT | os.O_TRUNC,
            os.O_RDWR | os.O_CREAT | os.O_EXCL,
            os.O_WRONLY | os.O_CREAT | os.O_APPEND,
            os.O_RDONLY | os.O_DIRECTORY,
            os.O_RDWR | os.O_NOFOLLOW,
        )
    )
    attribute = f"user.{numbers.choice('xyz')}"
    choices: list[tuple[int, str, tuple[object, ...]]] = [
        (12, "open", (slot, path(), flags)),
        (12, "pwrite", (slot, numbers.randbytes(max(1, size)), numbers.choice(_SIZES))),
        (6, "pread", (slot, size, numbers.choice(_SIZES))),
        (3, "ftruncate", (slot, size)),
        (2, "fstat", (slot,)),
        (1, "fsync", (slot,)),
        (6, "close_slot", (slot,)),
        (3, "truncate", (path(), size)),
        (9, "mkdir", (path(), mode)),
        (4, "symlink", (path(), path())),
        (5, "link", (path(), path())),
        (4, "unlink", (path(),)),
        (2, "rmdir", (path(),)),
        (8, "rename", (path(), path())),
        (3, "chmod", (path(), mode)),
        (3, "utime", (path(), time_ns)),
        (3, "setxattr", (path(), attribute, numbers.randbytes(20))),
        (1, "removexattr", (path(), attribute)),
        (3, "listdir", (path(),)),
        (5, "read", (path(),)),
        (5, "lstat", (path(),)),
    ]
    _, name, arguments = numbers.choices(choices, [weight for weight, _, _ in choices])[0]
    return name, arguments


def _without_times(tree: dict[bytes, Item]) -> dict[bytes, tuple[object, ...]]:
    # Directories and files that were changed have the time of the change, which differs.
    return {
        path: (item.mode, item.size_bytes, item.content, item.links, item.attributes) for path, item in tree.items()
    }


@pytest.mark.parametrize("seed", range(4))
def test_same_answers(shared_store: MountedStore, tmp_path: Path, seed: int) -> None:
    numbers = random.Random(seed)
    (tmp_path / "disk").mkdir(mode=0o755)
    sides = (_Side(shared_store.ingest(f"random/{seed}")), _Side(tmp_path / "disk"))
    history: list[str] = []
    outcomes: set[str] = set()
    for number in range(STEPS):
        name, arguments = _step(numbers, 10**18 + number)
        here, there = (_answer(getattr(side, name), arguments) for side in sides)
        shown = tuple(f"{len(one)} bytes" if isinstance(one, bytes) else one for one in arguments)
        history.append(f"{name}{shown}: {there if not isinstance(there, bytes) else len(there)}")
        assert here == there, f"{here!r:.200} instead of {there!r:.200}\n" + "\n".join(history[-60:])
        outcomes.add(f"{name} {there if isinstance(there, str) else 'done'}")
        if number % 100 == 99:
            assert _without_times(snapshot(sides[0].root)) == _without_times(snapshot(sides[1].root))
    # A run in which nearly everything fails would prove nothing.
    assert len(outcomes) > 50, outcomes
    for side in sides:
        side.close()
    package = shared_store.publish(f"random/{seed}")
    assert _without_times(snapshot(package)) == _without_times(snapshot(sides[1].root))
