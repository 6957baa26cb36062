"""Events to an HTTP receiver, signed. Knows nothing of where events come from, and tries each request once.

The signature is that of Standard Webhooks (https://www.standardwebhooks.com): HMAC-SHA256 over `ID.TIMESTAMP.BODY`.
The body is a batch of CloudEvents (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import trio

from castore import __version__
from castore.config_events import WebhookSettings
from castore.errors import ConfigError, DeliveryError
from castore.storage.http_connection import Endpoint, TransferError
from castore.storage.transfer import Answer, Request, Transfer

_SECRET_PREFIX: Final = "whsec_"
"""What Standard Webhooks writes before the base64 of a key. Any other secret is taken as it is."""
_PORTS: Final = {"http": 80, "https": 443}
_RETRY_AFTER_MAX: Final = 10**6
"""Seconds; the configuration bounds it further."""


class Webhook:
    """A sink. Follows no redirect, uses no proxy, and takes no certificate that is not the host's."""

    name: Final = "webhook"

    def __init__(self, settings: WebhookSettings) -> None:
        self.settings = settings
        self.batch_events = settings.batch_events
        parts = urlsplit(settings.url)
        self._host = parts.netloc
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._transfer: Transfer | None = None

    @property
    def place(self) -> str:
        """Where events go, for people: without the path, which may be a secret."""
        return self.settings.origin

    async def send(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Deliver them in one request, whose whole answer says 2xx within the timeout. Raises DeliveryError."""
        body = json.dumps(documents, separators=(",", ":")).encode()
        # As each reads its own secret anew, it can be changed at any time.
        try:
            secret = self.settings.secret.resolve()
        except ConfigError as exc:
            raise DeliveryError(str(exc)) from exc
        request = Request("POST", self._target, self._headers(body, secret), memoryview(body))
        timeout_s = self.settings.timeout_seconds
        with trio.move_on_after(timeout_s):
            try:
                answer = await (await self._client()).exchange(request)
            except TransferError as exc:
                raise DeliveryError(f"{self.place}: {exc}") from exc
            _check(answer, self.place)
            return
        raise DeliveryError(f"{self.place}: no whole answer within {timeout_s:g} s")

    async def aclose(self) -> None:
        """Close what is open. Nothing may be sending."""
        if self._transfer is not None:
            self._transfer.close()

    async def _client(self) -> Transfer:
        if self._transfer is None:
            parts = urlsplit(self.settings.url)
            assert parts.hostname is not None
            tls = await trio.to_thread.run_sync(self._tls) if parts.scheme == "https" else None
            endpoint = Endpoint(parts.hostname, parts.port or _PORTS[parts.scheme], tls)
            timeout_s = self.settings.timeout_seconds
            self._transfer = Transfer(endpoint, connect_timeout_s=timeout_s, timeout_s=timeout_s, max_connections=1)
        return self._transfer

    def _tls(self) -> ssl.SSLContext:
        bundle = self.settings.ca_bundle
        try:
            return ssl.create_default_context(cafile=bundle)
        except ssl.SSLError as exc:
            raise DeliveryError(f"events.webhook.ca_bundle: {bundle} is no file of certificates in PEM form") from exc
        except OSError as exc:
            raise DeliveryError(f"events.webhook.ca_bundle: {bundle} cannot be read: {exc.strerror}") from exc

    def _headers(self, body: bytes, secret: str) -> dict[str, str]:
        # The same bytes have the same id, after a restart too.
        message_id = f"msg_{hashlib.sha256(body).hexdigest()[:32]}"
        timestamp = str(int(time.time()))
        return {
            "Host": self._host,
            "User-Agent": f"castore/{__version__}",
            "Content-Type": "application/cloudevents-batch+json",
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signature(secret, message_id, timestamp, body),
        }


def signature(secret: str, message_id: str, timestamp: str, body: bytes) -> str:
    """The header `webhook-signature`. Raises DeliveryError for a secret that says it is base64 and is not."""
    key = secret.encode()
    if secret.startswith(_SECRET_PREFIX):
        try:
            key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
        except binascii.Error:
            # `from None`: the exception would carry the secret.
            raise DeliveryError("events.webhook.secret_ref: behind whsec_ there is no base64") from None
    signed = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def _check(answer: Answer, place: str) -> None:
    """Raises DeliveryError unless it was taken."""
    if 200 <= answer.status < 300:
        return
    said = "redirects, which is not followed" if 300 <= answer.status < 400 else f"answers {answer.status}"
    raise DeliveryError(f"{place}: {said}", retry_after_seconds=_retry_after(answer.headers.get("retry-after", "")))


def _retry_after(text: str) -> float:
    """Seconds that an answer asks to wait; 0 for none (a date is not taken)."""
    return min(int(text), _RETRY_AFTER_MAX) if text.isascii() and text.isdigit() and len(text) < 20 else 0
