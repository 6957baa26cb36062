"""A machine whose power can be cut: a forgetful disk, and a store whose state and objects lie on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from castore.mountinfo import mount_at
from tests.mount.store import WAIT_SECONDS, wait_until

CONFIG = """\
[store]
state_dir = "{disk}/state"
[cache]
dir = "{root}/cache"
[backends.local]
type = "local"
path = "{disk}/objects"
[routing]
default = "local"
[http]
listen = "127.0.0.1:0"
"""


class Machine:
    """Start it, use `mnt`, cut its power, start it again. `deaf` and `seed` are the disk's."""

    def __init__(self, root: Path, *, deaf: str = "", seed: int | None = None) -> None:
        self.root = root
        self.disk, self.mnt = root / "disk", root / "mnt"
        self._image = root / "image"
        self._options = [f"--deaf={deaf}"] + ([] if seed is None else [f"--seed={seed}"])
        self._disk: subprocess.Popen[bytes] | None = None
        self._daemon = 0
        for folder in (self.disk, self.mnt):
            folder.mkdir(parents=True)
        (root / "castore.toml").write_text(CONFIG.format(root=root, disk=self.disk))

    def castore(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command, whatever its exit code."""
        command = [sys.executable, "-m", "castore.cli", "--config", str(self.root / "castore.toml"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS * 2)

    def start_disk(self) -> None:
        """Mount the disk with what is durable on it."""
        command = [sys.executable, "-m", "tests.power.disk", str(self.disk), str(self._image), *self._options]
        with (self.root / "disk.log").open("ab") as log:
            self._disk = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(lambda: mount_at(self.disk) is not None, "the disk is mounted")

    def start(self) -> subprocess.CompletedProcess[str]:
        """Mount the store; what `castore mount` said."""
        done = self.castore("mount", str(self.mnt), "--background", "--json")
        if done.returncode == 0:
            self._daemon = json.loads(done.stdout)["pid"]
        return done

    def cut_power(self) -> None:
        """The daemon and the disk stop in the same moment: nothing is flushed."""
        if self._daemon:
            descriptor = os.pidfd_open(self._daemon)
            os.kill(self._daemon, signal.SIGKILL)
            wait_until(lambda: not _runs(self._daemon), "the daemon is dead")
            os.close(descriptor)
            self._daemon = 0
        self._take_away(self.mnt)
        if self._disk is not None:
            self._disk.terminate()
            self._disk.wait(WAIT_SECONDS)
            self._disk = None
        self._take_away(self.disk)

    def synced(self) -> list[str]:
        """Every path that was synced, in order, with repetitions; `/` is the disk's root."""
        return self._image.with_suffix(".log").read_text().splitlines()

    @staticmethod
    def _take_away(path: Path) -> None:
        while mount_at(path) is not None:
            subprocess.run(["fusermount3", "-uz", str(path)], check=True)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.cut_power()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
