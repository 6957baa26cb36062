"""A TCP relay on loopback that can be cut: a server that is there, and a network that is not. Knows no protocol."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Final, Self

_PIECE: Final = 64 * 1024


class Relay:
    """Passes every connection to an address of this host on to a port of it, until it is cut. A context manager."""

    def __init__(self, target_port: int, *, host: str = "127.0.0.1") -> None:
        self._host = host
        self._target_port = target_port
        self._listening: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port = 0

    def __enter__(self) -> Self:
        self.restore()
        return self

    def __exit__(self, *exc: object) -> None:
        self.cut()

    def restore(self) -> None:
        """Listen, at the same port as before."""
        self._listening = socket.create_server((self._host, self.port))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def cut(self) -> None:
        """End all connections, and refuse new ones."""
        with self._lock:
            listening, self._listening = self._listening, None
            ended, self._open = self._open, set()
        for connection in (*ended, *([listening] if listening else ())):
            _end(connection)

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                caller = listening.accept()[0]
                with self._lock:
                    if self._listening is listening:
                        self._open.add(caller)
                        threading.Thread(target=self._carry, args=(caller,), daemon=True).start()
                        continue
                _end(caller)
                return

    def _carry(self, caller: socket.socket) -> None:
        """Serve one connection, in a thread of its own."""
        try:
            server = socket.create_connection(("127.0.0.1", self._target_port))
        except OSError:
            _end(caller)
            return
        with self._lock:
            is_cut = caller not in self._open
            if not is_cut:
                self._open.add(server)
        if is_cut:
            _end(server)
            return
        back = threading.Thread(target=_pass_on, args=(server, caller), daemon=True)
        back.start()
        _pass_on(caller, server)
        back.join()
        with self._lock:
            self._open -= {caller, server}
        _end(caller)
        _end(server)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    """One direction, until it ends; when it breaks, so does the other one."""
    with suppress(OSError):
        while data := source.recv(_PIECE):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
        return
    _end(source)
    _end(sink)


def _end(connection: socket.socket) -> None:
    """Wake whoever waits for it, and close it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
