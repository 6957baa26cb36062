"""The locks of a state directory: one process at a time writes its workspace, one delivers its events.

Says who holds one, guards nothing more.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final, Literal

from castore.errors import StateLocked

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
        note = os.pread(descriptor, _NOTE_BYTES, 0).decode(errors="replace")
        os.close(descriptor)
        pid, _, kind = note.strip().partition(" ")
        kind = kind if kind in _MENDS else "delivery" if holder == "delivery" else "daemon"
        does = "runs" if kind == "delivery" else "writes"
        raise StateLocked(f"{state_dir}: another {kind} (pid {pid or 'unknown'}) {does} there; {_MENDS[kind]}") from exc
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}{'' if holder == 'daemon' else f' {holder}'}\n".encode(), 0)
    return descriptor
