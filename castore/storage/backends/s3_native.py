"""Objects of one bucket by this project's own HTTP: bytes in and out at a fraction of the client library's cost.

Signs with that library's signer and its credentials, and raises the same errors. What it does not do goes by that
library: `s3_connection.py` decides. It asks nothing twice, but for credentials that changed under way.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.request import getproxies, proxy_bypass
from xml.etree import ElementTree

import trio
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    ReadTimeoutError,
    SSLError,
)

from castore.config_backends import S3Settings
from castore.errors import ConfigError, ObjectMissing, StorageError, StorageRejected
from castore.storage.backends.s3_errors import FOREIGN, clear_locals, code_of, refuses_credentials, storage_error
from castore.storage.backends.s3_ranges import bytes_before
from castore.storage.backends.s3_signing import NO_BODY, UNSIGNED, Hidden, InLibrary, Signer, SigningCredentials
from castore.storage.backends.s3_tls import tls_context
from castore.storage.http_connection import (
    CannotConnect,
    ConnectTimeout,
    Endpoint,
    NoAnswer,
    TransferError,
    UnsafeConnection,
)
from castore.storage.transfer import Answer, Place, Placing, Request, Transfer

if TYPE_CHECKING:
    from castore.storage.backends.s3_client import S3Client

HASH_INLINE_BYTES: Final = 64 * 1024
"""A body up to this is hashed on the loop, in 40 us; a thread costs more."""

_METHODS: Final = {"head_object": "HEAD", "put_object": "PUT", "upload_part": "PUT", "delete_object": "DELETE"}
_HEADERS: Final = {
    "ContentMD5": "Content-MD5",
    "StorageClass": "x-amz-storage-class",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
}
_QUERY: Final = {"PartNumber": "partNumber", "UploadId": "uploadId"}
_KNOWN: Final = {"Key", *_HEADERS, *_QUERY}
_SAYS_WHAT_IS_MISSING: Final = frozenset({"NoSuchKey", "NoSuchUpload"})

_log = logging.getLogger(__name__)


def _is_good(answer: Answer) -> bool:
    return 200 <= answer.status < 300


def _nothing(answer: Answer) -> dict[str, Any]:
    return {}


def _said(answer: Answer) -> dict[str, Any]:
    """What the client library makes of the headers of a good answer, as far as anybody asks for it."""
    headers = answer.headers
    said: dict[str, Any] = {"ResponseMetadata": {"HTTPStatusCode": answer.status, "HTTPHeaders": headers}}
    if "etag" in headers:
        said["ETag"] = headers["etag"]
    if "x-amz-server-side-encryption" in headers:
        said["ServerSideEncryption"] = headers["x-amz-server-side-encryption"]
    if "content-length" in headers:
        said["ContentLength"] = int(headers["content-length"])
    if "last-modified" in headers:
        said["LastModified"] = parsedate_to_datetime(headers["last-modified"])
    return said


def open_native(settings: S3Settings, run: InLibrary) -> S3Native | None:
    """The native path for these settings; None, with a line of log, where the client library has to do it all.

    `run` runs a function that is given the `S3Client`, in the client library's thread.

    Reads certificates, and asks nothing of the server. Raises StorageRejected for a `ca_bundle` that is none.
    """
    reason = _not_for_us(settings)
    if reason:
        _log.info("backend %s: all requests go by the client library: %s", settings.backend_id, reason)
        return None
    return S3Native(settings, run)


def _not_for_us(settings: S3Settings) -> str:
    try:
        signer = Signer(settings)
        signer.host.encode("idna")
    except ValueError as exc:
        return f"endpoint_url = {settings.endpoint_url!r}: {exc}"
    proxies = getproxies()
    scheme = settings.endpoint_url.partition(":")[0]
    if (scheme in proxies or "all" in proxies) and not proxy_bypass(signer.host):
        return "a proxy is set in the environment"
    return ""


class S3Native:
    """All methods are for trio, and raise StorageError for whatever happens outside the process."""

    def __init__(self, settings: S3Settings, run: InLibrary) -> None:
        self._settings = settings
        self._run = run
        self._credentials = SigningCredentials(settings, run)
        self._signer = Signer(settings)
        try:
            tls = tls_context(settings.ca_bundle) if self._signer.is_tls else None
        except ConfigError as exc:
            raise StorageRejected(f"backend {settings.backend_id}: {exc}") from exc
        self._transfer = Transfer(
            Endpoint(self._signer.host, self._signer.port, tls),
            connect_timeout_s=settings.connect_timeout_seconds,
            timeout_s=settings.read_timeout_seconds,
            max_connections=settings.max_connections,
        )

    def close(self) -> None:
        self._transfer.close()

    @staticmethod
    def does(operation: str, params: Mapping[str, Any]) -> bool:
        """Whether `call` knows the operation, and all that is said of it."""
        return operation in _METHODS and params.keys() <= _KNOWN

    async def receive(self, what: str, key: str, offset: int, target: memoryview) -> None:
        """Fill `target`, which is not empty, with the object's bytes from `offset` on. Untouched after this returns."""
        length = len(target)

        def placing(answer: Answer) -> Place | None:
            if not _is_good(answer):
                return None
            sent = answer.headers.get("content-length")
            skip = bytes_before(
                self._settings,
                what,
                status=answer.status,
                sent=None if sent is None or "transfer-encoding" in answer.headers else int(sent),
                content_range=answer.headers.get("content-range", ""),
                offset=offset,
                length=length,
            )
            return Place(target, skip)

        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        target_of_key = self._signer.target(key)
        await self._request(what, "get_object", "GET", target_of_key, headers, placing=placing, reading=_nothing)

    async def call(self, what: str, operation: str, params: Mapping[str, Any], body: io.BytesIO | None = None) -> Any:
        """The answer to an operation that `does` knows, by the names of the client library."""
        query = {name: str(params[param]) for param, name in _QUERY.items() if param in params}
        headers = {name: params[param] for param, name in _HEADERS.items() if param in params}
        target = self._signer.target(params["Key"], **query)
        method = _METHODS[operation]
        if body is None:
            return await self._request(what, operation, method, target, headers)
        with body.getbuffer() as view:
            # The signature covers Content-MD5, and that the body, as a presigned request has it. Hashing parts once
            # more would cost a quarter of a put's processor time; over TLS the client library spares it, too.
            by_md5 = "Content-MD5" in headers and (operation == "upload_part" or self._signer.is_tls)
            sha256 = UNSIGNED if by_md5 else await _sha256(view)
            return await self._request(what, operation, method, target, headers, view, sha256)

    async def _request(
        self,
        what: str,
        operation: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: memoryview | None = None,
        sha256: str = NO_BODY,
        placing: Placing = lambda _: None,
        reading: Callable[[Answer], dict[str, Any]] = _said,
    ) -> dict[str, Any]:
        async def send(credentials: Hidden) -> Answer:
            request = Request(method, target, self._signer.signed(credentials, method, target, headers, sha256), body)
            return await self._transfer.exchange(request, placing)

        try:
            credentials = await self._credentials.current()
            answer = await send(credentials)
            refusal = _refusal(answer, operation)
            if refusal is not None and refuses_credentials(refusal):
                others = await self._credentials.after(credentials)
                if others != credentials:  # they came while it was under way
                    answer = await send(others)
                    refusal = _refusal(answer, operation)
            if refusal is not None:
                raise refusal
            return reading(answer)
        except TransferError as exc:
            clear_locals(exc)
            raise storage_error(self._foreign(exc), self._settings, what) from exc
        except FOREIGN as exc:
            error = storage_error(exc, self._settings, what)
            if isinstance(error, ObjectMissing) and code_of(exc) not in _SAYS_WHAT_IS_MISSING:
                error = await self._run(_what_is_missing, what, error)
            raise error from exc

    def _foreign(self, exc: TransferError) -> Any:
        """The error by which the client library says the same."""
        place = self._settings.endpoint_url
        cause = exc.__cause__ or exc
        match exc:
            case ConnectTimeout():
                return ConnectTimeoutError(endpoint_url=place)
            case CannotConnect():
                return EndpointConnectionError(endpoint_url=place, error=cause)
            case UnsafeConnection():
                return SSLError(endpoint_url=place, error=cause)
            case NoAnswer():
                return ReadTimeoutError(endpoint_url=place)
            case _:
                return HTTPClientError(error=cause)


async def _what_is_missing(client: S3Client, what: str, missing: ObjectMissing) -> StorageError:
    return await client.what_is_missing(what, missing)


async def _sha256(view: memoryview) -> str:
    if len(view) <= HASH_INLINE_BYTES:
        return hashlib.sha256(view).hexdigest()
    return (await trio.to_thread.run_sync(hashlib.sha256, view)).hexdigest()


def _refusal(answer: Answer, operation: str) -> ClientError | None:
    """The same of a bad one: what its body says in XML, if it does (Amazon S3 API reference, "Error responses")."""
    if _is_good(answer):
        return None
    error = {"Code": "", "Message": ""}
    if answer.body:
        with suppress(ElementTree.ParseError, ValueError):
            for child in ElementTree.fromstring(answer.body):
                name = child.tag.rpartition("}")[2]
                if name in error:
                    error[name] = child.text or ""
    said = {"Error": error, "ResponseMetadata": {"HTTPStatusCode": answer.status, "HTTPHeaders": answer.headers}}
    return ClientError(said, operation)
