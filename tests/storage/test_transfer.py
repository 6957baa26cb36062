"""HTTP exchanges by `transfer.py` and `http_connection.py`, byte for byte, with a server that says what it is told."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

import pytest
import trio

from castore.storage.http_connection import (
    CannotConnect,
    ConnectionBroke,
    ConnectTimeout,
    Endpoint,
    NoAnswer,
    TransferError,
    UnsafeConnection,
)
from castore.storage.transfer import (
    ASK_FIRST_BYTES,
    COLLECTED_MAX_BYTES,
    HEAD_MAX_BYTES,
    IDLE_S,
    Answer,
    Place,
    Request,
    Transfer,
)
from tests.storage.s3.test_s3_tls import certificate

PATIENCE_S: Final = 60.0
GET: Final = Request("GET", "/a", {"Host": "there"})
DATA: Final = bytes(range(256)) * 4096
"""1 MiB."""


class Served:
    """One connection, as the server sees it."""

    def __init__(self, stream: trio.abc.Stream, number: int) -> None:
        self.stream = stream
        self.number = number
        self._read = b""

    async def head(self) -> bytes:
        """The next request's head. Raises EOFError when the client is gone."""
        while b"\r\n\r\n" not in self._read:
            await self._more()
        head, _, self._read = self._read.partition(b"\r\n\r\n")
        return head

    async def body(self, size: int) -> bytes:
        while len(self._read) < size:
            await self._more()
        body, self._read = self._read[:size], self._read[size:]
        return body

    async def say(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def _more(self) -> None:
        data = bytes(await self.stream.receive_some(1 << 16))
        if not data:
            raise EOFError
        self._read += data


class Server:
    def __init__(self) -> None:
        self.endpoint = Endpoint("127.0.0.1", 0, None)
        self.connections = 0
        self.heads: list[bytes] = []


Script = Callable[[Served], Awaitable[None]]


@asynccontextmanager
async def serving(
    script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Server]:
    server = Server()

    async def serve(plain: trio.SocketStream) -> None:
        server.connections += 1
        stream = trio.SSLStream(plain, tls, server_side=True, https_compatible=True) if tls else plain
        async with stream:
            with suppress(EOFError, trio.BrokenResourceError):  # the client left
                await script(Served(stream, server.connections))

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, serve, 0, host=host))
        server.endpoint = Endpoint(host, listener.socket.getsockname()[1], None)
        yield server
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def transfer_to(endpoint: Endpoint, *, timeout_s: float = PATIENCE_S, most: int = 64) -> AsyncIterator[Transfer]:
    transfer = Transfer(endpoint, connect_timeout_s=PATIENCE_S, timeout_s=timeout_s, max_connections=most)
    with trio.fail_after(PATIENCE_S):
        try:
            yield transfer
        finally:
            transfer.close()


def always(data: bytes) -> Script:
    """The same bytes to every request, on connections that are kept."""

    async def script(served: Served) -> None:
        while True:
            await served.head()
            await served.say(data)

    return script


