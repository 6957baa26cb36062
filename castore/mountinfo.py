"""What the kernel says is mounted, from `/proc/self/mountinfo` (proc(5)). Touches no mountpoint but in `is_dead`."""

from __future__ import annotations

import os
import re
import select
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from castore.errors import DeadlineExceeded

MOUNTINFO: Final = Path("/proc/self/mountinfo")
SOURCE_PREFIX: Final = "castore:"
"""What a castore mount names as its source is this and the state directory, see `mount_source`."""

_PLAIN: Final = "".join(map(chr, range(32, 127))).replace("%", "")

_OCTAL = re.compile(rb"\\([0-7]{3})")
PROBE_SECONDS: Final = 2.0
"""For a `statfs`, which the kernel never answers itself and any living daemon does at once."""
_LINKS_MAX: Final = 40
"""As many symbolic links as the kernel follows."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. `state_dir` is None unless it is a castore mount."""

    mount_id: int
    mountpoint: Path
    fs_type: str
    state_dir: Path | None
    read_only: bool


def mount_source(state_dir: Path) -> str:
    """The source that a mount of this state directory names: printable ASCII, all else and `%` percent-encoded."""
    return SOURCE_PREFIX + quote(os.fsencode(state_dir), safe=_PLAIN)


def parse_mountinfo(text: bytes) -> list[Mount]:
    """All mounts, in the order of the kernel: of several at one place, the last is on top."""
    mounts = []
    for line in text.rstrip(b"\n").split(b"\n"):
        front, _, back = line.partition(b" - ")
        fields, (fs_type, source, *super_options) = front.split(b" "), back.split(b" ")
        state_dir = None
        if fs_type.startswith(b"fuse") and _text(source).startswith(SOURCE_PREFIX):
            state_dir = Path(os.fsdecode(unquote_to_bytes(_text(source).removeprefix(SOURCE_PREFIX))))
        options = fields[5].split(b",") + (super_options[0].split(b",") if super_options else [])
        mounts.append(Mount(int(fields[0]), Path(_text(fields[4])), _text(fs_type), state_dir, b"ro" in options))
    return mounts


def _text(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))


def read_mounts() -> list[Mount]:
    """All mounts that this process sees."""
    return parse_mountinfo(MOUNTINFO.read_bytes())


def mount_at(mountpoint: Path) -> Mount | None:
    """The topmost mount at a mountpoint, itself as `resolve_mountpoint` gives it."""
    return next((mount for mount in reversed(read_mounts()) if mount.mountpoint == mountpoint), None)


def resolve_mountpoint(path: Path) -> Path:
    """The path as the kernel writes it, absolute and without symbolic links, asking only the folders above it."""
    current = os.path.abspath(path)
    for _ in range(_LINKS_MAX):
        folder, name = os.path.split(current)
        current = os.path.join(os.path.realpath(folder), name)
        try:
            # Of a mount's root the kernel answers this itself, so a dead or hanging daemon does no harm.
            target = os.readlink(current)
        except OSError:
            break
        current = os.path.abspath(os.path.join(os.path.dirname(current), target))
    return Path(current)


def is_dead(mountpoint: Path) -> bool | None:
    """Whether the daemon behind a mount is gone; None when that cannot be said within PROBE_SECONDS: it hangs."""
    answers: list[bool] = []

    def probe() -> None:
        try:
            os.statvfs(mountpoint)
        except PermissionError:
            answers.append(False)
        except OSError:
            answers.append(True)
        else:
            answers.append(False)

    # A thread, because nothing else can give up waiting for a file system.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else None


def wait_unmounted(mount: Mount, seconds: float) -> None:
    """Wait until that very mount is gone. Raises DeadlineExceeded after `seconds`."""
    deadline = time.monotonic() + seconds
    with MOUNTINFO.open("rb", buffering=0) as stream:
        changes = select.poll()
        # The kernel reports a changed mount table as an exceptional condition (proc(5)).
        changes.register(stream, select.POLLPRI)
        while True:
            stream.seek(0)
            if all(other.mount_id != mount.mount_id for other in parse_mountinfo(stream.read())):
                return
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise DeadlineExceeded(f"{mount.mountpoint} is still mounted after {seconds:g} seconds")
            changes.poll(remaining * 1000)
