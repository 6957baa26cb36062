"""Whatever bytes a caller sends: an answer that is one, never a failure inside, and nothing changes. Fuzzed."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from castore.api.http_api import HttpApi
from tests.api.http_client import Served, start
from tests.api.observed import observe
from tests.api.test_hostile_requests import everything_below
from tests.places import LocalPlace
from tests.published import PublishedStore

WAIT_SECONDS = 30.0
ANSWERED = {200, 304, 400, 404, 405, 413, 421, 431, 501, 503}
PATHS = ["/", "/health", "/livez", "/readyz", "/metrics", "/v1/events", "/style.css", "/v1/", "/.castore", "*"]
KEYS = ["after", "limit", "wait", "type", "since", "types", "format"]
VALUES = [
    "",
    "0",
    "-1",
    "1e9",
    "nan",
    "inf",
    "9" * 40,
    "v1.*",
    "[",
    "\0",
    "\ud800",
    "'--",
    "%",
    "²",
    "1_000",
    " 1",
    "٣",
]

texts = st.sampled_from(VALUES) | st.text(max_size=12)
queries = st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=5), texts), max_size=3).map(
    lambda pairs: "&".join(f"{escaped(key)}={escaped(value)}" for key, value in pairs)
)
targets = st.tuples(st.sampled_from(PATHS) | st.text(max_size=10).map(lambda text: "/" + escaped(text)), queries)
header_lines = st.lists(
    st.sampled_from(
        [
            *(b"Host: localhost", b"Host: evil.example", b"Host: [::1", b"Connection: close", b"Connection: upgrade"),
            *(b"Content-Length: 5", b"Content-Length: +1", b"Transfer-Encoding: chunked", b"Expect: 100-continue"),
            *(b"Upgrade: websocket", b"If-None-Match: *", b"Accept: \xff", b" folded", b"Last-Event-ID: x"),
        ]
    )
    | st.binary(max_size=20),
    max_size=4,
)
requests = st.builds(
    lambda method, target, version, headers, body: (
        b"%s %s?%s %s\r\n" % (method, target[0].encode(), target[1].encode(), version)
        + b"".join(line + b"\r\n" for line in headers)
        + b"\r\n"
        + body
    ),
    st.sampled_from([b"GET", b"HEAD", b"POST", b"get", b"", b"G T"]),
    targets,
    st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"", b"HTTP/1.1 "]),
    header_lines | st.just([b"Host: localhost"]),
    st.binary(max_size=20),
)


def escaped(text: str) -> str:
    return quote_from_bytes(text.encode(errors="surrogatepass"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """The whole API over a store with a package, in a thread."""
    root = tmp_path_factory.mktemp("fuzz")
    ready = threading.Event()
    made: list[Served] = []
    stop: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def main() -> None:
        store = await PublishedStore(root, LocalPlace(root), "first").create()
        await store.publish("demo/1", {b"a": b"a"})
        async with trio.open_nursery() as nursery:
            stop.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            made.append(await start(nursery, HttpApi(await observe(store, nursery)).respond))
            ready.set()
        with trio.CancelScope(shield=True):
            await store.aclose()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    assert ready.wait(WAIT_SECONDS)
    yield made[0], root
    [(token, scope)] = stop
    token.run_sync_soon(scope.cancel)
    thread.join(WAIT_SECONDS)


def exchange(port: int, data: bytes) -> bytes:
    """All that comes back when the caller says that and no more."""
    with socket.create_connection(("127.0.0.1", port), WAIT_SECONDS) as caller:
        caller.sendall(data)
        caller.shutdown(socket.SHUT_WR)
        received = b""
        while piece := caller.recv(65536):
            received += piece
    return received


def statuses(answer: bytes) -> list[int]:
    """Of every answer in it; each is whole."""
    found = []
    while answer:
        head, separator, rest = answer.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        length = re.search(rb"\r\n[Cc]ontent-[Ll]ength: (\d+)", head)
        assert separator, answer
        assert status is not None, answer
        assert length is not None, answer
        found.append(int(status[1]))
        body = b"" if rest.startswith(b"HTTP/1.1 ") else rest[: int(length[1])]
        answer = rest[len(body) :]
    return found


@given(requests | st.binary(max_size=60) | st.lists(requests, min_size=2, max_size=3).map(b"".join))
@example(b"GET /v1/events?after=" + b"9" * 30 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
@example(b"GET /v1/events?limit=-1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes(served: tuple[Served, Path], caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    server, _ = served
    with caplog.at_level(logging.WARNING):
        found = statuses(exchange(server.port, data))
    assert set(found) <= ANSWERED, found
    assert caplog.records == []


def test_nothing_changed(served: tuple[Served, Path]) -> None:
    server, root = served
    before = everything_below(root)
    asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert statuses(exchange(server.port, asked)) == [200]
    assert statuses(exchange(server.port, b"DELETE /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")) == [405]
    assert everything_below(root) == before
