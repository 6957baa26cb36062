"""An HTTP client that shows everything: one connection, requests as bytes, answers as they came."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h11
import trio

from castore.api.http_server import Request, Response, open_listener, serve_http


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. Names of headers are in lower case."""

    status: int
    reason: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Caller:
    """A connection to a server on this host."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._h11 = h11.Connection(h11.CLIENT)

    async def get(self, target: str, *, method: str = "GET", host: str | None = "localhost") -> Answer:
        """One request that is as it should be, and its answer."""
        headers = [] if host is None else [("Host", host)]
        await self._send(h11.Request(method=method, target=target, headers=headers))
        await self._send(h11.EndOfMessage())
        answer = await self.receive()
        if {self._h11.our_state, self._h11.their_state} == {h11.DONE}:
            self._h11.start_next_cycle()
        return answer

    async def _send(self, event: h11.Request | h11.EndOfMessage) -> None:
        await self.stream.send_all(self._h11.send(event) or b"")

    async def send(self, data: bytes) -> None:
        """Bytes that are not as they should be; call `receive_raw` for the answer."""
        await self.stream.send_all(data)

    async def receive(self) -> Answer:
        """The next whole answer."""
        head: h11.Response | None = None
        body = bytearray()
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                self._h11.receive_data(await self.stream.receive_some())
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                headers = {name.decode(): value.decode() for name, value in head.headers}
                return Answer(head.status_code, bytes(head.reason).decode(), headers, bytes(body))

    async def receive_raw(self) -> bytes:
        """Everything until the server ends the connection."""
        data = bytearray()
        while piece := await self.stream.receive_some():
            data += piece
        return bytes(data)


class Served:
    """A running server."""

    def __init__(self, listening: socket.socket) -> None:
        self.port: int = listening.getsockname()[1]

    async def connect(self) -> Caller:
        return Caller(await trio.open_tcp_stream("127.0.0.1", self.port))

    async def get(self, target: str) -> Answer:
        """One request on a connection of its own."""
        caller = await self.connect()
        async with caller.stream:
            return await caller.get(target)


async def start(nursery: trio.Nursery, respond: Callable[[Request], Awaitable[Response]]) -> Served:
    """Serve in a nursery, at a port of its own."""
    listening = open_listener("127.0.0.1", 0)
    await nursery.start(serve_http, listening, respond)
    return Served(listening)
