"""The HTTP API: which path is answered with which document. Nothing here changes anything.

- /: the status page, with /style.css and /page.js
- /health: the health document; 503 when it says fail
- /livez: 200 as long as the program answers
- /readyz: 200 when the catalog can be read, whatever the backends do
- /metrics: what Prometheus scrapes
- /v1/events?since=SEQ_OR_TIME&limit=N&type=TYPE&wait=SECONDS: events as a CloudEvents batch
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import trio

from castore.api import page
from castore.api.event_feed import SINCE_RULE, document, parse_start
from castore.api.health import MEDIA_TYPE
from castore.api.http_server import Request, Response, problem
from castore.api.metrics import Metrics
from castore.api.page import StatusPage
from castore.api.sources import Sources
from castore.catalog.event_log import EventReader, StoredEvent
from castore.catalog.reader import CatalogReader
from castore.errors import StateError

EVENTS_MAX: Final = 1000
"""Events in one answer, about 500 bytes each."""
EVENTS_DEFAULT: Final = 100
EVENT_WAIT_MAX_SECONDS: Final = 30.0
"""How long a caller may have its request wait for the next event."""
_POLL_SECONDS: Final = 0.25


class HttpApi:
    """Answers requests. `is_ready` says whether what this program is there for is up."""

    def __init__(self, sources: Sources, *, is_ready: Callable[[], bool] = lambda: True) -> None:
        self._catalog_path = sources.catalog_path
        self._health = sources.health
        self._metrics = Metrics(sources)
        self._page = StatusPage(sources)
        self._is_ready = is_ready
        self._paths = {
            "/": self._answer_page,
            **dict.fromkeys(page.FILES, self._answer_file),
            "/health": self._answer_health,
            "/livez": self._answer_live,
            "/readyz": self._answer_ready,
            "/metrics": self._answer_metrics,
            "/v1/events": self._answer_events,
        }

    async def respond(self, request: Request) -> Response:
        """The answer to a request."""
        answer = self._paths.get(request.path)
        if answer is None:
            return problem(HTTPStatus.NOT_FOUND, f"there are {', '.join(self._paths)}")
        try:
            return await answer(request)
        except StateError as exc:
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, str(exc))

    async def _answer_page(self, request: Request) -> Response:
        return Response(int(HTTPStatus.OK), "text/html; charset=utf-8", await self._page.make(), page.HEADERS)

    async def _answer_file(self, request: Request) -> Response:
        media_type, path = page.FILES[request.path]
        return Response(int(HTTPStatus.OK), media_type, await trio.Path(path).read_bytes())

    async def _answer_health(self, request: Request) -> Response:
        made = await self._health.make()
        status = HTTPStatus.SERVICE_UNAVAILABLE if made["status"] == "fail" else HTTPStatus.OK
        return _json(made, media_type=MEDIA_TYPE, status=status)

    async def _answer_live(self, request: Request) -> Response:
        return _json({"status": "pass"})

    async def _answer_ready(self, request: Request) -> Response:
        if not self._is_ready():
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, "not mounted")
        await trio.to_thread.run_sync(_touch_catalog, self._catalog_path)
        return _json({"status": "pass"})

    async def _answer_metrics(self, request: Request) -> Response:
        text, media_type = await self._metrics.make()
        return Response(int(HTTPStatus.OK), media_type, text)

    async def _answer_events(self, request: Request) -> Response:
        try:
            limit = _number(request, "limit", EVENTS_DEFAULT, 1, EVENTS_MAX)
            wait_seconds = _number(request, "wait", 0, 0, int(EVENT_WAIT_MAX_SECONDS))
        except ValueError as exc:
            return problem(HTTPStatus.BAD_REQUEST, str(exc))
        with closing(await trio.to_thread.run_sync(EventReader, self._catalog_path)) as reader:
            source = reader.catalog_id()
            first = reader.first_sequence()
            try:
                start = parse_start(reader, request.query.get("since", "0"))
            except ValueError:
                return problem(HTTPStatus.BAD_REQUEST, f"since: expected {SINCE_RULE}")
            after, event_type = start.after, request.query.get("type", "")
            found: list[StoredEvent] = []
            deadline = trio.current_time() + wait_seconds
            while True:
                if reader.has_news():
                    found, after = await trio.to_thread.run_sync(
                        lambda after: reader.events_after(after, limit, event_type=event_type, since_ns=start.since_ns),
                        after,
                    )
                if found or trio.current_time() >= deadline:
                    break
                await trio.sleep(_POLL_SECONDS)
        # What the next request gives as `since`, also when nothing of its type was among the events looked at.
        return _json(
            [document(stored, source) for stored in found],
            media_type="application/cloudevents-batch+json",
            # Whoever asks for events behind an earlier one than before this has missed some.
            headers={"Castore-Next-Since": str(after), "Castore-First-Kept": str(first)},
        )


def _number(request: Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise ValueError(f"{name}: expected a number from {least} to {most}")
    return int(text)


def _touch_catalog(path: Path) -> None:
    """Raises StateError when the catalog cannot be read."""
    with CatalogReader.open(path) as reader:
        reader.catalog_id()


def _json(
    value: Any,
    *,
    media_type: str = "application/json",
    status: int = HTTPStatus.OK,
    headers: dict[str, str] | None = None,
) -> Response:
    return Response(int(status), media_type, json.dumps(value, indent=1).encode() + b"\n", headers or {})
