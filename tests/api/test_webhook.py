"""One request to a webhook: what is signed and sent, and every way in which it is not taken."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.abc import Stream

from castore.api.webhook import Webhook
from castore.config_events import WebhookSettings
from castore.config_values import SecretRef
from castore.errors import DeliveryError
from tests.servers.scripted_http import Handler, Request, serving
from tests.servers.webhook_receiver import Behaviour, WebhookReceiver, half, hang_up, slow, status
from tests.storage.s3.test_s3_tls import certificate

EVENTS = [{"specversion": "1.0", "sequence": f"{number:020d}", "subject": "p/ü"} for number in (1, 2)]


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with WebhookReceiver().running() as receiver:
        yield receiver


def webhook(receiver: WebhookReceiver, folder: Path, **options: Any) -> Webhook:
    path = folder / "secret"
    path.write_bytes(receiver.secret)
    reference = SecretRef(f"file:{path}", "events.webhook.secret_ref", path)
    settings: dict[str, Any] = {"url": receiver.url, "secret": reference, "timeout_seconds": 20.0}
    return Webhook(WebhookSettings(**settings | options))


async def refusal(sink: Webhook) -> str:
    """Why it is not taken: a line that shows neither the secret nor the path."""
    with pytest.raises(DeliveryError) as caught:
        await sink.send(EVENTS)
    await sink.aclose()
    message = str(caught.value)
    assert "s3cret" not in message
    assert "T0PS3CRET" not in message
    assert "\n" not in message
    return message


async def test_a_signed_batch(receiver: WebhookReceiver, tmp_path: Path) -> None:
    sink = webhook(receiver, tmp_path)
    await sink.send(EVENTS)
    await sink.send(EVENTS)
    await sink.send(EVENTS[:1])
    await sink.aclose()
    first, again, other = receiver.taken
    assert first.events == EVENTS
    assert first.path == "/in/T0PS3CRETPATH"
    assert first.headers["content-type"] == "application/cloudevents-batch+json"
    assert first.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert abs(int(first.headers["webhook-timestamp"]) - time.time()) < 300
    assert first.message_id == again.message_id != other.message_id, "what is sent again has the same id"
    assert receiver.bad == 0


async def test_the_forms_of_a_secret(receiver: WebhookReceiver, tmp_path: Path) -> None:
    sink = webhook(receiver, tmp_path)
    (tmp_path / "secret").write_text("another")
    assert await refusal(sink) == f"http://127.0.0.1:{receiver.port}: answers 401"
    receiver.secret = bytes(range(24))
    (tmp_path / "secret").write_text(f"whsec_{base64.b64encode(receiver.secret).decode()}\n")
    await sink.send(EVENTS)
    assert len(receiver.taken) == 1, "each request reads it anew"
    (tmp_path / "secret").write_text("whsec_s3cret?")
    assert await refusal(sink) == "events.webhook.secret_ref: behind whsec_ there is no base64"
    (tmp_path / "secret").unlink()
    assert "cannot resolve file:" in await refusal(sink)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (status(500), "answers 500"),
        (status(404), "answers 404"),
        (status(302, Location="/elsewhere"), "redirects, which is not followed"),
        (status(307, Location="/elsewhere"), "redirects, which is not followed"),
        (half, "complete message body"),
        (hang_up, "ended after 0 bytes"),
    ],
    ids=["500", "404", "302", "307", "half", "hung up"],
)
async def test_what_is_not_taken(receiver: WebhookReceiver, tmp_path: Path, behaviour: Behaviour, said: str) -> None:
    receiver.script = [behaviour]
    assert said in await refusal(webhook(receiver, tmp_path))
    assert (len(receiver.got), receiver.taken, receiver.bad) == (1, [], 0), "asked once, and nowhere else"


async def test_a_deadline_is_for_the_whole_answer(receiver: WebhookReceiver, tmp_path: Path) -> None:
    receiver.script = [slow]
    assert "no whole answer within 0.3 s" in await refusal(webhook(receiver, tmp_path, timeout_seconds=0.3))


async def send_for_ever(stream: Stream, begin: bytes, again: bytes) -> None:
    await stream.send_all(begin)
    while True:
        await stream.send_all(again)


async def interim(request: Request, stream: Stream) -> None:
    await send_for_ever(stream, b"", b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 1000)


async def head(request: Request, stream: Stream) -> None:
    await send_for_ever(stream, b"HTTP/1.1 204 No Content\r\n", b"x-again: and again\r\n" * 100)


async def dribble(request: Request, stream: Stream) -> None:
    for number in range(10_000):
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10000\r\n\r\n" if number == 0 else b"x")
        await trio.sleep(0.01)


async def another_protocol(request: Request, stream: Stream) -> None:
    await send_for_ever(stream, b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n", bytes(1 << 16))


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (interim, "no whole answer within 0.5 s"),
        (head, "no end of a head within 65536 bytes"),
        (dribble, "no whole answer within 0.5 s"),
        (another_protocol, "this is not HTTP"),
    ],
)
async def test_an_answer_without_end(tmp_path: Path, handler: Handler, said: str) -> None:
    async with serving(handler) as server:
        there = WebhookReceiver(port=int(server.endpoint_url.rpartition(":")[2]))
        assert said in await refusal(webhook(there, tmp_path, timeout_seconds=0.5))


@pytest.mark.parametrize(("code", "is_taken"), [(200, True), (500, False)])
async def test_a_body_without_end_is_read_to_a_bound(tmp_path: Path, code: int, is_taken: bool) -> None:
    """The status says what is to be known."""
    sent = 0

    async def body(request: Request, stream: Stream) -> None:
        nonlocal sent
        await stream.send_all(b"HTTP/1.1 %d told\r\ntransfer-encoding: chunked\r\n\r\n" % code)
        while True:
            await stream.send_all(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            sent += 1 << 16

    async with serving(body) as server:
        sink = webhook(WebhookReceiver(port=int(server.endpoint_url.rpartition(":")[2])), tmp_path)
        if is_taken:
            await sink.send(EVENTS)
            await sink.aclose()
        else:
            assert "answers 500" in await refusal(sink)
    assert sent < 64 << 20, "what the sockets of both sides hold, and COLLECTED_MAX_BYTES"


async def test_a_receiver_that_asks_for_time(receiver: WebhookReceiver, tmp_path: Path) -> None:
    for text, seconds in (("7", 7), ("1" + "0" * 18, 10**6), ("soon", 0), ("-1", 0)):
        receiver.script = [status(503, Retry_After=text)]
        sink = webhook(receiver, tmp_path)
        with pytest.raises(DeliveryError) as caught:
            await sink.send(EVENTS)
        await sink.aclose()
        assert caught.value.retry_after_seconds == seconds


async def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    message = await refusal(webhook(WebhookReceiver(port=port), tmp_path))
    assert message.startswith(f"http://127.0.0.1:{port}: ")


async def test_certificates(tmp_path: Path) -> None:
    with WebhookReceiver(tls=certificate(tmp_path, "IP:127.0.0.1")).running() as receiver:
        sink = webhook(receiver, tmp_path, ca_bundle=tmp_path / "authority.pem")
        await sink.send(EVENTS)
        await sink.aclose()
        assert "certificate verify failed" in await refusal(webhook(receiver, tmp_path))
        assert "cannot be read" in await refusal(webhook(receiver, tmp_path, ca_bundle=tmp_path / "none"))
        assert "no file of certificates" in await refusal(webhook(receiver, tmp_path, ca_bundle=tmp_path / "secret"))
    other = tmp_path / "other"
    other.mkdir()
    with WebhookReceiver(tls=certificate(other, "DNS:elsewhere.example")).running() as receiver:
        assert "certificate verify failed" in await refusal(
            webhook(receiver, tmp_path, ca_bundle=other / "authority.pem")
        )
    assert (len(receiver.got), receiver.bad) == (0, 0)


def test_settings_show_no_path(receiver: WebhookReceiver, tmp_path: Path) -> None:
    sink = webhook(receiver, tmp_path)
    shown = f"{sink.settings!r} {sink.settings} {sink.place} {json.dumps(sink.place)}"
    assert "T0PS3CRET" not in shown