def once(data: bytes) -> Script:
    """These bytes to the first request of a connection, and then its end."""

    async def script(served: Served) -> None:
        await served.head()
        await served.say(data)

    return script


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(*pieces: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


async def get_into(transfer: Transfer, size: int, *, skip: int = 0) -> bytes:
    buffer = bytearray(b"\xee" * size)
    await transfer.exchange(GET, lambda answer: Place(memoryview(buffer), skip))
    return bytes(buffer)


FRAMINGS: Final = {
    "of a length": ok(DATA),
    "in chunks": chunked(DATA[:1], DATA[1:70_000], DATA[70_000:]),
    "until the end": b"HTTP/1.1 200 OK\r\n\r\n" + DATA,
    "of HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(DATA) + DATA,
    "after others": b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + ok(DATA),
}


@pytest.mark.parametrize("name", FRAMINGS)
@pytest.mark.parametrize("skip", [0, 1, 20_000])
async def test_a_body_goes_into_the_buffer(name: str, skip: int) -> None:
    for size in (len(DATA) - skip, 10):
        async with serving(once(FRAMINGS[name])) as server, transfer_to(server.endpoint) as transfer:
            assert await get_into(transfer, size, skip=skip) == DATA[skip : skip + size]


@pytest.mark.parametrize("name", FRAMINGS)
async def test_a_body_without_a_buffer_is_collected(name: str) -> None:
    async with serving(once(FRAMINGS[name])) as server, transfer_to(server.endpoint) as transfer:
        answer = await transfer.exchange(GET)
        assert (answer.status, answer.body) == (200, DATA)


async def test_no_more_is_collected_than_the_bound() -> None:
    body = bytes(COLLECTED_MAX_BYTES + (1 << 20))
    async with serving(always(ok(body))) as server, transfer_to(server.endpoint) as transfer:
        answer = await transfer.exchange(GET)
        assert COLLECTED_MAX_BYTES < len(answer.body) < len(body)
        await transfer.exchange(GET)
        assert server.connections == 2


@pytest.mark.parametrize(
    ("data", "connections"),
    [
        (ok(b"ten bytes."), 1),
        (chunked(b"ten", b" bytes."), 3),
        (ok(b"ten bytes.", "Connection: keep-alive"), 1),
        (ok(b"ten bytes.", "Connection: close"), 3),
        (ok(b"ten bytes. And more than was asked for"), 3),
        (ok(b"ten bytes.") + b"surplus", 3),
        (chunked(b"ten bytes.") + b"surplus", 3),
        (ok(b"ten bytes.").replace(b"HTTP/1.1", b"HTTP/1.0"), 3),
    ],
)
async def test_a_connection_is_used_again_only_when_it_is_clean(data: bytes, connections: int) -> None:
    async with serving(always(data)) as server, transfer_to(server.endpoint) as transfer:
        for _ in range(3):
            assert await get_into(transfer, 10) == b"ten bytes."
        assert server.connections == connections


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "ended after 0 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "ended after"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Length: 11\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (2 * HEAD_MAX_BYTES), "no end of a head"),
        (ok(b"ten bytes.")[:-1], "ended after 9 of 10"),
        (ok(b"ten bytes.")[:-10], "ended after 0 of 10"),
        (ok(b"9 bytes.."), "9 bytes, 10 are needed"),
        (chunked(b"9 bytes.."), "ended after 9 of 10"),
        (chunked(b"ten bytes.")[:-10], "not HTTP|ended inside"),
        (b"HTTP/1.1 200 OK\r\n\r\n9 bytes..", "ended after 9 of 10"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a chunk", "not HTTP"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "0 bytes, 10 are needed"),
    ],
)
async def test_an_answer_that_is_not_whole(data: bytes, text: str) -> None:
    async with serving(once(data)) as server, transfer_to(server.endpoint) as transfer:
        with pytest.raises(ConnectionBroke, match=text):
            await get_into(transfer, 10)
        assert server.connections == 1, "nothing is asked twice"


async def test_a_refusal_of_the_placing_ends_the_exchange() -> None:
    def refuse(answer: Answer) -> Place:
        raise LookupError(answer.headers["x-reason"])

    async with serving(always(ok(b"ten bytes.", "X-Reason: none"))) as server, transfer_to(server.endpoint) as transfer:
        with pytest.raises(LookupError, match="none"):
            await transfer.exchange(GET, refuse)
        assert await get_into(transfer, 10) == b"ten bytes."
        assert server.connections == 2


