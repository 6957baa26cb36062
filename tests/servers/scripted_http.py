"""An HTTP server on loopback that answers what a test tells it, for answers that no real server gives on demand."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final
from urllib.parse import parse_qs, urlsplit

import trio
from trio.abc import Stream

_READ_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came over the wire. Names of headers are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters, the last of each name."""
        return {
            name: values[-1] for name, values in parse_qs(urlsplit(self.target).query, keep_blank_values=True).items()
        }


@dataclass(slots=True)
class ScriptedHTTP:
    """What is known of a running server: where it is, and what it was asked so far."""

    endpoint_url: str = ""
    requests: list[Request] = field(default_factory=list)


Handler = Callable[[Request, Stream], Awaitable[None]]
"""Answers one request by sending bytes to the stream; the connection is closed afterwards."""


@asynccontextmanager
async def serving(handler: Handler, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[ScriptedHTTP]:
    """A server that has the handler answer each request, on a connection of its own; over TLS with `tls`."""
    server = ScriptedHTTP()

    async def serve(plain: trio.SocketStream) -> None:
        stream = trio.SSLStream(plain, tls, server_side=True, https_compatible=True) if tls else plain
        async with stream:
            try:
                request = await _read_request(stream)
                server.requests.append(request)
                await handler(request, stream)
            except (trio.BrokenResourceError, EOFError):  # the client left
                pass

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        server.endpoint_url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.socket.getsockname()[1]}"
        yield server
        nursery.cancel_scope.cancel()


def answer(status: int = 200, body: bytes = b"", **headers: str) -> bytes:
    """A whole answer. `content_length="..."` and so on override; an empty value leaves the header out."""
    fields = {"content-length": str(len(body)), "connection": "close"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} as told", *(f"{name}: {value}" for name, value in fields.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _read_request(stream: Stream) -> Request:
    data = b""
    while b"\r\n\r\n" not in data:
        data += await _receive(stream)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("expect") == "100-continue":
        await stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
    parts = [body]
    left = int(headers.get("content-length", "0")) - len(body)
    while left > 0:
        parts.append(await _receive(stream))
        left -= len(parts[-1])
    return Request(method, target, headers, b"".join(parts))


async def _receive(stream: Stream) -> bytes:
    data = bytes(await stream.receive_some(_READ_BYTES))
    if not data:
        raise EOFError
    return data
