"""Daemons in the foreground, and what a process takes, for the tests of the daemon's life."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from castore.mountinfo import mount_at
from tests.mount.store import MountedStore, wait_until

STOP_SECONDS = 30.0
"""What a daemon may take to end after a signal."""


@contextmanager
def foreground(store: MountedStore) -> Iterator[subprocess.Popen[str]]:
    """A daemon in the foreground, mounted; ended at the end if it still runs."""
    command: list[str | Path] = [sys.executable, "-m", "castore.cli", "--config", store.config, "mount", store.mnt]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: mount_at(store.mnt) or process.poll() is not None, "the mount is there")
            assert process.poll() is None, process.communicate()[1]
            yield process
        finally:
            process.kill()


def ended_cleanly(process: subprocess.Popen[str], store: MountedStore) -> str:
    """The daemon ends by itself in time, with 0 and without its mount; what it said."""
    said = process.communicate(timeout=STOP_SECONDS)[1]
    assert process.returncode == 0, said
    assert mount_at(store.mnt) is None
    assert "Traceback" not in said, said
    return said


@contextmanager
def descriptor(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    """An open file whose daemon may die or end: then closing it fails, too."""
    number = os.open(path, flags)
    try:
        yield number
    finally:
        with suppress(OSError):
            os.close(number)


def cpu_ticks(pid: int) -> int:
    """What a process has used of the processors, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def state_of(pid: int) -> str:
    """`R` for a process that runs, `S` or `D` for one that waits."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def resident_kib(pid: int) -> int:
    """The memory that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])
