"""A real store with a real daemon for one test: made, mounted, killed, mounted again, and always cleared at the end."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from castore.cli.init import make_store
from castore.config import load_config
from castore.mountinfo import mount_at
from tests.places import Place

WAIT_SECONDS = 60.0
"""The longest that any test waits for something that takes well below a second."""

CONFIG = """\
[store]
state_dir = "{root}/state"
[cache]
dir = "{root}/cache"
seed = false  # what is read comes from a backend first
[ingest]
{ingest}
{section}
[routing]
default = "{backend_id}"
[http]
listen = "127.0.0.1:{port}"
"""

SECTION = """\
[backends.local]
type = "local"
path = "{root}/objects"
"""


def wait_until(done: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Poll until `done()` is true and return that; fail with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := done()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.01)
    return answer


@contextmanager
def fails(number: int, what: str = "") -> Iterator[None]:
    """The block must raise OSError with that errno, no other; `what` tells which of many blocks did not."""
    try:
        yield
    except OSError as exc:
        got = exc.errno or 0
        shown = f"{errno.errorcode.get(got, got)} instead of {errno.errorcode[number]}: {exc}"
        assert got == number, f"{what}: {shown}" if what else shown
    else:
        raise AssertionError(f"no error instead of {errno.errorcode[number]}: {what}")


def run_tool(*command: str | Path, **options: Any) -> str:
    """Run a program that must succeed; its standard output, as text."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, errors="surrogateescape", timeout=WAIT_SECONDS * 2, **options
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


class MountedStore:
    """`root` holds the configuration, the state, the backend `local` and the mountpoint `mnt`.

    With a `place`, the only backend is one of its type with the id `main`. The HTTP API is at `port`, by default any.
    """

    def __init__(self, root: Path, ingest: str = "", *, place: Place | None = None, port: int = 0) -> None:
        self.root = root
        self.config = root / "castore.toml"
        section = SECTION.format(root=root) if place is None else place.section("main")
        backend_id = "local" if place is None else "main"
        self.config.write_text(
            CONFIG.format(root=root, ingest=ingest, section=section, backend_id=backend_id, port=port)
        )
        self.mnt = root / "mnt"
        self.mnt.mkdir()
        self.state = root / "state"
        self.objects = root / "objects"
        self.pid = 0
        self.init()

    # commands

    def init(self) -> None:
        """Make what `castore init` makes, without a process of its own."""
        _, errors = make_store(load_config(self.config))
        assert not errors, errors

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`castore ARGUMENTS`, whatever its exit code; output captured as text."""
        command = [sys.executable, "-m", "castore.cli", "--config", str(self.config), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS * 2, **options)

    def castore(self, *arguments: str) -> str:
        """`castore ARGUMENTS` that must succeed; its standard output."""
        done = self.run(*arguments)
        assert done.returncode == 0, f"castore {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def status(self) -> dict[str, Any]:
        """What the daemon says of itself."""
        document: dict[str, Any] = json.loads((self.mnt / ".castore/status.json").read_text())
        return document

    # life cycle

    def mount(self, *options: str) -> None:
        """Mount in the background, ready when this returns."""
        answer = json.loads(self.castore("mount", str(self.mnt), "--background", "--json", *options))
        self.pid = answer["pid"]

    def umount(self) -> None:
        """Drain and unmount."""
        done = self.run("umount", str(self.mnt))
        assert done.returncode == 0, f"castore umount: {done.stdout}{done.stderr}{self.log()[-4000:]}"
        self.pid = 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the daemon and wait until it is gone; after SIGKILL a dead mount remains."""
        descriptor = os.pidfd_open(self.pid)
        os.kill(self.pid, number)
        wait_until(lambda: _has_ended(descriptor), "the daemon's end")
        os.close(descriptor)
        self.pid = 0

    def close(self) -> None:
        """Whatever state it is in: no daemon and no mount are left. Names a daemon's traceback as a failure."""
        if self.pid and Path(f"/proc/{self.pid}").exists():
            self.kill()
        while mount_at(self.mnt) is not None:
            subprocess.run(["fusermount3", "-uz", str(self.mnt)], check=True)

    def log(self) -> str:
        """The daemon's log."""
        path = self.state / "log/mount.log"
        return path.read_text() if path.exists() else ""

    # paths and packages

    def ingest(self, ref: str) -> Path:
        """The directory ingest/NAME/VERSION, made."""
        path = self.mnt / "ingest" / ref
        path.mkdir(parents=True, exist_ok=True)
        return path

    def package(self, ref: str) -> Path:
        """The path of packages/NAME/VERSION."""
        return self.mnt / "packages" / ref

    def publish(self, ref: str) -> Path:
        """Publish by rename, as people do; tries again while it is busy. Returns the package's path."""
        source, target = self.mnt / "ingest" / ref, self.package(ref)

        def try_publish() -> bool:
            try:
                source.rename(target)
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    raise
                return False
            return True

        wait_until(try_publish, f"publish of {ref}")
        return target

    def state_of(self, path: Path) -> str:
        """`user.castore.state` of a file in ingest/."""
        return os.getxattr(path, "user.castore.state").decode()

    def wait_stored(self, path: Path) -> None:
        """Until a file of ingest/ is stored."""
        wait_until(lambda: self.state_of(path) == "stored", f"{path} is stored")


def _has_ended(descriptor: int) -> bool:
    ends = select.poll()  # not `select`, which knows the first 1024 descriptors
    ends.register(descriptor, select.POLLIN)
    return bool(ends.poll(0))
