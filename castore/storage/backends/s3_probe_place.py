"""The place of one probe in a bucket: keys that nobody else uses, requests to them, and nothing left behind."""

from __future__ import annotations

import itertools
import uuid
from base64 import b64encode
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from email.utils import parsedate_to_datetime
from hashlib import md5
from typing import TYPE_CHECKING, Any, Final

import trio

from castore.config_backends import S3Settings
from castore.errors import StorageError, StorageUnavailable
from castore.storage.backends.s3_connection import S3Connection
from castore.storage.probing import Reply

if TYPE_CHECKING:
    from castore.storage.backends.s3_client import S3Client
    from castore.storage.backends.s3_probe_requests import Answer

LEFTOVER_S: Final = 900.0
"""Age in seconds, by the server's clock, of what a killed probe left: beyond the 300 s that one may take, and a clock
that is minutes off in a cluster."""

CLEAN_S: Final = 30.0
"""Seconds that a probe may take to remove what it made, also when it was cancelled: a hundred requests, some at a
time."""

_CLEANERS: Final = 8
"""Requests at a time while cleaning up."""
_FOLDER: Final = "probe/"
"""Below the backend's prefix. No digest algorithm is called so: no object of the layout lies here."""


class ProbePlace:
    """A folder of its own in the bucket. Methods raise StorageError when there is no answer to speak of."""

    def __init__(self, connection: S3Connection, settings: S3Settings) -> None:
        self.settings = settings
        self._connection = connection
        above = f"{settings.key_prefix}/" if settings.key_prefix else ""
        self.all_probes = above + _FOLDER
        self.prefix = f"{self.all_probes}{uuid.uuid4()}/"
        self._numbers = itertools.count(1)
        self._keys: list[str] = []
        self._uploads: list[dict[str, Any]] = []
        self.server = ""

    def new_key(self, name: str = "object") -> str:
        """A key that has not been used before, below a folder of its own."""
        return self.add_key(f"{self.prefix}{next(self._numbers):04}/{name}")

    def add_key(self, key: str) -> str:
        """Remember a key below one that `new_key` gave, so that `clean` removes it."""
        self._keys.append(key)
        return key

    async def ask(
        self, operation: str, body: bytes | None = None, *, damaged: bool = False, trailer: str = "", **params: Any
    ) -> Answer:
        """The answer to one request, good or bad. `damaged` and `trailer` are those of `Wrong`."""
        return await self._connection.run(
            _ask, self.settings, f"probe: {operation}", operation, params, body, damaged, trailer
        )

    async def done(self, operation: str, body: bytes | None = None, **params: Any) -> Answer:
        """The same for requests that have to succeed before a question can be asked. Raises StorageUnavailable."""
        answer = await self.ask(operation, body, **params)
        if not answer.good:
            raise StorageUnavailable(
                f"backend {self.settings.backend_id}: probe: {operation}: {self.settings.endpoint_url} answers {answer}"
            )
        return answer

    async def put(self, key: str, data: bytes, **params: Any) -> Answer:
        """A put as castore does it, which has to succeed."""
        return await self.done("put_object", data, Key=key, ContentMD5=md5_base64(data), **params)

    async def get(self, key: str, span: str = "") -> Answer:
        ranged: dict[str, Any] = {"Range": span} if span else {}
        return await self.ask("get_object", Key=key, **ranged)

    async def head(self, key: str) -> Answer:
        return await self.ask("head_object", Key=key)

    async def begin(self, key: str) -> dict[str, Any]:
        """Begin an upload in parts: what names it in further requests."""
        answer = await self.done("create_multipart_upload", Key=key)
        with self._connection.reading("probe"):
            upload = {"Key": key, "UploadId": answer.fields["UploadId"]}
        self._uploads.append(upload)
        return upload

    async def put_part(self, upload: dict[str, Any], number: int, data: bytes) -> dict[str, Any]:
        """Send a part as castore does it; how it is named when the upload is completed."""
        answer = await self.done("upload_part", data, **upload, PartNumber=number, ContentMD5=md5_base64(data))
        return {"PartNumber": number, "ETag": answer.fields.get("ETag", "")}

    async def complete(self, upload: dict[str, Any], parts: list[dict[str, Any]], **params: Any) -> Answer:
        return await self.ask("complete_multipart_upload", **upload, MultipartUpload={"Parts": parts}, **params)

    async def refuses_wrong(
        self, right: Callable[[str], Awaitable[Answer]], wrong: Callable[[str], Awaitable[Answer]]
    ) -> Reply:
        """Whether, of two puts to keys that they are given, the right one is taken and the wrong one stores nothing."""
        answer = await right(self.new_key("right"))
        if not answer.good:
            return Reply("not supported", f"the right one is refused too: {answer}")
        key = self.new_key("wrong")
        answer = await wrong(key)
        if answer.good:
            return Reply("no", f"the wrong one is taken: {answer}")
        if not (await self.head(key)).says_missing:
            return Reply("no", f"{answer}, but something is stored")
        return Reply("yes", str(answer))

    # what is left

    async def sweep(self) -> None:
        """Find out whether anything can be asked, and remove what killed probes left some time ago.

        Raises StorageError when the server does not even list the bucket.
        """
        page = await self._connection.call("probe", "list_objects_v2", Prefix=self.all_probes, MaxKeys=1)
        headers = page["ResponseMetadata"]["HTTPHeaders"]
        self.server = str(headers.get("server", ""))
        with trio.move_on_after(CLEAN_S), suppress(StorageError), self._connection.reading("probe"):
            silent_since = parsedate_to_datetime(headers["date"]) - timedelta(seconds=LEFTOVER_S)
            for entry in await self._all("list_objects_v2", "Contents", "ContinuationToken"):
                if entry["LastModified"] < silent_since:
                    await self.ask("delete_object", Key=entry["Key"])
            for upload in await self._all("list_multipart_uploads", "Uploads", "KeyMarker", "UploadIdMarker"):
                if upload["Initiated"] < silent_since:
                    await self.ask("abort_multipart_upload", Key=upload["Key"], UploadId=upload["UploadId"])

    async def _all(self, operation: str, items: str, *markers: str) -> list[Any]:
        found: list[Any] = []
        position: dict[str, Any] = {}
        while True:
            page = (await self.done(operation, Prefix=self.all_probes, **position)).fields
            found += page.get(items, ())
            if not page.get("IsTruncated"):
                return found
            position = {marker: page[f"Next{marker}"] for marker in markers}

    async def clean(self) -> None:
        """Remove all that this probe made, as far as the server lets it within CLEAN_S."""
        # By what was made, not by what is listed: whether listings are right is one of the questions.
        left: list[tuple[str, dict[str, Any]]] = [("abort_multipart_upload", upload) for upload in self._uploads]
        left += [("delete_object", {"Key": key}) for key in self._keys]
        turns = trio.CapacityLimiter(_CLEANERS)

        async def remove(operation: str, names: dict[str, Any]) -> None:
            async with turns:
                with suppress(StorageError):
                    await self.ask(operation, **names)

        with trio.move_on_after(CLEAN_S, shield=True):
            async with trio.open_nursery() as nursery:
                for operation, names in left:
                    nursery.start_soon(remove, operation, names)


def md5_base64(data: bytes) -> str:
    """The value of `Content-MD5` (RFC 1864)."""
    return b64encode(md5(data, usedforsecurity=False).digest()).decode()


async def _ask(
    client: S3Client,
    settings: S3Settings,
    what: str,
    operation: str,
    params: dict[str, Any],
    body: bytes | None,
    damaged: bool,
    trailer: str,
) -> Answer:
    # Here, because the import takes half a second, which nobody waits for in this thread.
    from castore.storage.backends.s3_probe_requests import Wrong, ask

    return await ask(client, settings, what, operation, params, body, Wrong(damaged, trailer))
