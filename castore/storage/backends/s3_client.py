"""One aioboto3 client: its configuration, its credentials, and calls whose errors are StorageErrors.

Runs in the asyncio loop, and only there; it imports no asyncio, and nothing of trio.
"""

from __future__ import annotations

import io
from contextlib import AsyncExitStack
from typing import Any, Final

import aioboto3
from aiobotocore.session import AioSession
from botocore.exceptions import ClientError

from castore import __version__
from castore.config_backends import S3Settings
from castore.errors import ConfigError, ObjectMissing, StorageError, StorageRejected
from castore.storage.backends.s3_credentials import Credentials, credentials_of
from castore.storage.backends.s3_errors import FOREIGN, code_of, refuses_credentials, status_of, storage_error
from castore.storage.backends.s3_http import stay_in_region
from castore.storage.backends.s3_ranges import bytes_before, strange
from castore.storage.backends.s3_tls import TLSConfig, tls_context

_SMALL_BODY_BYTES: Final = 1 << 20
"""Bodies up to this are sent at once; before larger ones the server is asked (`Expect: 100-continue`), which costs a
round trip, and spares sending what is going to be refused."""
_SAYS_WHAT_IS_MISSING: Final = frozenset({"NoSuchKey", "NoSuchUpload"})


class S3Client:
    """All methods are for the asyncio loop, and raise StorageError for whatever happens outside the process.

    `what` is what a call is about, in words for the error's text.
    """

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._credentials = credentials_of(settings)
        self._stack = AsyncExitStack()
        self._client: Any = None

    async def open(self) -> None:
        """Load what the client library needs, a tenth of a second of work. Asks nothing of the server."""
        # No profile, no file and no variable of the user's AWS tools counts: the settings do, and if they leave the
        # credentials to those tools, nothing else of them.
        nowhere = (None, None, None, None)
        session = AioSession({"profile": nowhere, "config_file": nowhere, "credentials_file": nowhere})
        session.register_component("credential_provider", self._credentials)
        session.user_agent_extra = f"castore/{__version__}"
        settings = self._settings
        try:
            tls = tls_context(settings.ca_bundle)
        except ConfigError as exc:
            raise StorageRejected(f"backend {settings.backend_id}: {exc}") from exc
        config = TLSConfig(
            tls,
            signature_version="s3v4",
            connect_timeout=settings.connect_timeout_seconds,
            read_timeout=settings.read_timeout_seconds,
            max_pool_connections=settings.max_connections,
            retries={"total_max_attempts": 1, "mode": "standard"},  # RetryingBackend tries again
            s3={"addressing_style": settings.addressing_style},
            # Other checksums break servers that do not know them; Content-MD5 is what all of them check.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            use_dualstack_endpoint=False,
            use_fips_endpoint=False,
        )
        client = aioboto3.Session(botocore_session=session).client(
            "s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=config
        )
        try:
            self._client = await self._stack.enter_async_context(client)
            self._client.meta.events.register_last("before-call.s3", _ask_first_for_large_bodies)
            self._client.meta.events.register_last("before-call.s3", stay_in_region)
        except ValueError as exc:
            raise StorageRejected(f"backend {settings.backend_id}: {exc}; check endpoint_url") from exc
        except FOREIGN as exc:
            raise storage_error(exc, settings, "open") from exc

    @property
    def library_client(self) -> Any:
        """The client library's own client: a probe wants answers as they are, not as errors of this project."""
        return self._client

    @property
    def credentials(self) -> Credentials:
        """What it signs with."""
        return self._credentials

    async def close(self) -> None:
        await self._stack.aclose()

    async def call(self, what: str, operation: str, params: dict[str, Any], body: io.BytesIO | None = None) -> Any:
        """The answer to one request in the bucket. Raises ObjectMissing only when the bucket is there."""
        try:
            return await self._request(operation, params, body)
        except FOREIGN as exc:
            error = storage_error(exc, self._settings, what)
            if isinstance(error, ObjectMissing) and code_of(exc) not in _SAYS_WHAT_IS_MISSING:
                error = await self.what_is_missing(what, error)
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
            if not refuses_credentials(exc) or not await self._credentials.changed():
                raise
        return await self._send(operation, params, body)  # with those that came while it was under way

    async def _send(self, operation: str, params: dict[str, Any], body: io.BytesIO | None) -> Any:
        arguments = {"Bucket": self._settings.bucket, **params}
        if body is not None:
            body.seek(0)
            arguments["Body"] = body
        return await getattr(self._client, operation)(**arguments)

    async def what_is_missing(self, what: str, missing: ObjectMissing) -> StorageError:
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
        return bytes_before(
            self._settings,
            what,
            status=response["ResponseMetadata"]["HTTPStatusCode"],
            sent=response.get("ContentLength"),
            content_range=str(response.get("ContentRange", "")),
            offset=offset,
            length=length,
        )

    async def _fill(self, what: str, stream: Any, skip: int, target: memoryview) -> None:
        done = 0
        async for chunk in stream.iter_any():
            part = memoryview(chunk)[skip : skip + len(target) - done]
            skip = max(0, skip - len(chunk))
            target[done : done + len(part)] = part
            done += len(part)
            if done == len(target):
                return
        raise strange(self._settings, what, f"{done} of {len(target)} bytes")


def _ask_first_for_large_bodies(params: dict[str, Any], **_: Any) -> None:
    """A handler of the client library, which by itself asks before any body."""
    body = params["body"]
    if isinstance(body, io.BytesIO):
        size = body.seek(0, io.SEEK_END)  # `getbuffer` would copy it
        body.seek(0)
        if size <= _SMALL_BODY_BYTES:
            params["headers"].pop("Expect", None)
