"""The place to mount at: checked before, cleared of a dead mount, named when busy. It never looks inside a mount."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from castore import state_lock
from castore.errors import StateError, StateLocked
from castore.mountinfo import is_dead, mount_at, read_mounts, resolve_mountpoint
from mount import kernel

DEAD_MOUNTS_MAX: Final = 16
"""Dead mounts on top of each other that are cleared; more is somebody's doing."""
USERS_NAMED_MAX: Final = 5
END_SECONDS: Final = 5.0
"""A daemon may take to end that has no mount any more, or was killed and its connection aborted. Most take no time."""
POLL_SECONDS: Final = 0.05
"""Between two looks at that."""


@dataclass(frozen=True, slots=True)
class MountUser:
    """A process that keeps a mount busy, and by what."""

    pid: int
    command: str
    by: str


def prepare(path: Path, state_dir: Path, *, is_writer: bool) -> Path:
    """The resolved mountpoint, ready to be mounted. Dead mounts of this store there are cleared.

    `is_writer` says that the caller holds the state directory's lock, so that a writable mount of it has no daemon.
    Raises StateError when it is missing, no directory, not empty, or has something mounted.
    """
    resolved = resolve_mountpoint(path)
    for _ in range(DEAD_MOUNTS_MAX):
        there = mount_at(resolved)
        if there is None:
            break
        if there.state_dir != state_dir:
            raise StateError(f"{resolved}: something is mounted there ({there.fs_type}); unmount it or choose another")
        if (there.read_only or not is_writer) and is_dead(resolved) is False:
            raise StateError(f"{resolved}: the store is mounted there already")
        detach(resolved)
    if not resolved.exists():
        raise StateError(f"{resolved}: there is no such directory; make it with `mkdir -p`")
    if not resolved.is_dir():
        raise StateError(f"{resolved}: is not a directory; name an empty directory")
    if any(os.scandir(resolved)):
        raise StateError(f"{resolved}: is not empty; its files would be hidden, name an empty directory")
    return resolved


def take_lock(path: Path, state_dir: Path, *, read_only: bool = False) -> int:
    """As castore.state_lock does, also from a daemon that is about to end, or cannot. Raises StateLocked.

    One that has no mount any more, of the kind that is asked for, ends: umount(8) does not wait for it, and the next
    mount may come at once. One that was killed and cannot end has a thread that tells the kernel something about a
    folder in which somebody waits for an answer of the daemon. Nobody comes free before the connection is aborted.
    """
    try:
        return state_lock.take_lock(path, state_dir)
    except StateLocked:
        if not state_lock.is_held_by_a_daemon(path):
            raise
        mounts = [mount for mount in read_mounts() if mount.state_dir == state_dir and mount.read_only == read_only]
        if mounts and not state_lock.holder_cannot_end(path):
            raise
    for mount in mounts:
        detach(mount.mountpoint)
    deadline = time.monotonic() + END_SECONDS
    while True:
        try:
            return state_lock.take_lock(path, state_dir)
        except StateLocked:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def detach(path: Path) -> None:
    """Take a dead mount away, users or not: they get an error. Raises StateError."""
    with suppress(OSError):  # an abort helps those who wait, and may be root's alone
        kernel.abort(path)
    done = subprocess.run(["fusermount3", "-uz", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StateError(f"{path}: a dead mount cannot be cleared: {done.stderr.strip()}")


def try_unmount(path: Path) -> bool:
    """Unmount if nobody uses it. False when it is busy. Raises StateError for anything else. Blocking."""
    done = subprocess.run(
        ["fusermount3", "-u", str(path)], capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"}
    )
    if done.returncode and "busy" not in done.stderr.lower():
        raise StateError(f"{path}: cannot be unmounted: {done.stderr.strip()}")
    return not done.returncode


def users(path: Path) -> list[MountUser]:
    """The processes that have a file, directory or program of the mount open, as far as this user may see."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for link in _links(process):
                try:
                    target = os.readlink(link)
                except OSError:
                    continue
                if target == str(path) or target.startswith(f"{path}/"):
                    found.append(MountUser(int(process.name), _command(process), target))
                    break
    return sorted(found, key=lambda user: user.pid)


def busy_message(path: Path) -> str:
    """One line that names who keeps the mount busy."""
    named = users(path)
    if not named:
        return f"{path}: is in use by processes that cannot be seen from here; find them with `fuser -vm {path}`"
    listed = ", ".join(f"{user.command} (pid {user.pid}: {user.by})" for user in named[:USERS_NAMED_MAX])
    more = f" and {len(named) - USERS_NAMED_MAX} more" if len(named) > USERS_NAMED_MAX else ""
    return f"{path}: is in use by {listed}{more}; end them or leave the directory, then unmount again"


def _links(process: Path) -> Iterator[Path]:
    yield process / "cwd"
    yield process / "root"
    yield process / "exe"
    for folder in ("fd", "map_files"):
        try:
            yield from (process / folder).iterdir()
        except OSError:
            continue


def _command(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return "?"
