"""The daemon's side of its control socket: accepts calls and runs handlers. Knows no command itself.

The protocol is written down in `castore.api.control_client`. No caller can harm the daemon or another caller: requests
are short and have a deadline, answers are sent beside the handler, and callers are few.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import trio

from castore.api.control_client import HEARTBEAT_SECONDS, REQUEST_MAX_BYTES, peer_credentials, socket_address
from castore.errors import AccessDenied, CastoreError, StateError

Report = Callable[[dict[str, Any]], Awaitable[None]]
"""Tells the caller how far a command is. Never waits for the caller; of reports in quick succession the last counts."""

Handler = Callable[[dict[str, Any], Report], Awaitable[dict[str, Any]]]
"""Runs a command: gets the request without `command`, returns the result or raises CastoreError.

It is cancelled when the caller goes away, so what must not be left half done it shields itself.
"""

MAX_CALLERS: Final = 32
"""People and jobs that wait for a publish at the same time; each costs a task and a socket."""
REQUEST_DEADLINE_SECONDS: Final = 10.0
SEND_DEADLINE_SECONDS: Final = 5.0
"""A caller that takes no line for so long is given up. Sends are shielded, so it bounds what shutdown waits, too."""

_log = logging.getLogger(__name__)


async def serve_control(
    path: Path,
    handlers: Mapping[str, Handler],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `handlers`, by command, at the unix socket `path` until cancelled; started once callers can connect.

    Makes the folder of `path` if need be, with mode 0700, and removes the socket at the end. Replaces whatever socket
    was left at `path`: the caller holds the lock of the state directory, so nobody listens there.
    Raises StateError when the socket cannot be made.
    """
    with _listen(path) as listening:
        callers = trio.CapacityLimiter(MAX_CALLERS)

        async def serve(stream: trio.SocketStream) -> None:
            await _serve_caller(stream, handlers, callers)

        task_status.started()
        await trio.serve_listeners(serve, [trio.SocketListener(trio.socket.from_stdlib_socket(listening))])


@contextlib.contextmanager
def _listen(path: Path) -> Iterator[socket.socket]:
    """A socket that listens at `path` inside the `with` block."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        path.unlink(missing_ok=True)
        # On Linux the file that bind makes takes the mode of the socket: no moment at which others could connect.
        os.fchmod(listening.fileno(), 0o600)
        with socket_address(path) as address:
            listening.bind(address)
        listening.listen(MAX_CALLERS)
    except OSError as exc:
        listening.close()
        raise StateError(f"{path}: cannot make the control socket: {exc.strerror}") from exc
    with listening:
        try:
            yield listening
        finally:
            path.unlink(missing_ok=True)


async def _serve_caller(
    stream: trio.SocketStream, handlers: Mapping[str, Handler], callers: trio.CapacityLimiter
) -> None:
    # `except*`: an exception that left here, alone or in a group, would end the daemon.
    try:
        async with stream:
            try:
                callers.acquire_nowait()
            except trio.WouldBlock:
                await _send_error(stream, StateError(f"{MAX_CALLERS} calls are under way already: try again later"))
                return
            try:
                await _serve_call(stream, handlers)
            finally:
                callers.release()
    except* trio.BrokenResourceError:
        pass  # The caller went away: nobody is left to tell.
    except* Exception:
        _log.exception("serving a control call failed unexpectedly")


async def _serve_call(stream: trio.SocketStream, handlers: Mapping[str, Handler]) -> None:
    _, uid = peer_credentials(stream.socket)
    if uid not in (0, os.geteuid()):
        await _send_error(stream, AccessDenied("only the user that runs the daemon, or root, may control it"))
        return
    try:
        request = await _receive_request(stream)
        command = request.pop("command", None)
        if not isinstance(command, str) or command not in handlers:
            raise CastoreError(f"unknown command {command!r:.100}; this daemon knows: {', '.join(sorted(handlers))}")
    except CastoreError as exc:
        await _send_error(stream, exc)
        return
    await _Answer(stream).run(handlers[command], request)


async def _receive_request(stream: trio.SocketStream) -> dict[str, Any]:
    received = bytearray()
    with trio.move_on_after(REQUEST_DEADLINE_SECONDS):
        while b"\n" not in received:
            if len(received) > REQUEST_MAX_BYTES:
                raise CastoreError(f"the request is longer than {REQUEST_MAX_BYTES} bytes")
            data = await stream.receive_some(REQUEST_MAX_BYTES)
            if not data:
                break
            received += data
    line, newline, _ = received.partition(b"\n")
    if not newline:
        raise CastoreError("the request is not a whole line")
    try:
        request = json.loads(line.decode())
    except (ValueError, RecursionError):
        request = None
    if not isinstance(request, dict):
        raise CastoreError("the request is not a JSON object")
    return request


class _Answer:
    """The lines that one caller gets. A handler runs beside the sending, so a slow caller never holds it up."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._changed = trio.Event()
        self._progress: dict[str, Any] = {}
        self._final: dict[str, Any] | None = None

    async def run(self, handler: Handler, params: dict[str, Any]) -> None:
        """Run the handler, send its progress as it comes and at each heartbeat, then its end.

        Cancels the handler and raises BrokenResourceError, in a group, when the caller is gone.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_handler, handler, params)
            try:
                while self._final is None:
                    with trio.move_on_after(HEARTBEAT_SECONDS):
                        await self._changed.wait()
                    if self._final is None:
                        self._changed = trio.Event()
                        await _send(self._stream, {"progress": self._progress})
            finally:
                # Also when cancelled: `umount` ends the daemon, and its caller still gets the answer.
                if self._final is not None:
                    await _send(self._stream, self._final)

    async def _run_handler(self, handler: Handler, params: dict[str, Any]) -> None:
        try:
            final = {"result": await handler(params, self._report)}
            json.dumps(final)
        except CastoreError as exc:
            final = _error_line(exc)
        except Exception:
            _log.exception("a control command failed unexpectedly")
            final = _error_line(CastoreError("the daemon failed unexpectedly: its log says more"))
        self._final = final
        self._changed.set()

    async def _report(self, progress: dict[str, Any]) -> None:
        self._progress = dict(progress)
        self._changed.set()
        await trio.lowlevel.checkpoint()


async def _send(stream: trio.SocketStream, line: dict[str, Any]) -> None:
    """Send one line. Raises BrokenResourceError when the caller is gone or takes no line within the deadline."""
    # Shielded: half a line would make the next one unreadable.
    with trio.move_on_after(SEND_DEADLINE_SECONDS, shield=True) as scope:
        await stream.send_all(json.dumps(line).encode() + b"\n")
    if scope.cancelled_caught:
        raise trio.BrokenResourceError("the caller takes no lines")


async def _send_error(stream: trio.SocketStream, error: CastoreError) -> None:
    await _send(stream, _error_line(error))


def _error_line(error: CastoreError) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error), "temporary": error.temporary}}
