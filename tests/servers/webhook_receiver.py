"""An HTTP receiver of webhooks on loopback, in threads: it checks signatures, and fails as it is told to.

It knows nothing of castore: what it checks is the specification of Standard Webhooks and of CloudEvents batches.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, cast

WAIT_SECONDS: Final = 60.0

Behaviour = Callable[["_Handler"], None]


@dataclass(frozen=True, slots=True)
class Got:
    """One request whose signature is right."""

    message_id: str
    path: str
    events: list[dict[str, Any]]
    headers: dict[str, str]

    @property
    def sequences(self) -> list[int]:
        return [int(event["sequence"]) for event in self.events]


def status(code: int, **headers: str) -> Behaviour:
    """Answers that."""

    def answer(handler: _Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def half(handler: _Handler) -> None:
    """Says 200, and hangs up within the body."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly so much")
    handler.hang_up()


def hang_up(handler: _Handler) -> None:
    """Says nothing."""
    handler.hang_up()


def slow(handler: _Handler) -> None:
    """Says a byte, and then nothing until the receiver ends."""
    handler.wfile.write(b"H")
    handler.receiver.ending.wait(WAIT_SECONDS)
    handler.hang_up()


TAKE: Final = status(204)


@dataclass
class WebhookReceiver:
    """`got` are all requests with a right signature, `taken` those that were answered 2xx; `bad` counts wrong ones."""

    secret: bytes = b"s3cret of the tests"
    tls: ssl.SSLContext | None = None
    port: int = 0
    script: list[Behaviour] = field(default_factory=list)
    """What the next requests meet, one each; then they are taken."""
    got: list[Got] = field(default_factory=list)
    taken: list[Got] = field(default_factory=list)
    bad: int = 0
    ending: threading.Event = field(default_factory=threading.Event)
    turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/in/T0PS3CRETPATH"

    def sequences(self) -> list[int]:
        """Of all events that were taken, as they came."""
        return [number for got in list(self.taken) for number in got.sequences]

    @contextmanager
    def running(self) -> Iterator[WebhookReceiver]:
        """Listens in the block, at the same port each time."""
        self.ending.clear()
        server = _Server(self)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.ending.set()
            server.shutdown()
            server.server_close()
            thread.join(WAIT_SECONDS)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    allow_reuse_address = True

    def __init__(self, receiver: WebhookReceiver) -> None:
        self.receiver = receiver
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", receiver.port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, address = super().get_request()
        if self.receiver.tls is not None:
            try:
                sock = self.receiver.tls.wrap_socket(sock, server_side=True)
            except OSError:
                sock.close()
                raise  # the server takes the next one
        self._open.add(sock)
        return sock, address

    def shutdown(self) -> None:
        super().shutdown()
        for sock in list(self._open):  # those that wait for another request
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hangs up is no error of the receiver."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def receiver(self) -> WebhookReceiver:
        return cast(_Server, self.server).receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        receiver = self.receiver
        with receiver.turn:
            if not self._is_signed(body):
                receiver.bad += 1
                return status(401)(self)
            headers = {name.lower(): value for name, value in self.headers.items()}
            got = Got(headers["webhook-id"], self.path, json.loads(body), headers)
            behaviour = receiver.script.pop(0) if receiver.script else TAKE
            if behaviour is TAKE:
                receiver.taken.append(got)
            receiver.got.append(got)
        behaviour(self)

    def do_GET(self) -> None:
        """Whoever follows a redirect comes here."""
        self.receiver.bad += 1
        status(200)(self)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _is_signed(self, body: bytes) -> bool:
        signed = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(self.receiver.secret, signed, hashlib.sha256).digest()).decode()
        return hmac.compare_digest(self.headers["webhook-signature"], f"v1,{expected}")

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""
