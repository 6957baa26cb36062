"""HTTP/1.1 exchanges on trio: heads by h11, bodies straight into the caller's buffer. Knows nothing of what is stored.

For large bodies of known length, which is what a storage backend moves. No proxies, no redirects, no compression,
no HTTP/2: who needs these asks another client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import h11
import trio

from castore.storage.http_connection import Connection, ConnectionBroke, Endpoint, NoAnswer, TransferError

IDLE_S: Final = 10.0
"""Seconds after which an unused connection is not used again: servers and their front ends end one after 10 to 75."""
HEAD_MAX_BYTES: Final = 64 * 1024
"""Of an answer's status line and headers; servers allow themselves 8 to 16 KiB."""
COLLECTED_MAX_BYTES: Final = 1 << 20
"""Of a body that goes into no buffer of the caller: what a server says about an error."""
CONTINUE_S: Final = 1.0
"""Seconds to wait for `100 Continue`, before the body is sent all the same (RFC 9110, 10.1.1)."""
ASK_FIRST_BYTES: Final = 1 << 20
"""Bodies above this are asked for first (`Expect: 100-continue`): a round trip that spares sending what is refused."""

_HEAD_BYTES: Final = 8 * 1024
"""Received at first: a small body comes along and is copied once, of a large one hardly anything is."""
_JOINED_BYTES: Final = 32 * 1024
"""A body up to this goes out together with its head: a copy of 2 us instead of a call of 20."""
_NO_BODY: Final = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class Request:
    """`headers` are complete but for Content-Length and Expect. They may hold a signature, so nothing shows them."""

    method: str
    target: str
    headers: Mapping[str, str] = field(repr=False)
    body: memoryview | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """Names of headers are in lower case. `body` is empty where the body went into a buffer."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(slots=True)
class Place:
    """Where a body goes: after its first `skip` bytes, the next fill `view`, and the rest is not waited for."""

    view: memoryview
    skip: int = 0


Placing = Callable[[Answer], Place | None]
"""Decides, when an answer's head has come, where its body goes; None: it is collected. What it raises ends all."""


class Transfer:
    """Exchanges with one server, by connections that are kept and used again. Making one touches no network.

    At most `max_connections` exchanges are under way; more wait.

    Methods raise TransferError. The caller sets deadlines; `timeout_s` bounds silence only.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        connect_timeout_s: float,
        timeout_s: float,
        max_connections: int,
    ) -> None:
        self._endpoint = endpoint
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._turns = trio.Semaphore(max_connections)
        self._idle: list[Connection] = []  # the one used last is at the end
        self._closed = False

    async def exchange(self, request: Request, placing: Placing = lambda _: None) -> Answer:
        """Send the request, and receive the answer where `placing` says.

        When it returns or raises, nothing refers to the buffers any more. The answer of any status is returned. One
        that is shorter than it says raises ConnectionBroke. Nothing is sent a second time: whoever calls knows what
        may be, and counts. After an error the next call does not meet a connection that is as old.
        """
        try:
            self._turns.acquire_nowait()
        except trio.WouldBlock:
            await self._turns.acquire()
        try:
            connection = self._take() or await Connection.open(
                self._endpoint, connect_timeout_s=self._connect_timeout_s, timeout_s=self._timeout_s
            )
            return await self._exchange(connection, request, placing)
        finally:
            self._turns.release()

    def close_idle(self) -> None:
        """Close the connections that nobody uses."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Close all connections; those in use as soon as they are not."""
        self._closed = True
        self.close_idle()

    def _take(self) -> Connection | None:
        oldest = trio.current_time() - IDLE_S
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.pop(0).close()
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_stale():
                return connection
            connection.close()
        return None

    async def _exchange(self, connection: Connection, request: Request, placing: Placing) -> Answer:
        one = _Exchange(connection, request, placing)
        try:
            return await one.run()
        except TransferError:
            self.close_idle()
            raise
        finally:
            if one.reusable and not self._closed:
                connection.idle_since = trio.current_time()
                self._idle.append(connection)
            else:
                connection.close()


