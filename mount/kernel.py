"""What the kernel lets a mount's owner do to it: set readahead and the background requests, and end its connection."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

from mount.fusectl import connection

log = logging.getLogger(__name__)

READ_AHEAD_KIB: Final = 4096
"""Lets the kernel send 1 MiB reads: 1.7 GB/s against 886 MB/s with its default of 128 KiB, on a warm file."""
MAX_BACKGROUND: Final = 8192
"""Readahead requests in flight: a thousand readers of large files that stall have five each, four ahead of them. At
three quarters of it the kernel reads nothing ahead any more, but page by page, also what is cached here: with its
default of 12 a dozen stalled readers do that."""
MAX_TASKS: Final = 10_000
"""Handlers at a time: all of the background requests, and room for those that are not. One that waits takes 20 kB."""


def tune(mountpoint: Path) -> None:
    """Raise both limits, or say in one line of log why not. Looks the mount up without touching it. Blocking.

    Only after the kernel has the answer to its first request: with that it takes the lower one of the readahead that it
    asked for, 128 KiB, and of what is set by then (process_init_reply in Linux' fs/fuse/inode.c).
    """
    device = _device(mountpoint)
    if device is None:
        return
    path = f"/sys/class/bdi/{device}/read_ahead_kb"
    try:
        Path(path).write_text(str(READ_AHEAD_KIB))
    except OSError as exc:
        log.info("%s stays as it is (%s): large reads are slower", path, exc.strerror)
    try:
        with connection(device.partition(":")[2]) as folder:
            _write(folder, "max_background", MAX_BACKGROUND)
            _write(folder, "congestion_threshold", MAX_BACKGROUND * 3 // 4)
    except OSError as exc:
        log.info("max_background stays as it is (%s): reads that stall slow down others", exc.strerror)


def abort(mountpoint: Path) -> None:
    """End the connection of a mount whose daemon is dead: whoever waits there gets ENOTCONN or ECONNABORTED.

    Raises OSError where this user may not.
    """
    device = _device(mountpoint)
    if device is not None:
        with connection(device.partition(":")[2]) as folder:
            _write(folder, "abort", 1)


def _write(folder: int, name: str, value: int) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def _device(mountpoint: Path) -> str | None:
    """MAJOR:MINOR of the topmost mount there, from mountinfo."""
    found = None
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        if fields[4].decode("unicode_escape").encode("latin-1") == bytes(mountpoint):
            found = fields[2].decode()
    return found
