"""Single requests of a probe, with wrong values where they are asked for, and their answers as they are.

Runs in the asyncio loop, and only there; it imports no asyncio, and nothing of trio.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

from botocore.exceptions import ClientError

from castore.config_backends import S3Settings
from castore.errors import StorageUnavailable
from castore.storage.backends.s3_client import S3Client
from castore.storage.backends.s3_errors import FOREIGN, code_of, status_of, storage_error

BODY_MAX_BYTES: Final = 16 << 20
"""More than any object that a probe makes: a server that sends on and on is cut off here."""

_TEMPORARY_STATUS: Final = frozenset({408, 429})
_TEMPORARY_CODES: Final = frozenset({"RequestTimeout", "SlowDown", "OperationAborted", "TooManyRequests"})
"""Answers below 500 that say something of the moment, and nothing of the question."""
_NOT_IMPLEMENTED: Final = 501
_NO_LEAVE: Final = frozenset({"AccessDenied", "AllAccessDisabled"})


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered. `code` is its own word for an error; `fields` are as the client library reads them."""

    status: int
    code: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300

    @property
    def says_missing(self) -> bool:
        return self.status == 404

    def __str__(self) -> str:
        return f"{self.status} {self.code}".rstrip() if self.code != str(self.status) else self.code


@dataclass(frozen=True, slots=True)
class Wrong:
    """What is to be wrong about a request, beside the values of its parameters.

    `damaged`: its body's last byte is changed after the request was signed. `trailer`: its body goes in the framing
    `aws-chunked` with the named checksum behind it, as the client library does by default over TLS.
    """

    damaged: bool = False
    trailer: str = ""


_wrong: ContextVar[Wrong | None] = ContextVar("_wrong", default=None)


async def ask(
    client: S3Client,
    settings: S3Settings,
    what: str,
    operation: str,
    params: Mapping[str, Any],
    body: bytes | None,
    wrong: Wrong,
) -> Answer:
    """One request and its answer, whatever that says.

    Raises StorageError, temporary or not, where there is none or where it says nothing of the question: the connection
    broke, the server is overloaded or fails, or these credentials may not ask.
    """
    library = client.library_client
    for event, handler in (("before-call.s3", _frame), ("before-send.s3", _damage)):
        library.meta.events.register_last(event, handler, unique_id=f"castore-probe-{event}")
    arguments = {"Bucket": settings.bucket, **params}
    if body is not None:
        arguments["Body"] = io.BytesIO(body)
    token = _wrong.set(wrong)
    try:
        fields = await getattr(library, operation)(**arguments)
        content = b""
        if operation == "get_object":
            content = await _read(fields["Body"])
        meta = fields["ResponseMetadata"]
        return Answer(int(meta["HTTPStatusCode"]), "", fields, meta.get("HTTPHeaders", {}), content)
    except ClientError as exc:
        return _error_answer(exc, settings, what)
    except FOREIGN as exc:
        raise storage_error(exc, settings, what) from exc
    finally:
        _wrong.reset(token)


def _error_answer(exc: Any, settings: S3Settings, what: str) -> Answer:
    status, code = status_of(exc), code_of(exc)
    if code in _NO_LEAVE:
        raise storage_error(exc, settings, what) from exc
    overloaded = status in _TEMPORARY_STATUS or code in _TEMPORARY_CODES
    if overloaded or (status >= 500 and status != _NOT_IMPLEMENTED):
        raise StorageUnavailable(
            f"backend {settings.backend_id}: {what}: {settings.endpoint_url} answers {status} {code}"
        )
    return Answer(status, code, exc.response, exc.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}))


async def _read(stream: Any) -> bytes:
    content = bytearray()
    try:
        async for chunk in stream.content.iter_any():
            content += chunk
            if len(content) > BODY_MAX_BYTES:
                break
    finally:
        stream.close()
    return bytes(content)


def _frame(params: dict[str, Any], **_: Any) -> None:
    """A handler of the client library, before it computes checksums: chooses the framing, also without TLS."""
    wrong = _wrong.get()
    if wrong is not None and wrong.trailer:
        algorithm = wrong.trailer
        chosen = {"algorithm": algorithm, "in": "trailer", "name": f"x-amz-checksum-{algorithm}"}
        params["context"]["checksum"] = {**params["context"].get("checksum", {}), "request_algorithm": chosen}


def _damage(request: Any, **_: Any) -> None:
    """A handler of the client library, after it signed: what arrives is not what was signed."""
    wrong = _wrong.get()
    if wrong is not None and wrong.damaged:
        body = request.body if isinstance(request.body, bytes) else request.body.getvalue()
        request.body = body[:-1] + bytes([body[-1] ^ 1])