async def test_a_head_has_no_body() -> None:
    async with serving(always(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")) as server:
        async with transfer_to(server.endpoint) as transfer:
            for _ in range(2):
                answer = await transfer.exchange(Request("HEAD", "/a", {"Host": "there"}))
                assert (answer.headers["content-length"], answer.body) == ("1000", b"")
            assert server.connections == 1


async def test_a_connection_that_the_server_ended_is_not_used_again() -> None:
    """And no request is lost by that: the end is seen before anything is sent."""
    ended = trio.Event()

    async def script(served: Served) -> None:
        await served.head()
        await served.say(ok(b"ten bytes."))
        await served.stream.aclose()
        ended.set()

    async with serving(script) as server, transfer_to(server.endpoint) as transfer:
        assert await get_into(transfer, 10) == b"ten bytes."
        await ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert await get_into(transfer, 10) == b"ten bytes."
        assert server.connections == 2


async def test_after_an_error_all_idle_connections_are_closed() -> None:
    """A server that was restarted costs one error, and not one for each connection that it forgot."""
    together = trio.Event()
    waiting = 0

    async def script(served: Served) -> None:
        nonlocal waiting
        await served.head()
        if served.number <= 3:
            waiting += 1
            if waiting == 3:
                together.set()
            await together.wait()
        await served.say(ok(b"ten bytes."))
        await served.head()  # and then it ends, unless it is the fourth
        if served.number > 3:
            await served.say(ok(b"ten bytes."))

    async with serving(script) as server, transfer_to(server.endpoint) as transfer:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(get_into, transfer, 10)
        with pytest.raises(ConnectionBroke):
            await get_into(transfer, 10)
        for _ in range(2):
            assert await get_into(transfer, 10) == b"ten bytes."
        assert server.connections == 4


async def test_a_connection_that_was_idle_for_long_is_not_used_again(autojump_clock: trio.testing.MockClock) -> None:
    """The clock of trio alone goes on: the server's end of the connection stays open."""
    async with serving(always(ok(b"ten bytes."))) as server, transfer_to(server.endpoint) as transfer:
        autojump_clock.autojump_threshold = float("inf")
        for pause_s, connections in ((0.0, 1), (IDLE_S - 1, 1), (IDLE_S + 1, 2)):
            autojump_clock.jump(pause_s)
            assert await get_into(transfer, 10) == b"ten bytes."
            assert server.connections == connections


async def test_connections_at_a_time_are_bounded() -> None:
    most = at_once = 0

    async def script(served: Served) -> None:
        nonlocal most, at_once
        while True:
            await served.head()
            at_once += 1
            most = max(most, at_once)
            await trio.testing.wait_all_tasks_blocked()
            at_once -= 1
            await served.say(ok(b"ten bytes."))

    async with serving(script) as server, transfer_to(server.endpoint, most=2) as transfer:
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(get_into, transfer, 10)
        assert most == server.connections == 2


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\nContent-Len", ok(b"ten bytes.")[:-5]])
async def test_silence_is_an_error(data: bytes) -> None:
    async def script(served: Served) -> None:
        await served.head()
        await served.say(data)
        await served.head()

    async with serving(script) as server, transfer_to(server.endpoint, timeout_s=0.2) as transfer:
        with pytest.raises(NoAnswer):
            await get_into(transfer, 10)


@pytest.mark.parametrize("data", [b"", ok(DATA)[:-5]])
async def test_cancelling_closes_the_connection_and_leaves_the_buffer(data: bytes) -> None:
    said, left = trio.Event(), trio.Event()

    async def script(served: Served) -> None:
        await served.head()
        await served.say(data)
        said.set()
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await served.head()
        left.set()

    async with serving(script) as server, transfer_to(server.endpoint) as transfer:
        buffer = bytearray(len(DATA))
        async with trio.open_nursery() as nursery:

            async def get() -> None:
                with memoryview(buffer) as view:
                    await transfer.exchange(GET, lambda _: Place(view))

            nursery.start_soon(get)
            await said.wait()
            nursery.cancel_scope.cancel()
        buffer.clear()  # raises BufferError while anything refers to it
        await left.wait()


# bodies that are sent

BODIES: Final = (b"", b"x", DATA, DATA * 3)


@pytest.mark.parametrize("body", BODIES, ids=[f"{len(body)} bytes" for body in BODIES])
async def test_a_body_is_sent(body: bytes) -> None:
    got: list[tuple[bytes, bytes]] = []

    async def script(served: Served) -> None:
        while True:
            head = (await served.head()).lower()
            if b"expect: 100-continue" in head:
                await served.say(b"HTTP/1.1 100 Continue\r\n\r\n")
            got.append((head, await served.body(len(body))))
            await served.say(ok(b"thanks"))

    async with serving(script) as server, transfer_to(server.endpoint) as transfer:
        for _ in range(2):
            answer = await transfer.exchange(Request("PUT", "/a", {"Host": "there"}, memoryview(body)))
            assert answer.body == b"thanks"
        assert [sent for _, sent in got] == [body, body]
        assert f"content-length: {len(body)}".encode() in got[0][0]
        assert (b"expect" in got[0][0]) == (len(body) > ASK_FIRST_BYTES)
        assert server.connections == 1


async def test_a_large_body_that_is_refused_is_not_sent() -> None:
    async with serving(once(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")) as server:
        async with transfer_to(server.endpoint) as transfer:
            answer = await transfer.exchange(Request("PUT", "/a", {"Host": "there"}, memoryview(DATA * 2)))
            assert (answer.status, answer.body) == (403, b"no")


async def test_a_server_that_never_says_continue_gets_the_body_all_the_same() -> None:
    async def script(served: Served) -> None:
        await served.head()
        assert await served.body(2 * len(DATA)) == DATA * 2
        await served.say(ok(b"thanks"))

    async with serving(script) as server, transfer_to(server.endpoint) as transfer:
        answer = await transfer.exchange(Request("PUT", "/a", {"Host": "there"}, memoryview(DATA * 2)))
        assert answer.body == b"thanks"


async def test_an_answer_in_the_middle_of_a_body_is_heard() -> None:
    async def script(served: Served) -> None:
        await served.head()
        await served.say(b"HTTP/1.1 100 Continue\r\n\r\n")
        await served.body(10)
        await served.say(b"HTTP/1.1 507 Full\r\nContent-Length: 4\r\n\r\nfull")

    async with serving(script) as server, transfer_to(server.endpoint) as transfer:
        body = memoryview(bytes(64 << 20))
        try:
            answer = await transfer.exchange(Request("PUT", "/a", {"Host": "there"}, body))
        except ConnectionBroke:
            return  # the reset that follows may take the answer with it: then nobody can hear it
        assert (answer.status, answer.body) == (507, b"full")


# the way there


async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with transfer_to(Endpoint("127.0.0.1", taken.getsockname()[1], None)) as transfer:
            with pytest.raises(CannotConnect) as caught:
                await transfer.exchange(GET)
            assert isinstance(caught.value.__cause__, ConnectionRefusedError)


async def test_nobody_accepts() -> None:
    """A queue of connections that is full: the kernel answers no further one."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        endpoint = Endpoint("127.0.0.1", full.getsockname()[1], None)
        waiting = []
        for _ in range(4):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(full.getsockname())
        transfer = Transfer(endpoint, connect_timeout_s=0.2, timeout_s=PATIENCE_S, max_connections=1)
        with trio.fail_after(PATIENCE_S), pytest.raises(ConnectTimeout):
            await transfer.exchange(GET)
        for one in waiting:
            one.close()


async def test_ipv6() -> None:
    async with serving(always(ok(b"ten bytes.")), host="::1") as server, transfer_to(server.endpoint) as transfer:
        assert await get_into(transfer, 10) == b"ten bytes."


async def test_a_name_with_several_addresses() -> None:
    """`localhost` may be ::1 first, where this server does not listen."""
    async with serving(always(ok(b"ten bytes."))) as server:
        async with transfer_to(Endpoint("localhost", server.endpoint.port, None)) as transfer:
            assert await get_into(transfer, 10) == b"ten bytes."


# TLS


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server at 127.0.0.1, and of a client that trusts it."""
    folder = tmp_path_factory.mktemp("tls")
    of_server = certificate(folder, "IP:127.0.0.1")
    return of_server, ssl.create_default_context(cafile=str(folder / "authority.pem"))


@pytest.mark.parametrize("name", FRAMINGS)
async def test_over_tls(name: str, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    of_server, of_client = tls
    async with serving(once(FRAMINGS[name]), tls=of_server) as server:
        async with transfer_to(Endpoint("127.0.0.1", server.endpoint.port, of_client)) as transfer:
            assert await get_into(transfer, len(DATA)) == DATA


async def test_a_connection_over_tls_is_used_again(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    of_server, of_client = tls

    async def script(served: Served) -> None:
        while True:
            await served.head()
            await served.body(len(DATA))
            await served.say(ok(DATA))

    async with serving(script, tls=of_server) as server:
        async with transfer_to(Endpoint("127.0.0.1", server.endpoint.port, of_client)) as transfer:
            for _ in range(3):
                place = Place(memoryview(bytearray(len(DATA))))
                put = Request("PUT", "/a", {"Host": "there"}, memoryview(DATA))
                await transfer.exchange(put, partial(lambda place, answer: place, place))
                assert place.view == DATA
        assert server.connections == 1


@pytest.mark.parametrize("wrong", ["authority", "host", "protocol"])
async def test_a_server_that_is_not_the_one(wrong: str, tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    of_server, of_client = tls

    async def script(served: Served) -> None:
        await served.say(b"220 something else speaks first here\r\n")
        await served.head()

    async with serving(script, tls=None if wrong == "protocol" else of_server) as server:
        host = "localhost" if wrong == "host" else "127.0.0.1"
        context = ssl.create_default_context() if wrong == "authority" else of_client
        async with transfer_to(Endpoint(host, server.endpoint.port, context)) as transfer:
            with pytest.raises(UnsafeConnection):
                await transfer.exchange(GET)


async def test_an_end_of_tls_without_a_farewell_is_an_end(tls: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    of_server, of_client = tls
    async with serving(once(ok(DATA)[:-5]), tls=of_server) as server:
        async with transfer_to(Endpoint("127.0.0.1", server.endpoint.port, of_client)) as transfer:
            with pytest.raises(TransferError):
                await get_into(transfer, len(DATA))
