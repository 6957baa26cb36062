"""Puts: in one request up to a threshold, in parts above it, and the proof that what arrived is what was sent."""

from __future__ import annotations

import hashlib
import io
import re
from contextlib import suppress
from typing import Any, Final

import trio

from castore.config_backends import S3Settings
from castore.digest import Digest
from castore.errors import ObjectMissing, StorageError, StorageUnavailable
from castore.storage.backends.s3_connection import S3Connection
from castore.storage.backends.s3_parts import Buffers, Part, PartReader, part_sizes
from castore.storage.spi import Source

PARTS_IN_FLIGHT: Final = 4
"""Parts, or whole bodies, that a backend holds in memory at a time, so 64 MiB with the default settings. On loopback
more gain nothing; on a long way 4 parts of 16 MiB fill 500 Mbit/s at a second for each."""
SMALL_BODY_BYTES: Final = 1 << 20
"""Bodies up to this do not count: the bound on puts at a time bounds them, too."""
SOURCE_THREADS: Final = 8
"""Threads that read sources: one for each put at a time. A disk that hangs costs no more than these."""
ABORT_S: Final = 2.0
"""Seconds that a put that failed or was cancelled takes at most to remove what it uploaded; else `sweep` does later."""

_MD5_ETAG: Final = re.compile(r'"?([0-9a-f]{32})"?')
_PARTS_ETAG: Final = re.compile(r'"?([0-9a-f]{32}-[0-9]+)"?')


class Uploads:
    """The puts of one backend."""

    def __init__(self, connection: S3Connection, settings: S3Settings) -> None:
        self._connection = connection
        self._threshold_bytes = settings.multipart_threshold_bytes
        self._chunk_bytes = settings.multipart_chunk_bytes
        self._backend_id = settings.backend_id
        self._attributes: dict[str, Any] = {"StorageClass": settings.storage_class}
        if settings.sse is not None:
            self._attributes["ServerSideEncryption"] = settings.sse
        self._buffers = Buffers(PARTS_IN_FLIGHT)
        self._threads = trio.CapacityLimiter(SOURCE_THREADS)

    async def put(self, digest: Digest, source: Source, key: str) -> None:
        """Store the source's bytes under `key`. Raises StorageError; then, or when cancelled, nothing is stored."""
        reader = PartReader(digest, source, self._threads)
        what = f"put {digest}"
        try:
            if source.size_bytes <= self._threshold_bytes:
                await self._put_whole(what, key, reader, source.size_bytes)
            else:
                await self._put_parts(what, key, reader, source.size_bytes)
        finally:
            reader.close()

    async def _put_whole(self, what: str, key: str, reader: PartReader, size: int) -> None:
        if size <= SMALL_BODY_BYTES:
            await self._send_whole(what, key, await reader.read(size, io.BytesIO()), size)
            return
        part = await self._next_part(reader, size)
        try:
            await self._send_whole(what, key, part, size)
        finally:
            self._buffers.give_back(part.stream)

    async def _send_whole(self, what: str, key: str, part: Part, size: int) -> None:
        answer = await self._send(what, "put_object", part, Key=key, **self._attributes)
        # The MD5 of what arrived is proof enough; asking again would double the cost of a small put.
        if not self._proves(what, answer, _MD5_ETAG, part.md5.hex()):
            await self._prove(what, key, size, _MD5_ETAG, part.md5.hex())

    async def _next_part(self, reader: PartReader, size: int) -> Part:
        """Read into a buffer, which the caller gives back."""
        stream = await self._buffers.take()
        try:
            return await reader.read(size, stream)
        except BaseException:
            self._buffers.give_back(None)
            raise

    async def _put_parts(self, what: str, key: str, reader: PartReader, size: int) -> None:
        upload = await self._connection.write(what, "create_multipart_upload", Key=key, **self._attributes)
        with self._connection.reading(what):
            names = {"Key": key, "UploadId": upload["UploadId"]}
        try:
            parts = await self._send_parts(what, names, reader, size)
            listed = [{"PartNumber": number, "ETag": etag} for number, (etag, _) in sorted(parts.items())]
            await self._connection.write(what, "complete_multipart_upload", **names, MultipartUpload={"Parts": listed})
        except BaseException:
            with trio.move_on_after(ABORT_S, shield=True), suppress(StorageError):
                await self._connection.call(what, "abort_multipart_upload", **names)
            raise
        of_parts = hashlib.md5(b"".join(md5 for _, (_, md5) in sorted(parts.items())), usedforsecurity=False)
        await self._prove(what, key, size, _PARTS_ETAG, f"{of_parts.hexdigest()}-{len(parts)}")

    async def _send_parts(
        self, what: str, names: dict[str, Any], reader: PartReader, size: int
    ) -> dict[int, tuple[str, bytes]]:
        """Read one part after the other and send several at a time; ETag and MD5 of each by its number."""
        sent: dict[int, tuple[str, bytes]] = {}
        failures: list[StorageError] = []

        async def send(number: int, part: Part) -> None:
            try:
                answer = await self._send(what, "upload_part", part, **names, PartNumber=number)
                with self._connection.reading(what):
                    sent[number] = answer["ETag"], part.md5
            except StorageError as exc:
                failures.append(exc)
                nursery.cancel_scope.cancel()
            finally:
                self._buffers.give_back(part.stream)

        async with trio.open_nursery() as nursery:
            for number, part_bytes in enumerate(part_sizes(size, self._chunk_bytes), 1):
                try:
                    part = await self._next_part(reader, part_bytes)
                except StorageError as exc:
                    failures.append(exc)
                    nursery.cancel_scope.cancel()
                    break
                nursery.start_soon(send, number, part)
        if failures:
            raise failures[0]
        return sent

    async def _send(self, what: str, operation: str, part: Part, **params: Any) -> Any:
        # The one checksum that every server checks; `x-amz-checksum-*` is accepted and ignored by some (Ceph).
        return await self._connection.write(what, operation, part.stream, ContentMD5=part.md5_base64, **params)

    async def _prove(self, what: str, key: str, size: int, form: re.Pattern[str], etag: str) -> None:
        """Ask what is stored now: its size must be right, and its ETag where that is made from MD5s."""
        try:
            answer = await self._connection.call(what, "head_object", Key=key)
        except ObjectMissing as exc:
            raise StorageUnavailable(
                f"backend {self._backend_id}: {what}: not there right after it was stored"
            ) from exc
        stored = answer.get("ContentLength")
        if stored != size:
            raise StorageUnavailable(f"backend {self._backend_id}: {what}: {stored} bytes arrived of {size}")
        self._proves(what, answer, form, etag)

    def _proves(self, what: str, answer: Any, form: re.Pattern[str], etag: str) -> bool:
        """Whether the answer's ETag is made from MD5s and right. Raises StorageUnavailable when it is wrong."""
        match = form.fullmatch(answer.get("ETag", ""))
        if match is None or str(answer.get("ServerSideEncryption", "")).startswith("aws:kms"):
            return False
        if match[1] != etag:
            raise StorageUnavailable(f"backend {self._backend_id}: {what}: other bytes arrived than were sent")
        return True
