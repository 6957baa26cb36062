"""What an S3 server or the way to it answers -> StorageError. The one seam where foreign exceptions end."""

from __future__ import annotations

import os
import traceback
from typing import Any, Final

import aiohttp
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from castore.config_backends import S3Settings
from castore.errors import (
    ConfigError,
    ObjectMissing,
    ObjectTruncated,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageRejected,
    StorageTimeout,
    StorageUnavailable,
)

NONSENSE: Final = (ResponseParserError, ValueError, KeyError)
"""What reading an answer raises that is no answer: no XML, no date, no such field."""

FOREIGN: Final = (ClientError, BotoCoreError, aiohttp.ClientError, OSError, ConfigError, *NONSENSE)
"""All that a request raises for what lies outside the program: the server, the way to it, and settings."""

_KINDS: Final[dict[str, type[StorageError]]] = {
    "NoSuchKey": ObjectMissing,
    "NoSuchUpload": ObjectMissing,
    "NoSuchBucket": StorageRejected,
    "AccessDenied": StorageDenied,
    "ExpiredToken": StorageDenied,
    "InvalidToken": StorageDenied,
    "QuotaExceeded": StorageFull,  # Ceph, with status 403
    "XMinioStorageFull": StorageFull,
    "RequestTimeout": StorageTimeout,  # with status 400: the server waited for the rest of the request
    # The next are 4xx, and right the next time: bytes were damaged on the way, or somebody else was faster.
    "BadDigest": StorageUnavailable,
    "XAmzContentSHA256Mismatch": StorageUnavailable,
    "IncompleteBody": StorageUnavailable,
    "InvalidPart": StorageUnavailable,
    "OperationAborted": StorageUnavailable,
    "SlowDown": StorageUnavailable,
}
"""Codes that say more than their status."""

_BY_STATUS: Final[dict[int, type[StorageError]]] = {
    401: StorageDenied,
    403: StorageDenied,
    404: ObjectMissing,
    408: StorageTimeout,
    416: ObjectTruncated,
    429: StorageUnavailable,
    504: StorageTimeout,
    507: StorageFull,
}

_SETTINGS: Final[dict[str, str]] = {
    "NoSuchBucket": "bucket",
    "InvalidBucketName": "bucket",
    "BucketAlreadyExists": "bucket",
    "AuthorizationHeaderMalformed": "region",
    "InvalidRegion": "region",
    "InvalidLocationConstraint": "region",
    "IllegalLocationConstraintException": "region",
    "PermanentRedirect": "region",
    "InvalidStorageClass": "storage_class",
    "InvalidEncryptionAlgorithmError": "sse",
    "EntityTooSmall": "multipart_chunk_bytes",
    "EntityTooLarge": "multipart_threshold_bytes",
}
"""The setting that is to blame for a code."""

_MESSAGE_CHARACTERS: Final = 200
"""A server's own words are shown up to here."""


def code_of(exc: BaseException) -> str:
    """The server's own code for the error, or its status where it gave none; empty when it is not a server's answer."""
    return str(exc.response.get("Error", {}).get("Code", "")) if isinstance(exc, ClientError) else ""


def status_of(exc: BaseException) -> int:
    """The HTTP status; 0 when the error is not a server's answer."""
    if not isinstance(exc, ClientError):
        return 0
    return int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def storage_error(exc: BaseException, settings: S3Settings, what: str) -> StorageError:
    """The error to raise `from exc`. Its one line begins with the backend and `what` it was about.

    The local variables in the traceback of `exc` are dropped: they hold credentials, and whole bodies.
    """
    kind, reason = _explain(exc, settings)
    link: BaseException | None = exc
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__context__
    return kind(f"backend {settings.backend_id}: {what}: {reason}")


def _explain(exc: BaseException, settings: S3Settings) -> tuple[type[StorageError], str]:
    place = settings.endpoint_url
    match exc:
        case ClientError():
            return _explain_answer(exc, settings)
        case ConfigError():
            return StorageDenied, str(exc)
        case ReadTimeoutError() | ConnectTimeoutError() | TimeoutError():
            return StorageTimeout, f"{place} does not answer"
        case SSLError():
            return StorageUnavailable, f"no safe connection to {place}: {_one_line(_below(exc))}"
        case EndpointConnectionError():
            return StorageUnavailable, f"{place} cannot be reached: {_reason(exc)}; check endpoint_url and the server"
        case ResponseParserError() | ValueError() | KeyError():
            return StorageUnavailable, f"{place} gives an answer that makes no sense: {_one_line(repr(exc))}"
        case BotoCoreError() if not isinstance(exc, HTTPClientError | ProxyConnectionError):
            return StorageRejected, f"{_one_line(exc)}; check endpoint_url, region and bucket"  # nothing was sent
        case _:
            return StorageUnavailable, f"the connection to {place} broke: {_reason(exc)}"


def _explain_answer(exc: Any, settings: S3Settings) -> tuple[type[StorageError], str]:
    code, status = code_of(exc), status_of(exc)
    kind = _KINDS.get(code) or _BY_STATUS.get(status)
    if kind is None:
        kind = StorageRejected if 300 <= status < 500 else StorageUnavailable
    if kind is ObjectMissing:
        return kind, "no such object"
    if kind is ObjectTruncated:
        return kind, "the object ends before the range that was asked for"
    place = settings.endpoint_url
    answer = f"{status}" if code in ("", str(status)) else f"{status} {code}"
    if kind is StorageDenied:
        return kind, f"{place} answers {answer}: {_denied(code, settings)}"
    message = _one_line(exc.response.get("Error", {}).get("Message", ""))
    reason = f"{place} answers {answer}" + (f": {message}" if message else "")
    setting = "sse" if code.startswith("KMS.") else _SETTINGS.get(code)
    if setting is not None:
        reason += f'; check {setting} = "{getattr(settings, setting)}"'
    elif 300 <= status < 400:
        reason += f'; check endpoint_url = "{place}" and region = "{settings.region}"'
    return kind, reason


def _denied(code: str, settings: S3Settings) -> str:
    if code == "RequestTimeTooSkewed":
        return "the clocks of this host and of the server differ"
    if code == "AccessDenied":
        return f'these credentials may not do that in bucket = "{settings.bucket}"'
    access, secret = settings.access_key_ref, settings.secret_key_ref
    return f"check access_key_ref = {access} and secret_key_ref = {secret}, and what they may do"


def _reason(exc: BaseException) -> str:
    below = _below(exc)
    if isinstance(below, OSError) and below.errno is not None:
        # A negative number is of the name service, which has texts of its own.
        return os.strerror(below.errno) if below.errno > 0 else str(below.strerror)
    return _one_line(below) or type(below).__name__


def _below(exc: BaseException) -> object:
    """What an exception of the client library wraps: what the system, or TLS, said."""
    return getattr(exc, "kwargs", {}).get("error") or exc


def _one_line(text: object) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return line if len(line) <= _MESSAGE_CHARACTERS else f"{line[:_MESSAGE_CHARACTERS]}..."
