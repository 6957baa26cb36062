"""An HTTP/1.1 server for small answers, h11 on trio streams. Knows no path and no document of castore.

Every wait has a bound, and cancelling it ends every connection at once: a caller that takes nothing, or sends nothing,
holds up neither another one nor the end of the program. There are no requests with a body, and none that changes
anything.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio

from castore.errors import StateError

CONNECTIONS_MAX: Final = 64
"""Callers at a time; each costs a task and a socket."""
REQUEST_MAX_BYTES: Final = 16 * 1024
"""Line and headers of a request."""
REQUEST_SECONDS: Final = 10.0
"""From a connection, or the last answer on it, to the whole next request."""
ANSWER_SECONDS: Final = 60.0
"""For making an answer: more than the longest that a caller may ask to wait."""
SEND_SECONDS: Final = 10.0
"""For a caller to take an answer of a megabyte at most."""
PART_SECONDS: Final = 2.0
"""For a caller whose request was refused to read why, and to stop sending."""
_BACKLOG: Final = 64
_RECEIVE_BYTES: Final = 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: the path decoded, and the last value of each parameter."""

    path: str
    query: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Response:
    """An answer with a body, which is left out for HEAD."""

    status: int
    media_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


Respond = Callable[[Request], Awaitable[Response]]


def open_listener(host: str, port: int) -> socket.socket:
    """A socket that listens at `host` and `port`; 0 lets the system choose. May ask the resolver.

    Raises StateError, one line that names both.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)
        except BaseException:
            listening.close()
            raise
    except OSError as exc:
        raise StateError(f"http.listen: cannot listen at {host}:{port}: {exc.strerror}") from exc
    return listening


def url_of(listening: socket.socket) -> str:
    """Where callers of this host find it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_http(
    listening: socket.socket,
    respond: Respond,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer at a listening socket until cancelled. Closes it in the end."""
    turns = trio.CapacityLimiter(CONNECTIONS_MAX)
    only_local = ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback

    async def serve(stream: trio.SocketStream) -> None:
        # Nothing that a caller does may end the server: an exception here would.
        try:
            async with stream:
                try:
                    turns.acquire_nowait()
                except trio.WouldBlock:
                    return
                try:
                    await _Connection(stream, respond, only_local).run()
                finally:
                    turns.release()
        except trio.BrokenResourceError:
            pass
        except Exception:
            _log.exception("serving an HTTP connection failed unexpectedly")

    await trio.serve_listeners(
        serve, [trio.SocketListener(trio.socket.from_stdlib_socket(listening))], task_status=_Started(task_status)
    )


class _Started:
    """Tells that the server runs, without its listeners."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


class _Refused(Exception):
    """The request gets an error, and the connection ends after it."""

    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


class _Connection:
    def __init__(self, stream: trio.SocketStream, respond: Respond, only_local: bool) -> None:
        self._stream = stream
        self._respond = respond
        self._only_local = only_local
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_MAX_BYTES)

    async def run(self) -> None:
        """Answer one request after the other. Raises BrokenResourceError when the caller is gone."""
        while True:
            request: h11.Request | None = None
            try:
                request = await self._receive()
                if request is None:
                    return
                response = await self._answer(request)
            except h11.RemoteProtocolError as exc:
                response = problem(exc.error_status_hint, str(exc))
            except _Refused as exc:
                response = problem(exc.status, exc.detail, exc.headers)
            await self._send(response, head_only=request is not None and request.method == b"HEAD")
            if {self._h11.our_state, self._h11.their_state} != {h11.DONE}:
                await self._part()
                return
            self._h11.start_next_cycle()

    async def _receive(self) -> h11.Request | None:
        """The next whole request; None when the caller says no more, or takes too long to say it."""
        request: h11.Request | None = None
        with trio.move_on_after(REQUEST_SECONDS):
            while True:
                event = self._h11.next_event()
                if event is h11.NEED_DATA:
                    self._h11.receive_data(await self._stream.receive_some(_RECEIVE_BYTES))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.EndOfMessage):
                    return request
                elif isinstance(event, h11.Data):
                    raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "requests have no body here")
                else:
                    return None
        return None

    async def _answer(self, request: h11.Request) -> Response:
        if request.method not in (b"GET", b"HEAD"):
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD", Allow="GET, HEAD")
        try:
            target = urlsplit(request.target.decode("ascii"))
            asked = Request(unquote(target.path, errors="strict"), dict(parse_qsl(target.query, errors="strict")))
        except ValueError:
            raise _Refused(HTTPStatus.BAD_REQUEST, "the path is not well formed") from None
        # A target may name a host, too, and then that one counts (RFC 9112, 3.2.2).
        hosts = [value.decode("ascii", "replace") for name, value in request.headers if name == b"host"]
        hosts += [target.netloc] if target.netloc else []
        if self._only_local and not all(map(_is_local, hosts)):
            # A page in a browser could otherwise read what is here by a name of its own that leads to this host.
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, "this server answers to localhost and to addresses only")
        with trio.move_on_after(ANSWER_SECONDS):
            try:
                return await self._respond(asked)
            except Exception:
                _log.exception("answering %r failed unexpectedly", asked.path)
                return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "failed unexpectedly: the log says more")
        return problem(HTTPStatus.GATEWAY_TIMEOUT, f"no answer within {ANSWER_SECONDS:g} s")

    async def _send(self, response: Response, *, head_only: bool) -> None:
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = {
            "Date": formatdate(usegmt=True),
            "Content-Type": response.media_type,
            "Content-Length": str(len(response.body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            **response.headers,
        }
        if self._h11.their_state is not h11.DONE:
            headers["Connection"] = "close"
        head = h11.Response(
            status_code=response.status,
            reason=HTTPStatus(response.status).phrase.encode(),
            headers=list(headers.items()),
        )
        pieces = [self._h11.send(head) or b""]
        if not head_only:
            # Not joined: of a body that nobody takes there is one copy, however many callers there are.
            pieces.append(self._h11.send(h11.Data(data=response.body)) or b"")
        pieces.append(self._h11.send(h11.EndOfMessage()) or b"")
        with trio.move_on_after(SEND_SECONDS) as scope:
            for piece in filter(None, pieces):
                await self._stream.send_all(piece)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("the caller takes no answer")

    async def _part(self) -> None:
        """Take what the caller is still sending: a socket that is closed before loses the answer on its way."""
        with trio.move_on_after(PART_SECONDS):
            await self._stream.send_eof()
            while await self._stream.receive_some(_RECEIVE_BYTES):
                pass


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as RFC 9457 has it."""
    title = HTTPStatus(status).phrase
    body = json.dumps({"title": title, "status": int(status), "detail": detail})
    return Response(int(status), "application/problem+json", body.encode() + b"\n", headers or {})


def _is_local(host: str) -> bool:
    """Whether a Host header is `localhost` or an address, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