class _Exchange:
    """One request and its answer on one connection."""

    def __init__(self, connection: Connection, request: Request, placing: Placing) -> None:
        self._connection = connection
        self._request = request
        self._placing = placing
        self._protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX_BYTES)
        self._received = bytearray()  # and not yet taken
        self.reusable = False
        """Whether the connection is ready for the next exchange."""

    async def run(self) -> Answer:
        try:
            sent_all, head = await self._ask()
            answer = Answer(head.status_code, {name.decode(): value.decode("latin-1") for name, value in head.headers})
            place = self._placing(answer)
            if place is None:
                collected = _Collected()
                await self._receive_body(answer, collected.take)
                answer = Answer(answer.status, answer.headers, bytes(collected.data))
            else:
                await self._receive_body_into(answer, place)
            self.reusable = sent_all and self.reusable and head.http_version >= b"1.1" and not _closes(answer)
        except h11.ProtocolError as exc:
            self.reusable = False
            raise ConnectionBroke(f"this is not HTTP: {exc}") from exc
        except BaseException:
            self.reusable = False
            raise
        return answer

    async def _ask(self) -> tuple[bool, h11.Response]:
        """Send the request; whether all of it was sent, and the answer's head."""
        request, connection, body = self._request, self._connection, self._request.body
        headers = list(request.headers.items())
        ask_first = body is not None and len(body) > ASK_FIRST_BYTES
        if body is not None:
            headers.append(("Content-Length", str(len(body))))
        if ask_first:
            headers.append(("Expect", "100-continue"))
        head = self._protocol.send(h11.Request(method=request.method, target=request.target, headers=headers))
        assert head is not None, "h11 makes bytes of a request"
        if body is None or len(body) <= _JOINED_BYTES:
            await connection.send(head if body is None else b"".join((head, body)))
            await connection.answer_begins()
            return True, await self._final_head()
        await connection.send(head)
        if ask_first:
            with trio.move_on_after(CONTINUE_S):
                said = await self._head()
                if isinstance(said, h11.Response):
                    return False, said
        try:
            await connection.send(body)
        except ConnectionBroke:
            # Whoever refuses a body may answer and hang up at once. That answer says more than the broken pipe.
            try:
                return False, await self._final_head()
            except (ConnectionBroke, NoAnswer):
                pass
            raise
        return True, await self._final_head()

    async def _final_head(self) -> h11.Response:
        while True:
            head = await self._head()
            if isinstance(head, h11.Response):
                return head

    async def _head(self) -> h11.Response | h11.InformationalResponse:
        """The next head. What came after it stays in `_received`."""
        searched = 0
        while (end := self._received.find(b"\r\n\r\n", max(0, searched - 3))) < 0:
            searched = len(self._received)
            if searched > HEAD_MAX_BYTES:
                raise ConnectionBroke(f"this is not HTTP: no end of a head within {HEAD_MAX_BYTES} bytes")
            await self._receive_more(f"the connection ended after {searched} bytes of an answer's head")
        self._protocol.receive_data(bytes(self._received[: end + 4]))
        del self._received[: end + 4]
        event = self._protocol.next_event()
        if not isinstance(event, h11.Response | h11.InformationalResponse):
            raise ConnectionBroke("this is not HTTP: no answer begins there")
        return event

    async def _receive_more(self, at_end: str) -> None:
        buffer = bytearray(_HEAD_BYTES)
        count = await self._connection.receive_into(memoryview(buffer))
        if not count:
            raise ConnectionBroke(at_end)
        self._received += memoryview(buffer)[:count]

    async def _receive_body_into(self, answer: Answer, place: Place) -> None:
        """Fill the place's view, or raise ConnectionBroke. Reusable only when there is nothing else in the body."""
        view, skip = place.view, place.skip
        length = self._length(answer)
        if length is None:
            await self._receive_body(answer, _Filling(place).take)
            return
        if length < skip + len(view):
            raise ConnectionBroke(f"a body of {length} bytes, {skip + len(view)} are needed")
        early = self._received
        while len(early) < skip:
            skip -= len(early)
            early.clear()
            await self._receive_more(_ends_in_body(0, len(view)))
        done = min(len(early) - skip, len(view))
        view[:done] = memoryview(early)[skip : skip + done]
        surplus = len(early) - skip - done
        while done < len(view):
            with view[done:] as rest:  # released, whatever happens: the buffer is the caller's
                count = await self._connection.receive_into(rest)
            if not count:
                raise ConnectionBroke(_ends_in_body(done, len(view)))
            done += count
        self.reusable = not surplus and length == place.skip + len(view)

    async def _receive_body(self, answer: Answer, take: Callable[[bytes | bytearray], bool]) -> None:
        """All of the body, to `take`, piece by piece until that is False. Of any framing."""
        length = self._length(answer)
        if length == 0 or self._request.method == "HEAD":
            self.reusable = not self._received
            return
        if self._received:  # nothing, to h11, is the connection's end
            self._protocol.receive_data(bytes(self._received))
            self._received.clear()
        while True:
            event = self._protocol.next_event()
            if event is h11.NEED_DATA:
                buffer = bytearray(_HEAD_BYTES)
                count = await self._connection.receive_into(memoryview(buffer))
                self._protocol.receive_data(bytes(buffer[:count]))
            elif isinstance(event, h11.Data):
                if not take(event.data):
                    return
            elif isinstance(event, h11.EndOfMessage):
                take(b"")
                by_length = length is not None or "transfer-encoding" in answer.headers
                self.reusable = by_length and self._protocol.trailing_data == (b"", False)
                return
            else:
                raise ConnectionBroke("the connection ended inside an answer")

    def _length(self, answer: Answer) -> int | None:
        """Bytes in the body, None where only its end will tell (RFC 9112, 6.3). h11 has checked that it is a number."""
        if self._request.method == "HEAD" or answer.status in _NO_BODY:
            return 0
        if "transfer-encoding" in answer.headers or "content-length" not in answer.headers:
            return None
        return int(answer.headers["content-length"])


class _Collected:
    """A body as bytes, up to a bound."""

    def __init__(self) -> None:
        self.data = bytearray()

    def take(self, piece: bytes | bytearray) -> bool:
        self.data += piece
        return len(self.data) <= COLLECTED_MAX_BYTES


class _Filling:
    """A body of unknown length that goes into a view."""

    def __init__(self, place: Place) -> None:
        self._skip = place.skip
        self._view = place.view
        self._done = 0

    def take(self, piece: bytes | bytearray) -> bool:
        if not piece and self._done < len(self._view):
            raise ConnectionBroke(_ends_in_body(self._done, len(self._view)))
        part = memoryview(piece)[self._skip : self._skip + len(self._view) - self._done]
        self._skip = max(0, self._skip - len(piece))
        self._view[self._done : self._done + len(part)] = part
        self._done += len(part)
        return self._done < len(self._view)


def _ends_in_body(done: int, size: int) -> str:
    return f"the connection ended after {done} of {size} bytes"


def _closes(answer: Answer) -> bool:
    return "close" in answer.headers.get("connection", "").lower()
