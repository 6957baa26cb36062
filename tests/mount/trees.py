"""A tree with everything that a package can hold, and the comparison of two trees. Knows nothing of castore."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from dataclasses import dataclass
from pathlib import Path

_NS = 10**9
_FIRST_NS = 1_000_000_000 * _NS
"""Times of made trees lie in 2001, so that a time that was not kept is noticed."""


@dataclass(frozen=True, slots=True)
class Item:
    """What one name of a tree is. `links` are all names of the same file; of directories nlink is not compared."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int
    content: str
    links: frozenset[bytes]
    attributes: tuple[tuple[str, bytes], ...]


def snapshot(root: Path) -> dict[bytes, Item]:
    """Path below `root` -> item, b'.' for the root itself. Reads every byte."""
    top = os.fsencode(root)
    paths = [b"."]
    for folder, directories, files in os.walk(top):
        paths += [os.path.relpath(os.path.join(folder, name), top) for name in directories + files]
    status = {path: os.lstat(os.path.join(top, path)) for path in paths}
    names: dict[int, set[bytes]] = {}
    for path, one in status.items():
        names.setdefault(one.st_ino, set()).add(path)
    for one in status.values():
        # A directory's links are its business; those of a file must all be there.
        assert stat.S_ISDIR(one.st_mode) or one.st_nlink == len(names[one.st_ino]), f"{names[one.st_ino]}: {one}"
    return {path: _item(os.path.join(top, path), one, frozenset(names[one.st_ino])) for path, one in status.items()}


def _item(path: bytes, status: os.stat_result, links: frozenset[bytes]) -> Item:
    content = ""
    size_bytes = status.st_size
    if stat.S_ISLNK(status.st_mode):
        content = repr(os.readlink(path))
    elif stat.S_ISREG(status.st_mode):
        content = sha256(path)
    else:
        size_bytes = 0
    return Item(
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size_bytes=size_bytes,
        content=content,
        links=links,
        attributes=tuple(
            (name, os.getxattr(path, name, follow_symlinks=False))
            for name in sorted(os.listxattr(path, follow_symlinks=False))
        ),
    )


def sha256(path: Path | bytes) -> str:
    """The digest of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def assert_same(found: Path, expected: Path | dict[bytes, Item]) -> None:
    """Every name, byte, mode, owner, time, link and attribute of the two trees is alike."""
    there = snapshot(expected) if isinstance(expected, Path) else expected
    here = snapshot(found)
    assert here.keys() == there.keys()
    for path, item in there.items():
        assert here[path] == item, f"{path!r}: found {here[path]}, expected {item}"


def make_tree(root: Path, *, attributes: bool = False) -> None:
    """Directories, files of many sizes, hard links, symbolic links, modes, and times with nanoseconds."""
    numbers = random.Random(root.name)
    for directory in ("bin", "empty", "lib/deep/er", "share"):
        (root / directory).mkdir(parents=True)
    sizes = (0, 1, 4095, 4096, 131_071, 131_072, 131_073, 1_048_577, 3_000_000)
    for number, size in enumerate(sizes):
        (root / f"share/{size}").write_bytes(numbers.randbytes(size))
        (root / f"lib/module{number}.txt").write_text(f"line {number}\n" * number)
    tool = root / "bin/tool"
    tool.write_text("#!/bin/sh\necho tool of $(basename $0)\n")
    tool.chmod(0o755)
    (root / "share/private").write_text("secret\n")
    (root / "share/private").chmod(0o600)
    (root / "share/read-only").write_text("fixed\n")
    (root / "share/read-only").chmod(0o444)
    (root / "bin/tool-1").hardlink_to(tool)
    (root / "lib/deep/tool").hardlink_to(tool)
    (root / "lib/big").hardlink_to(root / "share/3000000")
    (root / "lib/current").symlink_to("deep/er")
    (root / "share/dangling").symlink_to("no/such/file")
    (root / "share/absolute").symlink_to("/etc/passwd")
    (root / "share/up").symlink_to("../bin/tool")
    if attributes:
        os.setxattr(tool, "user.comment", b"made by hand\0\xff")
        os.setxattr(root / "lib", "user.empty", b"")
    (root / "lib/deep").chmod(0o750)
    for folder, directories, files in os.walk(root, topdown=False):
        for name in [*directories, *files]:
            _set_time(Path(folder, name), numbers)
    _set_time(root, numbers)


def _set_time(path: Path, numbers: random.Random) -> None:
    time_ns = _FIRST_NS + numbers.randrange(10**7 * _NS)
    os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)
