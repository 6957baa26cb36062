"""Fixtures of the command line's tests: `castore` in a home of its own, a mounted store, a control socket."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import trio

import castore
from castore.api.control import Handler, serve_control
from tests.mount.store import MountedStore

ROOT = Path(castore.__file__).parents[1]
WAIT_SECONDS = 60.0


class Cli:
    """Runs `castore` with all of the user's folders below `home`, and no configuration but what is there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.command = [sys.executable, "-m", "castore.cli"]
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith(("CASTORE_", "XDG_"))}
        self.environ |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}

    def __call__(
        self, *arguments: object, code: int = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end; the exit code must be `code`."""
        done = subprocess.run(
            [*self.command, *map(str, arguments)],
            cwd=self.home,
            env=env or self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_SECONDS,
        )
        assert done.returncode == code, f"{done.args}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def error(self, *arguments: object, env: Mapping[str, str] | None = None) -> str:
        """Run it, expect exit code 2 and one line of error, and return that line without its prefix."""
        done = self(*arguments, code=2, env=env)
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("castore: error: ")
        return done.stderr.removeprefix("castore: error: ").rstrip("\n")

    def start(
        self,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> subprocess.Popen[str]:
        """Start it and leave it running."""
        return subprocess.Popen(
            [*self.command, *map(str, arguments)],
            cwd=self.home,
            env=env or self.environ,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )


def read_terminal(terminal: int, look: Callable[[str], None] = lambda _: None) -> str:
    """All that is written to a terminal until nobody has its other end open. It is closed then.

    `look` is given what came so far, whenever something came: so a command can be made to wait until it was seen.
    """
    received = b""
    try:
        while data := os.read(terminal, 65536):
            received += data
            look(received.decode(errors="replace"))
    except OSError as exc:
        if exc.errno != errno.EIO:  # what Linux gives at the end
            raise
    finally:
        os.close(terminal)
    return received.decode()


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    home = tmp_path / "home"
    home.mkdir()
    return Cli(home)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MountedStore]:
    """A real store, mounted by a real daemon."""
    made = MountedStore(tmp_path)
    try:
        made.mount()
        yield made
    finally:
        made.close()


Serve = Callable[[Path, Mapping[str, Handler]], None]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answers commands at a socket from a thread, in the place of a daemon, until the test ends."""
    with contextlib.ExitStack() as stack:

        def start(path: Path, handlers: Mapping[str, Handler]) -> None:
            ready = threading.Event()
            scope = trio.CancelScope()
            tokens: list[trio.lowlevel.TrioToken] = []

            async def main() -> None:
                tokens.append(trio.lowlevel.current_trio_token())
                with scope:
                    async with trio.open_nursery() as nursery:
                        await nursery.start(serve_control, path, handlers)
                        ready.set()

            thread = threading.Thread(target=trio.run, args=(main,))
            thread.start()

            def stop() -> None:
                tokens[0].run_sync_soon(scope.cancel)
                thread.join(WAIT_SECONDS)

            assert ready.wait(WAIT_SECONDS)
            stack.callback(stop)

        yield start
