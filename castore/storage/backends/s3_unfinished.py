"""Uploads in parts that were begun and not ended, as the server knows them: found, read, aborted. Sends no part."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from castore.digest import Digest
from castore.errors import ObjectMissing
from castore.storage.backends.s3_connection import S3Connection
from castore.storage.layout import digest_of


@dataclass(frozen=True, slots=True)
class Unfinished:
    """One upload. `storage_class` is empty on servers that do not tell."""

    key: str
    upload_id: str
    initiated: datetime
    storage_class: str

    @property
    def names(self) -> dict[str, Any]:
        """What a request about it has to say."""
        return {"Key": self.key, "UploadId": self.upload_id}


@dataclass(frozen=True, slots=True)
class HeldPart:
    """A part that the server holds. `etag` is without quotes, and on most servers the MD5 of its bytes."""

    number: int
    size_bytes: int
    etag: str
    modified: datetime


class UnfinishedUploads:
    """Those to keys of one bucket. Methods raise StorageError; `what` is what a request is about, for its text."""

    def __init__(self, connection: S3Connection) -> None:
        self._connection = connection

    async def of_key(self, what: str, key: str) -> list[Unfinished]:
        """Those to exactly that key, the newest first."""
        found: list[Unfinished] = []
        async with aclosing(self._pages(what, key)) as pages:
            async for _, uploads in pages:
                found.extend(upload for upload in uploads if upload.key == key)
        return sorted(found, key=lambda upload: upload.initiated, reverse=True)

    async def parts(self, what: str, upload: Unfinished) -> list[HeldPart]:
        """What the server holds of it. Raises ObjectMissing when it ended."""
        found: list[HeldPart] = []
        position: dict[str, Any] | None = {}
        with self._connection.reading(what):
            while position is not None:
                page = await self._connection.call(what, "list_parts", **upload.names, **position)
                found.extend(
                    HeldPart(part["PartNumber"], part["Size"], part["ETag"].strip('"'), part["LastModified"])
                    for part in page.get("Parts", ())
                )
                position = {"PartNumberMarker": page["NextPartNumberMarker"]} if page["IsTruncated"] else None
        return found

    async def abort(self, what: str, upload: Unfinished) -> bool:
        """End it, and have its parts removed. False when somebody else ended it before."""
        try:
            await self._connection.call(what, "abort_multipart_upload", **upload.names)
        except ObjectMissing:
            return False
        return True

    async def sweep(self, prefix: str, *, grace_s: float, is_wanted: Callable[[Digest], bool] | None) -> int:
        """Abort those below the prefix that nobody sent anything to for so long, by the server's clock; how many.

        Spares strangers, and those of digests that are wanted: they are taken up again.
        """
        aborted = 0
        async with aclosing(self._pages("sweep", prefix)) as pages:
            async for now, uploads in pages:
                silent_since = now - timedelta(seconds=grace_s)
                for upload in uploads:
                    digest = digest_of(upload.key.removeprefix(prefix))
                    if digest is None or upload.initiated >= silent_since:
                        continue
                    if is_wanted is None or not is_wanted(digest):
                        aborted += await self._abort_if_silent(upload, silent_since)
        return aborted

    async def _abort_if_silent(self, upload: Unfinished, silent_since: datetime) -> bool:
        try:
            if any(part.modified >= silent_since for part in await self.parts("sweep", upload)):
                return False
        except ObjectMissing:  # somebody else ended it meanwhile
            return False
        return await self.abort("sweep", upload)

    async def _pages(self, what: str, prefix: str) -> AsyncGenerator[tuple[datetime, list[Unfinished]]]:
        """The server's time and the uploads, page by page."""
        position: dict[str, Any] | None = {}
        while position is not None:
            page = await self._connection.call(what, "list_multipart_uploads", Prefix=prefix, **position)
            with self._connection.reading(what):
                uploads = [
                    Unfinished(entry["Key"], entry["UploadId"], entry["Initiated"], entry.get("StorageClass", ""))
                    for entry in page.get("Uploads", ())
                ]
                position = None
                if page["IsTruncated"]:
                    position = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
                now = server_time(page)
            yield now, uploads


def server_time(answer: Any) -> datetime:
    """When the server answered, by its own clock, in whole seconds."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
