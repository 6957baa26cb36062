"""One aioboto3 client: its configuration, its credentials, and calls whose errors are StorageErrors.

Runs in the asyncio loop, and only there; it imports no asyncio, and nothing of trio.
"""

from __future__ import annotations

import io
import logging
import ssl
from contextlib import AsyncExitStack
from contextvars import ContextVar
from typing import Any, Final

import aioboto3
from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import AioSession
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import ClientError

from castore import __version__
from castore.config_backends import S3Settings
from castore.config_values import SecretRef
from castore.errors import ObjectMissing, ObjectTruncated, StorageError, StorageRejected, StorageUnavailable
from castore.storage.backends.s3_errors import FOREIGN, code_of, status_of, storage_error

CONNECT_TIMEOUT_S: Final = 5.0
"""Seconds for a connection: a host that is up answers in less than one, also across an ocean."""
READ_TIMEOUT_S: Final = 30.0
"""Seconds of silence that end a request, as long as a deadline allows for a call that moves no bytes."""
MAX_CONNECTIONS: Final = 64
"""Requests at a time; more wait. Above what the bounds on reads, writes and parts allow together."""

_SMALL_BODY_BYTES: Final = 1 << 20
"""Bodies up to this are sent at once; before larger ones the server is asked (`Expect: 100-continue`), which costs a
round trip, and spares sending what is going to be refused."""
_SAYS_WHAT_IS_MISSING: Final = frozenset({"NoSuchKey", "NoSuchUpload"})

