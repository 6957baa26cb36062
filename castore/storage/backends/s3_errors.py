"""What an S3 server or the way to it answers -> StorageError. The one seam where foreign exceptions end."""

from __future__ import annotations

import logging
import os
import time
import traceback
from email.utils import parsedate_to_datetime
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

for _name in ("aioboto3", "aiobotocore", "boto3", "botocore"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # below, they log whole requests: key ids and signatures

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
    "TemporaryRedirect": StorageUnavailable,
}
"""Codes that say more than their status."""

_BY_STATUS: Final[dict[int, type[StorageError]]] = {
    307: StorageUnavailable,  # "for now": Amazon answers so until a new bucket's name is known everywhere
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


def refuses_credentials(exc: BaseException) -> bool:
    """Whether other credentials may do: a token that has expired is 400 at some servers."""
    return status_of(exc) in (401, 403) or code_of(exc) in ("ExpiredToken", "InvalidToken")


def storage_error(exc: BaseException, settings: S3Settings, what: str) -> StorageError:
    """The error to raise `from exc`. Its one line begins with the backend and `what` it was about.

    The local variables in the traceback of `exc` are dropped: they hold credentials, and whole bodies.
    """
    kind, reason = _explain(exc, settings)
    clear_locals(exc)
    error = kind(f"backend {settings.backend_id}: {what}: {reason}")
    error.retry_after_s = _retry_after_s(exc)
    return error


def _retry_after_s(exc: BaseException) -> float | None:
    """What the answer's Retry-After says: seconds, or a date by this host's clock (RFC 9110, section 10.2.3)."""
    if not isinstance(exc, ClientError):
        return None
    text = str(exc.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")).strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def clear_locals(exc: BaseException) -> None:
    """Drop the local variables in the traceback of an error and of those before it."""
    link: BaseException | None = exc
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__context__


def _explain(exc: BaseException, settings: S3Settings) -> tuple[type[StorageError], str]:
    place = settings.endpoint_url
    match exc:
        case ClientError():
            return _explain_answer(exc, settings)
        case ConfigError():
            return StorageDenied, str(exc)
        case ConnectTimeoutError():
            limit = f'connect_timeout = "{settings.connect_timeout_seconds:g}s"'
            return StorageTimeout, f"{place} takes no connection within {limit}"
        case ReadTimeoutError() | TimeoutError():
            return StorageTimeout, f'{place} does not answer within read_timeout = "{settings.read_timeout_seconds:g}s"'
        case SSLError():
            return StorageUnavailable, f"no safe connection to {place}: {one_line(_below(exc))}"
        case EndpointConnectionError():
            return StorageUnavailable, f"{place} cannot be reached: {_reason(exc)}; check endpoint_url and the server"
        case ResponseParserError() | ValueError() | KeyError():
            return StorageUnavailable, f"{place} gives an answer that makes no sense: {one_line(repr(exc))}"
        case BotoCoreError() if not isinstance(exc, HTTPClientError | ProxyConnectionError):
            return StorageRejected, f"{one_line(exc)}; check endpoint_url, region and bucket"  # nothing was sent
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
    message = one_line(exc.response.get("Error", {}).get("Message", ""))
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
    with_key = f', nor perhaps use sse_kms_key_id = "{settings.sse_kms_key_id}"' if settings.sse_kms_key_id else ""
    if code == "AccessDenied":
        return f'these credentials may not do that in bucket = "{settings.bucket}"{with_key}'
    if not settings.references:
        return "check what the AWS credential chain gives, and what it may do"
    access, secret, token = settings.access_key_ref, settings.secret_key_ref, settings.session_token_ref
    with_token = f", session_token_ref = {token}" if token is not None else ""
    return f"check access_key_ref = {access} and secret_key_ref = {secret}{with_token}, and what they may do{with_key}"


def _reason(exc: BaseException) -> str:
    below = _below(exc)
    if isinstance(below, OSError) and below.errno is not None:
        # A negative number is of the name service, which has texts of its own.
        return os.strerror(below.errno) if below.errno > 0 else str(below.strerror)
    return one_line(below) or type(below).__name__


def _below(exc: BaseException) -> object:
    """What an exception of the client library wraps: what the system, or TLS, said."""
    return getattr(exc, "kwargs", {}).get("error") or exc


def one_line(text: object) -> str:
    """Somebody else's words, fit for an error of one line."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return line if len(line) <= _MESSAGE_CHARACTERS else f"{line[:_MESSAGE_CHARACTERS]}..."
