"""The caller's side of a daemon's control socket, on the standard library alone so that commands start fast.

The protocol, over a unix stream socket, one call for each connection; all lines are JSON objects:

    -> {"command": "publish", "ref": "zlib/1.3"}
    <- {"progress": {"stored_bytes": 4096, "total_bytes": 8192}}        any number of times
    <- {"result": {...}}   or   {"error": {"type": "PublishBusy", "message": "one line", "temporary": true}}

While a command runs, its last progress comes at least every `HEARTBEAT_SECONDS`, so silence means a daemon that hangs.
A caller that closes the connection gives the command up.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from castore.errors import AccessDenied, CastoreError, DeadlineExceeded, StateError, named

HEARTBEAT_SECONDS: Final = 1.0
"""Also how soon a daemon notices that a caller went away."""
REQUEST_MAX_BYTES: Final = 64 * 1024
"""No command needs more than a reference and a few numbers."""
ANSWER_MAX_BYTES: Final = 16 * 1024 * 1024
"""Bounds what a caller holds of one line; a status document is some kilobytes."""
SILENCE_SECONDS: Final = 30.0
"""How long a caller waits for the next line: far above the heartbeat, since a busy host is not a dead daemon."""


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """An address for `path` that is short enough to bind or connect, valid inside the `with` block.

    unix(7) allows 107 bytes, a path may have 4095: the address goes through a descriptor of the folder.
    Raises OSError when the folder cannot be opened.
    """
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def peer_credentials(connection: Any) -> tuple[int, int]:
    """The process id and the user id at the other end of a unix socket, as the kernel recorded them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return pid, uid


class ControlClient:
    """Calls the daemon that listens at `path`, `run/control.sock` of a state directory. Opens nothing until called."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def state_dir(self) -> Path:
        """The state directory that the socket belongs to."""
        return self._path.parent.parent

    def call(
        self,
        command: str,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        timeout: float = SILENCE_SECONDS,
        within: float | None = None,
        **params: Any,
    ) -> dict[str, Any]:
        """Run a command in the daemon and return its result.

        `timeout` bounds the seconds without a line from the daemon, `within` those of the whole call, None for no
        bound. Raises StateError when no daemon listens or it ends before it answers, AccessDenied when the caller
        may not, DeadlineExceeded when either bound passes, and otherwise the CastoreError that the daemon names.
        """
        request = json.dumps({**params, "command": command}).encode() + b"\n"
        if len(request) > REQUEST_MAX_BYTES:
            raise CastoreError(f"the request {command!r} is longer than {REQUEST_MAX_BYTES} bytes")
        until = math.inf if within is None else time.monotonic() + within
        with self._connect(timeout if within is None else min(timeout, within)) as connection:
            # A daemon that refuses the caller closes before it reads; why is still to be read.
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(request)
            with connection.makefile("rb") as lines:
                while True:
                    connection.settimeout(max(0.001, min(timeout, until - time.monotonic())))
                    answer = self._read_answer(lines)
                    if "result" in answer:
                        return answer["result"]
                    if "error" in answer:
                        raise error_of(answer["error"])
                    if on_progress is not None:
                        on_progress(answer["progress"])

    def daemon_pid(self) -> int:
        """The process that listens. Raises StateError when there is none; 0 when it cannot be seen from here."""
        with self._connect(SILENCE_SECONDS) as connection:
            return peer_credentials(connection)[0]

    def _connect(self, timeout: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            with socket_address(self._path) as address:
                connection.connect(address)
        except BaseException as exc:
            connection.close()
            if isinstance(exc, FileNotFoundError | NotADirectoryError | ConnectionRefusedError):
                raise StateError(f"no daemon is running for {self.state_dir}") from exc
            if isinstance(exc, PermissionError):
                raise AccessDenied(f"{self._path}: only the user that runs the daemon, or root, may use it") from exc
            if isinstance(exc, TimeoutError):
                raise DeadlineExceeded(f"the daemon of {self.state_dir} does not accept connections") from exc
            if isinstance(exc, OSError):
                raise StateError(f"{self._path}: cannot connect: {exc.strerror}") from exc
            raise
        return connection

    def _read_answer(self, lines: BinaryIO) -> dict[str, dict[str, Any]]:
        """The next line, an object with exactly one of `progress`, `result` and `error`, itself an object."""
        try:
            line = lines.readline(ANSWER_MAX_BYTES)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"the daemon of {self.state_dir} does not answer in time") from exc
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise StateError(f"the daemon of {self.state_dir} ended before it answered")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict):
            kinds = {"progress", "result", "error"} & answer.keys()
            if len(kinds) == 1 and isinstance(answer[kinds.pop()], dict):
                return answer
        raise StateError(f"{self._path}: what listens there does not speak castore's control protocol")


def error_of(answer: dict[str, Any]) -> CastoreError:
    """The exception that an `error` object names; CastoreError itself for a name that this version does not know."""
    return named(str(answer.get("type")), str(answer.get("message", "the daemon gave no reason")))
