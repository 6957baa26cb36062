"""File systems of 64 MB for the tests of full disks: in memory, or ext4 in a file. They tidy up after themselves."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.mount.store import run_tool

MB: Final = 1 << 20
SIZE_BYTES: Final = 64 * MB


class SmallDisk:
    """A mounted file system, and what else takes room there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._others = path / "of somebody else"

    def fill(self, but_bytes: int = 0) -> None:
        """Somebody else takes all the room that is left, but for so many bytes."""
        with open(self._others, "wb", buffering=0) as file:
            while (left := self.free_bytes() - but_bytes) > 0:
                try:
                    file.write(bytes(min(left, MB)))
                except OSError:
                    break
            os.fsync(file.fileno())

    def empty(self) -> None:
        """Somebody else gives it back."""
        self._others.unlink()

    def free_bytes(self) -> int:
        disk = os.statvfs(self.path)
        return disk.f_bavail * disk.f_frsize


@contextmanager
def small_disk(path: Path, kind: str = "tmpfs") -> Iterator[SmallDisk]:
    """One at `path`, which is made; what was there is hidden until the block ends."""
    path.mkdir(exist_ok=True)
    image = path.with_name(f"{path.name}.img")
    if kind == "tmpfs":
        run_tool("mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "castore-test", path)
    else:
        with image.open("wb") as file:
            file.truncate(SIZE_BYTES)
        run_tool("mkfs.ext4", "-q", "-m", "0", image)
        run_tool("mount", "-o", "loop", image, path)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", path], check=True)
        image.unlink(missing_ok=True)
