"""The HTTP server as such: what it answers to requests of any shape, and that nobody can hold it up."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from castore.api.http_server import (
    CONNECTIONS_MAX,
    PART_SECONDS,
    REQUEST_MAX_BYTES,
    REQUEST_SECONDS,
    SEND_SECONDS,
    Request,
    Response,
    open_listener,
    url_of,
)
from castore.errors import StateError
from tests.api.http_client import Served, start

LARGE = b"x" * 50_000_000


async def respond(request: Request) -> Response:
    """Says what it understood; fails and is large when asked to."""
    if request.path == "/fails":
        raise RuntimeError("on purpose")
    if request.path == "/large":
        return Response(200, "text/plain", LARGE)
    return Response(200, "text/plain", f"{request.path} {dict(request.query)}".encode())


@pytest.fixture
async def served(nursery: trio.Nursery) -> Served:
    return await start(nursery, respond)


async def test_an_answer(served: Served) -> None:
    answer = await served.get("/a%20b/%C3%A9?x=1&y=a%26b&x=2")
    assert (answer.status, answer.reason) == (200, "OK")
    assert answer.body.decode() == "/a b/é {'x': '2', 'y': 'a&b'}"
    assert answer.headers["content-length"] == str(len(answer.body))
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["date"].endswith(" GMT")


async def test_many_requests_on_one_connection(served: Served) -> None:
    caller = await served.connect()
    async with caller.stream:
        for number in range(5):
            assert (await caller.get(f"/{number}")).body == f"/{number} {{}}".encode()


async def test_requests_that_are_sent_at_once_are_answered_in_order(served: Served) -> None:
    caller = await served.connect()
    async with caller.stream:
        await caller.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % number for number in range(3)))
        await caller.send(b"GET /end HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = await caller.receive_raw()
    assert [text.index(b"/%d {}" % number) for number in range(3)] < [text.index(b"/end {}")]


async def test_head_has_no_body(served: Served) -> None:
    caller = await served.connect()
    async with caller.stream:
        answer = await caller.get("/a", method="HEAD")
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "5")
        assert (await caller.get("/b")).body == b"/b {}"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
async def test_nothing_can_be_changed(served: Served, method: str) -> None:
    caller = await served.connect()
    async with caller.stream:
        answer = await caller.get("/a", method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {"title": "Method Not Allowed", "status": 405, "detail": "only GET and HEAD"}


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", 413),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 413),
        (b"rubbish\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: "
            + b"x" * 2 * REQUEST_MAX_BYTES
            + b"\r\n\r\n",
            431,
        ),
        (b"GET /%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
        (b"GET /?x=%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
        (b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 400),
    ],
)
async def test_requests_out_of_shape(served: Served, request_bytes: bytes, status: int) -> None:
    caller = await served.connect()
    async with caller.stream:
        await caller.send(request_bytes)
        text = await caller.receive_raw()
    assert text.startswith(b"HTTP/1.1 %d " % status)
    assert (await served.get("/still")).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "[::1", "a:b"]
)
async def test_names_of_others_that_lead_here_are_refused(served: Served, host: str) -> None:
    caller = await served.connect()
    async with caller.stream:
        assert (await caller.get("/a", host=host)).status == 421


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8750", "127.0.0.1", "127.0.0.1:8750", "[::1]:8750", "10.1.2.3"]
)
async def test_addresses_are_answered(served: Served, host: str) -> None:
    caller = await served.connect()
    async with caller.stream:
        assert (await caller.get("/a", host=host)).status == 200


async def test_an_answer_that_fails(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    answer = await served.get("/fails")
    assert answer.json()["detail"] == "failed unexpectedly: the log says more"
    assert answer.status == 500
    assert [(record.levelno, record.exc_text) for record in caplog.records if record.exc_info] != []
    assert caplog.records[0].levelno == logging.ERROR
    assert (await served.get("/still")).status == 200


async def test_a_caller_that_goes_away(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for half in (b"", b"GET / HT", b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        caller = await served.connect()
        await caller.send(half) if half else None
        await caller.stream.aclose()
    assert (await served.get("/still")).status == 200
    assert caplog.records == []


async def test_a_caller_that_takes_nothing_does_not_hold_up_the_end() -> None:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            served = await start(nursery, respond)
            caller = await served.connect()
            await caller.send(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert await caller.stream.receive_some(1) == b"H"
            nursery.cancel_scope.cancel()
        await caller.stream.aclose()


async def test_a_caller_that_takes_nothing_is_given_up(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    served = await start(nursery, respond)
    caller = await served.connect()
    await caller.send(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert await caller.stream.receive_some(1) == b"H"
    await trio.testing.wait_all_tasks_blocked(0.05)
    mock_clock.jump(SEND_SECONDS + 1)
    received = 0
    try:
        while data := await caller.stream.receive_some():
            received += len(data)
    except trio.BrokenResourceError:
        pass
    assert received < len(LARGE)
    await caller.stream.aclose()


@pytest.mark.parametrize("half", [b"", b"GET /slow HTTP/1.1\r\nHost: loc"])
async def test_a_caller_that_says_nothing_is_given_up(
    nursery: trio.Nursery, mock_clock: MockClock, half: bytes
) -> None:
    served = await start(nursery, respond)
    caller = await served.connect()
    assert (await caller.get("/a")).status == 200
    await caller.send(half)
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(REQUEST_SECONDS + 1)
    assert await caller.receive_raw() == b""
    await caller.stream.aclose()


async def test_a_request_byte_by_byte_is_given_up(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    """The bound is of the whole request: another byte gives no more time."""
    served = await start(nursery, respond)
    caller = await served.connect()
    with suppress(trio.BrokenResourceError):
        for _ in range(int(REQUEST_SECONDS) + 2):
            await caller.send(b"G")
            await trio.testing.wait_all_tasks_blocked(0.01)
            mock_clock.jump(1)
        assert await caller.receive_raw() == b""
    await caller.stream.aclose()
    assert (await served.get("/still")).status == 200


async def test_a_body_without_end_is_not_taken(nursery: trio.Nursery, mock_clock: MockClock) -> None:
    served = await start(nursery, respond)
    caller = await served.connect()
    await caller.send(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000000\r\n\r\n")

    async def pour() -> None:
        for number in range(1 << 14):
            await caller.send(bytes(1 << 16))
            if number == 64:
                mock_clock.jump(PART_SECONDS + 1)

    with pytest.raises(trio.BrokenResourceError):
        await pour()
    await caller.stream.aclose()
    assert (await served.get("/still")).status == 200


async def test_an_answer_that_nobody_takes_is_there_once(nursery: trio.Nursery) -> None:
    """The callers' sockets are full; what waits for them is the same bytes."""
    served = await start(nursery, respond)
    before = resident_bytes()
    callers = [await served.connect() for _ in range(CONNECTIONS_MAX)]
    for caller in callers:
        await caller.send(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await caller.stream.receive_some(1) == b"H"
    await trio.testing.wait_all_tasks_blocked()
    assert resident_bytes() - before < 4 * len(LARGE)
    for caller in callers:
        await caller.stream.aclose()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_callers_are_few(served: Served) -> None:
    callers = [await served.connect() for _ in range(CONNECTIONS_MAX)]
    for caller in callers:
        assert (await caller.get("/a")).status == 200
    one_more = await served.connect()
    assert await one_more.receive_raw() == b""
    await one_more.stream.aclose()
    await callers[0].get("/a")
    for caller in callers:
        await caller.stream.aclose()
    with trio.fail_after(20):
        while True:
            caller = await served.connect()
            try:
                await caller.send(b"GET /a HTTP/1.0\r\n\r\n")
                if await caller.receive_raw():
                    break
            except trio.BrokenResourceError:
                pass
            finally:
                await caller.stream.aclose()


def test_an_address_that_is_taken() -> None:
    with open_listener("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert url_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(StateError, match=f"http.listen: cannot listen at 127.0.0.1:{port}: Address already in use"):
            open_listener("127.0.0.1", port)


def test_ipv6() -> None:
    with open_listener("::1", 0) as listening:
        assert listening.family is socket.AF_INET6
        assert url_of(listening).startswith("http://[::1]:")


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(StateError, match=r"cannot listen at name\.invalid:1"):
        open_listener("name.invalid", 1)