for _name in ("aioboto3", "aiobotocore", "boto3", "botocore"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # below, they log whole requests: key ids and signatures


class S3Client:
    """All methods are for the asyncio loop, and raise StorageError for whatever happens outside the process.

    `what` is what a call is about, in words for the error's text.
    """

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._credentials = _ReferencedCredentials(settings.access_key_ref, settings.secret_key_ref)
        self._stack = AsyncExitStack()
        self._client: Any = None

    async def open(self) -> None:
        """Load what the client library needs, a tenth of a second of work. Asks nothing of the server."""
        # The settings are all there is: no profile, no file and no variable of the user's AWS tools counts.
        nowhere = (None, None, None, None)
        session = AioSession({"profile": nowhere, "config_file": nowhere, "credentials_file": nowhere})
        session.register_component("credential_provider", _Provider(self._credentials))
        session.user_agent_extra = f"castore/{__version__}"
        config = AioConfig(
            http_session_cls=_HTTPSession,
            signature_version="s3v4",
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=MAX_CONNECTIONS,
            retries={"total_max_attempts": 1, "mode": "standard"},  # RetryingBackend tries again
            s3={"addressing_style": "path"},
            # Other checksums break servers that do not know them; Content-MD5 is what all of them check.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            use_dualstack_endpoint=False,
            use_fips_endpoint=False,
        )
        client = aioboto3.Session(botocore_session=session).client(
            "s3", endpoint_url=self._settings.endpoint_url, region_name=self._settings.region, config=config
        )
        try:
            self._client = await self._stack.enter_async_context(client)
            self._client.meta.events.register_last("before-call.s3", _ask_first_for_large_bodies)
        except ValueError as exc:
            raise StorageRejected(f"backend {self._settings.backend_id}: {exc}; check endpoint_url") from exc
        except FOREIGN as exc:
            raise storage_error(exc, self._settings, "open") from exc

    async def close(self) -> None:
        await self._stack.aclose()

    async def call(self, what: str, operation: str, params: dict[str, Any], body: io.BytesIO | None = None) -> Any:
        """The answer to one request in the bucket. Raises ObjectMissing only when the bucket is there."""
        try:
            return await self._request(operation, params, body)
        except FOREIGN as exc:
            error = storage_error(exc, self._settings, what)
            if isinstance(error, ObjectMissing) and code_of(exc) not in _SAYS_WHAT_IS_MISSING:
                error = await self._what_is_missing(what, error)
            raise error from exc

    async def receive(self, what: str, key: str, offset: int, target: memoryview) -> None:
        """Fill `target`, which is not empty, with the object's bytes from `offset` on."""
        span = f"bytes={offset}-{offset + len(target) - 1}"
        response = await self.call(what, "get_object", {"Key": key, "Range": span})
        body = response["Body"]
        try:
            await self._fill(what, body.content, self._bytes_before(what, response, offset, len(target)), target)
        except FOREIGN as exc:
            raise storage_error(exc, self._settings, what) from exc
        finally:
            body.close()  # drops the connection, unless the body was read to its end

    async def bucket_exists(self, what: str) -> bool:
        """Whether it does. Raises StorageError when the server does not say."""
        try:
            await self._request("head_bucket", {})
        except FOREIGN as exc:
            if status_of(exc) == 404:
                return False
            raise storage_error(exc, self._settings, what) from exc
        return True

    async def _request(self, operation: str, params: dict[str, Any], body: io.BytesIO | None = None) -> Any:
        try:
            return await self._send(operation, params, body)
        except ClientError as exc:
            if status_of(exc) != 403 or not self._credentials.changed():
                raise
        return await self._send(operation, params, body)  # with those that came while it was under way

    async def _send(self, operation: str, params: dict[str, Any], body: io.BytesIO | None) -> Any:
        arguments = {"Bucket": self._settings.bucket, **params}
        if body is not None:
            body.seek(0)
            arguments["Body"] = body
        return await getattr(self._client, operation)(**arguments)

    async def _what_is_missing(self, what: str, missing: ObjectMissing) -> StorageError:
        """A 404 without a reason may mean the bucket, and then nothing is known of any object."""
        try:
            if await self.bucket_exists(what):
                return missing
        except StorageError as exc:
            return exc
        settings = self._settings
        return StorageRejected(
            f"backend {settings.backend_id}: {what}: {settings.endpoint_url} has no such bucket; "
            f'check bucket = "{settings.bucket}", or run `castore init` to make it'
        )

    def _bytes_before(self, what: str, response: Any, offset: int, length: int) -> int:
        """Proves that the answer holds the range that was asked for; how many bytes come before it."""
        end = offset + length
        sent = response.get("ContentLength")
        if response["ResponseMetadata"]["HTTPStatusCode"] == 200:  # the whole object: no ranges are known there
            if sent is None or sent < end:
                raise self._strange(what, f"{sent} bytes, for {length} from byte {offset}")
            return offset
        span, _, total = str(response.get("ContentRange", "")).partition("/")
        if total.isascii() and total.isdigit() and int(total) < end:
            raise ObjectTruncated(
                f"backend {self._settings.backend_id}: {what}: the object has {total} bytes, {end} are needed"
            )
        if span != f"bytes {offset}-{end - 1}" or sent not in (length, None):
            raise self._strange(what, f"{sent} bytes called {span!r}, for {length} from byte {offset}")
        return 0

    async def _fill(self, what: str, stream: Any, skip: int, target: memoryview) -> None:
        done = 0
        async for chunk in stream.iter_any():
            part = memoryview(chunk)[skip : skip + len(target) - done]
            skip = max(0, skip - len(chunk))
            target[done : done + len(part)] = part
            done += len(part)
            if done == len(target):
                return
        raise self._strange(what, f"{done} of {len(target)} bytes")

    def _strange(self, what: str, answer: str) -> StorageUnavailable:
        settings = self._settings
        return StorageUnavailable(f"backend {settings.backend_id}: {what}: {settings.endpoint_url} sent {answer}")


class _HTTPSession(AIOHTTPSession):  # type: ignore[misc]
    """The client library's own, and the certificate has to be for the endpoint's host.

    aiobotocore 2.25 leaves that check to urllib3, which it does not use: it takes any certificate of a known authority.
    """

    def _get_ssl_context(self) -> ssl.SSLContext:
        context: ssl.SSLContext = super()._get_ssl_context()
        context.check_hostname = True
        return context


def _ask_first_for_large_bodies(params: dict[str, Any], **_: Any) -> None:
    """A handler of the client library, which by itself asks before any body."""
    body = params["body"]
    if isinstance(body, io.BytesIO):
        size = body.seek(0, io.SEEK_END)  # `getbuffer` would copy it
        body.seek(0)
        if size <= _SMALL_BODY_BYTES:
            params["headers"].pop("Expect", None)


class _ReferencedCredentials:
    """Credentials for the client library, resolved anew for each signature; never kept, so never shown."""

    method: Final = "castore"
    token: Final = None

    def __init__(self, access_key_ref: SecretRef, secret_key_ref: SecretRef) -> None:
        self._access_key_ref = access_key_ref
        self._secret_key_ref = secret_key_ref

    async def get_frozen_credentials(self) -> ReadOnlyCredentials:
        credentials = self._resolve()
        _signed_with.set(credentials)
        return credentials

    async def get_account_id(self) -> None:
        return None

    def get_deferred_property(self, name: str) -> Any:
        return self.get_account_id

    def changed(self) -> bool:
        """Whether they differ from what this task signed with last."""
        return bool(_signed_with.get() != self._resolve())

    def _resolve(self) -> ReadOnlyCredentials:
        return ReadOnlyCredentials(self._access_key_ref.resolve(), self._secret_key_ref.resolve(), None)


_signed_with: ContextVar[ReadOnlyCredentials | None] = ContextVar("_signed_with", default=None)


class _Provider:
    """Takes the place of the client library's search for credentials."""

    def __init__(self, credentials: _ReferencedCredentials) -> None:
        self._credentials = credentials

    async def load_credentials(self) -> _ReferencedCredentials:
        return self._credentials
