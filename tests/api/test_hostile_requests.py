"""Requests that no honest client sends, over raw sockets, to the whole API: each is refused, and nothing changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from castore.api.http_api import HttpApi
from tests.api.http_client import Served, start
from tests.api.observed import observe
from tests.published import PublishedStore

CLOSE = b"Connection: close\r\n\r\n"
LOCAL = b"Host: localhost\r\nConnection: close\r\n"

REFUSED = {
    "a host in the target": (b"GET http://evil.example/health HTTP/1.1\r\n" + LOCAL + b"\r\n", 421),
    "a host before the path": (b"GET //evil.example/health HTTP/1.1\r\n" + LOCAL + b"\r\n", 421),
    "a name that leads here": (b"GET /health HTTP/1.1\r\nHost: rebound.example\r\n" + CLOSE, 421),
    "a user in the host": (b"GET /health HTTP/1.1\r\nHost: localhost@evil.example\r\n" + CLOSE, 421),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "a tunnel": (b"CONNECT localhost:22 HTTP/1.1\r\n" + LOCAL + b"\r\n", 405),
    "the server as a whole": (b"OPTIONS * HTTP/1.1\r\n" + LOCAL + b"\r\n", 405),
    "an unknown method": (b"FROBNICATE /health HTTP/1.1\r\n" + LOCAL + b"\r\n", 405),
    "a method in lower case": (b"get /health HTTP/1.1\r\n" + LOCAL + b"\r\n", 405),
    "a delete": (b"DELETE /v1/events HTTP/1.1\r\n" + LOCAL + b"\r\n", 405),
    "a form": (
        b"POST / HTTP/1.1\r\n"
        + LOCAL
        + b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: 3\r\n\r\na=b",
        413,
    ),
    "a body": (b"GET /health HTTP/1.1\r\n" + LOCAL + b"Content-Length: 1\r\n\r\nx", 413),
    "a body that waits": (
        b"GET /health HTTP/1.1\r\n" + LOCAL + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
        413,
    ),
    "a body in chunks": (b"GET / HTTP/1.1\r\n" + LOCAL + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", 413),
    "a negative length": (b"GET / HTTP/1.1\r\n" + LOCAL + b"Content-Length: -1\r\n\r\n", 400),
    "two lengths": (b"GET / HTTP/1.1\r\n" + LOCAL + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx", 400),
    "a strange coding": (b"GET / HTTP/1.1\r\n" + LOCAL + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "a zero byte in a header": (b"GET / HTTP/1.1\r\n" + LOCAL + b"X: a\x00b\r\n\r\n", 400),
    "a space before a colon": (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
    "a return in a target": (b"GET /\rX HTTP/1.1\r\n" + LOCAL + b"\r\n", 400),
    "a target in Latin-1": (b"GET /\xe9 HTTP/1.1\r\n" + LOCAL + b"\r\n", 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n" + LOCAL + b"\r\n", 405),
    "a thousand headers": (b"GET / HTTP/1.1\r\n" + LOCAL + b"X-Header: value\r\n" * 2000 + b"\r\n", 431),
    "a long target": (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n" + LOCAL + b"\r\n", 431),
    "a way up": (b"GET /../../etc/passwd HTTP/1.1\r\n" + LOCAL + b"\r\n", 404),
    "a hidden way up": (b"GET /style.css/%2e%2e/%2e%2e/page.py HTTP/1.1\r\n" + LOCAL + b"\r\n", 404),
    "a file beside the served ones": (b"GET /page.py HTTP/1.1\r\n" + LOCAL + b"\r\n", 404),
}


def everything_below(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of every file, but for what SQLite keeps beside a database that is read."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".db-shm"}


@pytest.fixture
async def served(store: PublishedStore, nursery: trio.Nursery) -> Served:
    return await start(nursery, HttpApi(await observe(store, nursery)).respond)


async def test_each_is_refused_and_nothing_changes(served: Served, store: PublishedStore) -> None:
    await store.publish("demo/1", {b"a": b"a"})
    before = everything_below(store.root)
    answers = {}
    for what, (request, _) in REFUSED.items():
        caller = await served.connect()
        async with caller.stream:
            await caller.send(request)
            answer = await caller.receive_raw()
        head, _, body = answer.partition(b"\r\n\r\n")
        answers[what] = int(head.split(b" ")[1])
        assert answer.count(b"HTTP/1.1 ") == 1, what  # one answer, whatever was hidden in the request
        assert body.startswith(b'{"title": '), what
    assert answers == {what: status for what, (_, status) in REFUSED.items()}
    assert (await served.get("/health")).status == 200
    assert everything_below(store.root) == before


async def test_every_answer_says_how_it_may_be_used(served: Served) -> None:
    for path in ("/", "/style.css", "/page.js", "/icon.svg", "/health", "/livez", "/metrics", "/v1/events", "/absent"):
        headers = (await served.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["cross-origin-resource-policy"] == "same-origin", path
        assert headers["cache-control"] == "no-store", path
        assert "access-control-allow-origin" not in headers, path
        assert "set-cookie" not in headers, path
