"""An HTTP proxy on loopback before a real server, that does harm as it is told: by request, and counted. No TLS.

with FaultProxy(port) as proxy:
    proxy.break_with(stall, method="GET", times=2)
    ...                                   # at proxy.endpoint_url
    proxy.met                             # the requests that met the fault
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import parse_qs, urlsplit

from tests.servers.relay import Relay

_CONNECTION_HEADERS: Final = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "expect"})
"""Of one connection each: the proxy has connections of its own. None of them is signed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came. Names of headers are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        pairs = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        return {name: values[-1] for name, values in pairs.items()}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server answered, or what is sent instead. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def but(self, *, status: int | None = None, body: bytes | None = None, **headers: str) -> Answer:
        """The same but for these; `content_range="..."` and so on, and an empty value leaves the header out.

        `content-length` stays that of the body that the server sent, unless it is given.
        """
        fields = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        given = {name: value for name, value in fields.items() if value}
        body = self.body if body is None else body
        return replace(self, status=self.status if status is None else status, headers=given, body=body)

    @property
    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} so it is", *(f"{name}: {value}" for name, value in self.headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Exchange:
    """One request that meets a fault, and the means to do harm to it."""

    def __init__(self, request: Seen, caller: socket.socket, ask: Callable[[], Answer], end: threading.Event) -> None:
        self.request = request
        self._caller = caller
        self._end = end
        self.ask = ask
        """Has the server do what was asked for; its answer."""

    def send(self, data: bytes) -> None:
        self._caller.sendall(data)

    def answer(self, answer: Answer) -> None:
        """Send a whole answer."""
        self.send(answer.head + answer.body)

    def reset(self) -> None:
        """End the connection as a host does that knows nothing of it."""
        self._caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._caller.close()

    def hang(self) -> None:
        """Say nothing more until the caller leaves or the proxy ends."""
        self._caller.settimeout(0.05)
        while not self._end.is_set():
            try:
                if not self._caller.recv(1):
                    return
            except TimeoutError:
                continue

    def drip(self, data: bytes, seconds: float) -> None:
        """Send it byte by byte, with a pause after each, until the caller leaves or the proxy ends."""
        for number in range(len(data)):
            self.send(data[number : number + 1])
            if self._end.wait(seconds):
                return


Fault = Callable[[Exchange], bool | None]
"""Does harm to one exchange. True: the connection may be used again; else it is closed.

Whoever got a whole answer uses the connection again, and may do so before it is seen to be closed: that request is
lost, and none that meets a fault. So a fault that sends a whole answer gives True.
"""


@dataclass(frozen=True, slots=True)
class _Rule:
    fault: Fault
    applies: Callable[[Seen], bool]
    first: int
    times: int


class FaultProxy(Relay):
    """Passes requests on to a port of this host, but for those that are to meet a fault. A context manager.

    `cut` and `restore` are the relay's: nobody listens in between.
    """

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self.requests: list[Seen] = []
        """All that came."""
        self.met: list[Seen] = []
        """Those that met a fault."""
        self._rule: _Rule | None = None
        self._matched = 0
        self._end = threading.Event()

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        super().__exit__(*exc)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def break_with(
        self,
        fault: Fault,
        *,
        method: str = "",
        query: Iterable[str] = (),
        without: Iterable[str] = (),
        value: tuple[str, str] | None = None,
        first: int = 1,
        times: int = 1 << 30,
    ) -> None:
        """From now on, `times` requests meet the fault, beginning with the `first`-th one that matches.

        One matches that has the method (empty: any), the parameters `query`, none of `without`, and `value`, a
        parameter with its value. Replaces the fault before, and counts anew.
        """
        needed, refused = frozenset(query), frozenset(without)

        def applies(request: Seen) -> bool:
            there = request.query
            return (
                method in ("", request.method)
                and needed <= there.keys()
                and not refused & there.keys()
                and (value is None or there.get(value[0]) == value[1])
            )

        with self._lock:
            self._rule, self._matched = _Rule(fault, applies, first, times), 0
            self.requests, self.met = [], []

    def mend(self) -> None:
        """No more faults. What was counted stays."""
        with self._lock:
            self._rule = None

    def _carry(self, caller: socket.socket) -> None:
        server = http.client.HTTPConnection("127.0.0.1", self._target_port)
        try:
            with suppress(OSError, http.client.HTTPException), caller.makefile("rb") as reader:
                while True:
                    request = _read_request(reader.readline, reader.read, caller)
                    if request is None:
                        return
                    fault = self._note(request)
                    if fault is not None:
                        exchange = Exchange(request, caller, lambda: _ask(server, request), self._end)  # noqa: B023
                        if fault(exchange) is not True:
                            return
                        continue
                    answer = _ask(server, request)
                    caller.sendall(answer.head + answer.body)
        finally:
            server.close()
            with suppress(OSError):
                caller.shutdown(socket.SHUT_RDWR)
            caller.close()

    def _note(self, request: Seen) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            rule = self._rule
            if rule is None or not rule.applies(request):
                return None
            self._matched += 1
            if not rule.first <= self._matched < rule.first + rule.times:
                return None
            self.met.append(request)
            return rule.fault


def _read_request(readline: Callable[[], bytes], read: Callable[[int], bytes], caller: socket.socket) -> Seen | None:
    first = readline().decode("latin-1").split()
    if len(first) != 3:
        return None
    headers: dict[str, str] = {}
    while (line := readline().decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        caller.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    size = int(headers.get("content-length", "0"))
    body = read(size)
    return Seen(first[0], first[1], headers, body) if len(body) == size else None


def _ask(server: http.client.HTTPConnection, request: Seen) -> Answer:
    server.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
    for name, value in request.headers.items():
        if name not in _CONNECTION_HEADERS:
            server.putheader(name, value)
    server.putheader("content-length", str(len(request.body)))
    server.endheaders(request.body)
    response = server.getresponse()
    headers = {name.lower(): value for name, value in response.getheaders()}
    size = headers.get("content-length")
    body = response.read()
    kept = {name: value for name, value in headers.items() if name not in _CONNECTION_HEADERS}
    if request.method == "HEAD" and size is not None:
        return Answer(response.status, kept | {"content-length": size}, b"")
    if response.status != http.client.NO_CONTENT:
        kept["content-length"] = str(len(body))
    return Answer(response.status, kept, body)
