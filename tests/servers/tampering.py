"""A server that does one thing differently: a real one behind it, and a test's function in between."""

from __future__ import annotations

import http.client
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import urlsplit

import trio
from trio.abc import Stream

from tests.servers.scripted_http import Request, ScriptedHTTP, answer, serving

_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer. Names of headers are in lower case."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def but(self, *, status: int | None = None, body: bytes | None = None, **headers: str) -> Answered:
        """The same with another status, body or headers (`content_range="..."`)."""
        changed = {**dict(self.headers), **{name.replace("_", "-"): value for name, value in headers.items()}}
        if body is not None:
            changed["content-length"] = str(len(body))
        return replace(
            self,
            status=self.status if status is None else status,
            body=self.body if body is None else body,
            headers=tuple(changed.items()),
        )


Forward = Callable[[Request], Awaitable[Answered]]
Tamper = Callable[[Request, Forward], Awaitable[Answered]]
"""Answers a request, by way of the real server or not."""


@asynccontextmanager
async def tampering(endpoint_url: str, tamper: Tamper) -> AsyncIterator[ScriptedHTTP]:
    """A server that answers as `tamper` says; requests reach the real one as they were signed."""

    async def forward(request: Request) -> Answered:
        return await trio.to_thread.run_sync(partial(_forward, endpoint_url, request))

    async def handle(request: Request, stream: Stream) -> None:
        answered = await tamper(request, forward)
        headers = {name: value for name, value in answered.headers if name not in _HOP_BY_HOP}
        await stream.send_all(answer(answered.status, answered.body, **headers))

    async with serving(handle) as server:
        yield server


def _forward(endpoint_url: str, request: Request) -> Answered:
    connection = http.client.HTTPConnection(urlsplit(endpoint_url).netloc, timeout=30)
    try:
        connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name not in _HOP_BY_HOP:
                connection.putheader(name, value)
        with suppress(ConnectionError):  # it may refuse a body before it has read it, and hang up
            connection.endheaders(request.body)
        got = connection.getresponse()
        body = got.read()
        headers = {name.lower(): value for name, value in got.getheaders()}
        if request.method != "HEAD":
            headers["content-length"] = str(len(body))
        return Answered(got.status, tuple(headers.items()), body)
    finally:
        connection.close()
