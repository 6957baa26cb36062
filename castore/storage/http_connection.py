"""One HTTP connection on trio, plain or TLS: bytes out, and bytes straight into a caller's buffer. Knows no HTTP.

Sockets of the standard library, not trio's streams: `recv_into` a large buffer is what makes a get cheap, and a trio
stream gives out fresh bytes for each piece.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

YIELD_BYTES: Final = 1 << 20
"""Bytes moved without a wait before other tasks get a turn: 0.2 ms plain, 0.7 ms over TLS."""


class TransferError(Exception):
    """An exchange with a server failed below HTTP's own answers. `__cause__` is what the system said, if it did."""


class CannotConnect(TransferError):
    """No connection comes about."""


class ConnectTimeout(CannotConnect):
    """Nor does it fail, for longer than the timeout."""


class UnsafeConnection(TransferError):
    """A connection comes about, but TLS does not: the certificate, or the server speaks something else."""


class ConnectionBroke(TransferError):
    """The connection ended, or what came over it is not HTTP."""


class NoAnswer(TransferError):
    """Silence for longer than the timeout."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens. `tls` is None for plain HTTP; else the certificate has to be for `host`."""

    host: str
    port: int
    tls: ssl.SSLContext | None


class Connection:
    """An open connection. Any error, and cancelling, leaves it fit for nothing but `close`."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._moved_bytes = 0
        self.idle_since = 0.0

    @classmethod
    async def open(cls, endpoint: Endpoint, *, connect_timeout_s: float, timeout_s: float) -> Connection:
        """Connect, to whichever of the host's addresses answers first. Raises TransferError."""
        with trio.move_on_after(connect_timeout_s):
            try:
                stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
            except OSError as exc:
                raise CannotConnect(str(exc)) from _first(exc)
            sock = socket.socket(fileno=stream.socket.detach())
            sock.setblocking(False)
            try:
                if endpoint.tls is not None:
                    sock = await _start_tls(sock, endpoint.tls, endpoint.host)
            except BaseException:
                sock.close()
                raise
            return cls(sock, timeout_s)
        raise ConnectTimeout(f"no connection within {connect_timeout_s:.1f} s")

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of it. Raises ConnectionBroke, or NoAnswer when the server takes nothing for too long."""
        # The views are released here, whatever happens: else the traceback of a cancellation would hold the buffer.
        with memoryview(data) as view:
            sent = 0
            while sent < len(view):
                with view[sent:] as rest:
                    sent += await self._do(partial(self._sock.send, rest), trio.lowlevel.wait_writable)

    async def receive_into(self, view: memoryview) -> int:
        """Some bytes into `view`, which is not empty; how many, and 0 at the connection's end.

        Raises ConnectionBroke, or NoAnswer when nothing comes for too long.
        """
        return await self._do(partial(self._sock.recv_into, view), trio.lowlevel.wait_readable)

    async def answer_begins(self) -> None:
        """Wait until the server says something, or ends the connection. Raises NoAnswer as `receive_into` does."""
        if not isinstance(self._sock, ssl.SSLSocket) or not self._sock.pending():
            await self._wait(trio.lowlevel.wait_readable)

    def is_stale(self) -> bool:
        """Whether the server ended it, or spoke out of turn, while nothing was asked of it."""
        try:
            self._sock.recv(1)  # over TLS, this takes in the session tickets that a server sends after the handshake
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            pass
        return True

    def close(self) -> None:
        self._sock.close()

    async def _do(self, step: Callable[[], int], wait: Callable[[socket.socket], Awaitable[None]]) -> int:
        while True:
            try:
                count = step()
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
                if isinstance(exc, ssl.SSLWantReadError):
                    wait = trio.lowlevel.wait_readable
                elif isinstance(exc, ssl.SSLWantWriteError):
                    wait = trio.lowlevel.wait_writable
                await self._wait(wait)
            except OSError as exc:
                raise ConnectionBroke(str(exc)) from exc
            else:
                self._moved_bytes += count
                if self._moved_bytes >= YIELD_BYTES:
                    self._moved_bytes = 0
                    await trio.lowlevel.checkpoint()
                return count

    async def _wait(self, wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        self._moved_bytes = 0
        with trio.move_on_after(self._timeout_s):
            await wait(self._sock)
            return
        raise NoAnswer(f"silence for {self._timeout_s:.1f} s")


async def _start_tls(sock: socket.socket, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    try:
        tls = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    except ssl.SSLError as exc:
        raise UnsafeConnection(str(exc)) from exc
    except OSError as exc:  # it ended already
        raise ConnectionBroke(str(exc)) from exc
    try:
        while True:
            try:
                tls.do_handshake()
                return tls
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(tls)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(tls)
    except ssl.SSLError as exc:
        tls.close()
        raise UnsafeConnection(str(exc)) from exc
    except OSError as exc:
        tls.close()
        raise ConnectionBroke(str(exc)) from exc
    except BaseException:
        tls.close()
        raise


def _first(exc: OSError) -> BaseException:
    """What connecting to the first address said: trio wraps the errors of all of them."""
    cause: BaseException = exc.__cause__ or exc
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause
