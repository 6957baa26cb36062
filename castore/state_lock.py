"""The locks of a state directory: one process at a time writes its workspace, one delivers its events; and who puts.

Says who holds one, guards nothing more.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Literal

from castore.errors import StateLocked
from castore.mountinfo import read_mounts

Holder = Literal["daemon", "import", "delivery", "rebuild", "upgrade"]

_MENDS: Final = {
    "daemon": "unmount it or set another state_dir",
    "import": "wait for its end",
    "delivery": "a writing mount delivers events, or `castore events --deliver` does: one at a time",
    "rebuild": "wait for its end",
    "upgrade": "wait for its end",
}
_NOTE_BYTES: Final = 64


def take_lock(path: Path, state_dir: Path, *, holder: Holder = "daemon") -> int:
    """The descriptor that holds the lock at `path`, below `run/` of a state directory, until it is closed.

    The kernel gives the lock back when the process ends, however it does. Raises StateLocked, which names the holder.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        pid, _, kind = _note(descriptor).partition(" ")
        os.close(descriptor)
        kind = kind if kind in _MENDS else "delivery" if holder == "delivery" else "daemon"
        does = "runs" if kind == "delivery" else "writes"
        shown = [mount.mountpoint for mount in read_mounts() if mount.state_dir == state_dir and not mount.read_only]
        where = f", mounted at {shown[-1]}" if kind == "daemon" and shown else ""
        raise StateLocked(
            f"{state_dir}: another {kind} (pid {pid or 'unknown'}) {does} there{where}; {_MENDS[kind]}"
        ) from exc
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}{'' if holder == 'daemon' else f' {holder}'}\n".encode(), 0)
    return descriptor


def take_owner(folder: Path) -> tuple[str, int]:
    """A name under which a command puts, below `run/puts/`, and the descriptor that says that it lives."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        owner = str(uuid.uuid4())
        descriptor = os.open(folder / owner, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return owner, descriptor
        os.close(descriptor)  # somebody took it for a dead one's, in the moment before it was locked


def owners(folder: Path) -> set[str]:
    """All that put, or did and died."""
    return set(os.listdir(folder)) if folder.is_dir() else set()


def living_owners(folder: Path) -> set[str]:
    """Those of them whose process lives."""
    living = set()
    for owner in owners(folder):
        with dead_owner(folder, owner) as is_dead:
            if not is_dead:
                living.add(owner)
    return living


@contextmanager
def dead_owner(folder: Path, owner: str) -> Iterator[bool]:
    """Whether its process is dead; nobody else finds it so while inside."""
    try:
        descriptor = os.open(folder / owner, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield bool(os.fstat(descriptor).st_nlink)
    finally:
        os.close(descriptor)


def holder_cannot_end(path: Path) -> bool:
    """Whether the holder was killed, but a thread of it does not come back from the kernel, and keeps what it holds."""
    with suppress(OSError):
        pid = _note_at(path).partition(" ")[0]
        if pid.isdecimal():
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False


def is_held_by_a_daemon(path: Path) -> bool:
    """Whether whoever holds the lock, or held it last, serves a mount, or did, or is about to."""
    with suppress(OSError):
        return _note_at(path).isdecimal()
    return False


def _note_at(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _note(descriptor)
    finally:
        os.close(descriptor)


def _note(descriptor: int) -> str:
    return os.pread(descriptor, _NOTE_BYTES, 0).decode(errors="replace").strip()
