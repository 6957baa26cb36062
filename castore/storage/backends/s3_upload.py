"""Puts: in one request up to a threshold, in parts above it, and the proof that what arrived is what was sent.

A put in parts that breaks off leaves what it uploaded when it may succeed later: the next one of that object takes
the upload up and sends what is missing. One that cannot succeed aborts its upload.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import trio

from castore.config_backends import S3Settings
from castore.digest import Digest
from castore.errors import ObjectMissing, StorageDenied, StorageError, StorageRejected, StorageUnavailable
from castore.failpoint import failpoint
from castore.storage.backends.s3_connection import S3Connection
from castore.storage.backends.s3_parts import MAX_OBJECT_BYTES, Buffers, Part, PartReader, part_sizes
from castore.storage.backends.s3_unfinished import HeldPart, Unfinished, UnfinishedUploads, server_time
from castore.storage.spi import Source

PARTS_IN_FLIGHT: Final = 4
"""Parts, or whole bodies, that a backend holds in memory at a time, so 64 MiB with the default settings; of parts that
are larger than `multipart_chunk_bytes` fewer. On loopback more gain nothing; on a long way 4 parts of 16 MiB fill
500 Mbit/s at a second for each."""
SMALL_BODY_BYTES: Final = 1 << 20
"""Bodies up to this do not count: the bound on puts at a time bounds them, too."""
SOURCE_THREADS: Final = 8
"""Threads that read sources: one for each put at a time. A disk that hangs costs no more than these."""
FINISH_S: Final = 5.0
"""Seconds that the parts under way have left when one failed for now: what arrives is not sent again by the next try,
and 16 MiB at 3 MiB/s do."""
ABORT_S: Final = 2.0
"""Seconds that a put takes at most to abort an upload that is of no use any more; else `abandon` or `sweep` does."""

_MD5_ETAG: Final = re.compile(r'"?([0-9a-f]{32})"?')
_PARTS_ETAG: Final = re.compile(r'"?([0-9a-f]{32}-[0-9]+)"?')
_CLOCK_SLACK: Final = timedelta(seconds=5)
"""A server's hosts, whose clocks differ a little, count one moment as before another."""


@dataclass(slots=True)
class _Upload:
    """The upload that a put works on, and the parts of it that are there already."""

    found: Unfinished
    held: Mapping[int, HeldPart] = field(default_factory=dict)
    can_be_taken_up: bool = True
    """Whether the next put of the object can find it and make use of it."""
    ended: StorageError | None = None
    """That somebody else ended it, as the server put it."""
    md5s: list[bytes] = field(default_factory=list)
    etags: dict[int, str] = field(default_factory=dict)

    @property
    def etag(self) -> str:
        """What servers make of the MD5s of all parts; no document says so, but all that have MD5s do."""
        of_parts = hashlib.md5(b"".join(self.md5s), usedforsecurity=False)
        return f"{of_parts.hexdigest()}-{len(self.md5s)}"


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
        if settings.sse_kms_key_id is not None:
            self._attributes["SSEKMSKeyId"] = settings.sse_kms_key_id
        self._hides_md5s = (settings.sse or "").startswith("aws:kms")
        self._unfinished = UnfinishedUploads(connection)
        self._begun: set[str] = set()
        """Ids of uploads that this process began, and so with the attributes that are wanted."""
        self._busy: set[str] = set()
        """Ids of those that a put of this process works on."""
        self._buffers = Buffers(PARTS_IN_FLIGHT, settings.multipart_chunk_bytes)
        self._threads = trio.CapacityLimiter(SOURCE_THREADS)

    async def put(self, digest: Digest, source: Source, key: str) -> None:
        """Store the source's bytes under `key`. Raises StorageError; then, or when cancelled, no object is stored."""
        reader = PartReader(digest, source, self._threads)
        what = f"put {digest}"
        size = source.size_bytes
        if size > MAX_OBJECT_BYTES:
            raise StorageRejected(
                f"backend {self._backend_id}: {what}: {size} bytes, but an object has {MAX_OBJECT_BYTES} (5 TiB) at "
                "most; split the file, or route its package to a backend of another type"
            )
        try:
            if size <= self._threshold_bytes:
                await self._put_whole(what, key, reader, size)
            else:
                await self._put_parts(what, key, reader, size)
        finally:
            reader.close()

    async def abandon(self, digest: Digest, key: str) -> None:
        """Abort every upload to the key."""
        what = f"abandon {digest}"
        for upload in await self._unfinished.of_key(what, key):
            self._begun.discard(upload.upload_id)
            await self._unfinished.abort(what, upload)

    # in one request

    async def _put_whole(self, what: str, key: str, reader: PartReader, size: int) -> None:
        if size <= SMALL_BODY_BYTES:
            await self._send_whole(what, key, await reader.read(size, io.BytesIO()), size)
            return
        part = await self._next_part(reader, size)
        try:
            await self._send_whole(what, key, part, size)
        finally:
            self._buffers.give_back(size, part.stream)

    async def _send_whole(self, what: str, key: str, part: Part, size: int) -> None:
        answer = await self._connection.write(
            what, "put_object", part.stream, ContentMD5=part.md5_base64, Key=key, **self._attributes
        )
        # The MD5 of what arrived is proof enough; asking again would double the cost of a small put.
        if not self._encrypted(answer) or not self._proves(what, answer, _MD5_ETAG, part.md5.hex()):
            await self._prove(what, key, size, _MD5_ETAG, part.md5.hex())

    async def _next_part(self, reader: PartReader, size: int) -> Part:
        """Read into a buffer, which the caller gives back."""
        stream = await self._buffers.take(size)
        try:
            return await reader.read(size, stream)
        except BaseException:
            self._buffers.give_back(size, None)
            raise

    # in parts

    async def _put_parts(self, what: str, key: str, reader: PartReader, size: int) -> None:
        sizes = list(part_sizes(size, self._chunk_bytes))
        upload = await self._open_upload(what, key, sizes)
        try:
            await self._send_parts(what, upload, reader, sizes)
            await self._complete(what, upload, size)
        except BaseException as exc:  # cancelled, too, with what else was under way
            if not upload.can_be_taken_up or (isinstance(exc, StorageError) and not exc.temporary):
                await self._abort(what, upload.found)
            raise
        finally:
            self._busy.discard(upload.found.upload_id)
        self._begun.discard(upload.found.upload_id)
        await self._abort_others(what, upload.found)

    async def _open_upload(self, what: str, key: str, sizes: list[int]) -> _Upload:
        """One that was broken off, by this or by another process; or a new one. No other put of this process has it.

        One that another process works on just now may be taken, too: both send the same bytes.
        """
        found: list[Unfinished] = []
        can_be_taken_up = not self._hides_md5s
        try:
            found = await self._unfinished.of_key(what, key)
        except (StorageDenied, StorageRejected):
            can_be_taken_up = False  # credentials that may put, and not list: no reason to refuse
        found = [item for item in found if item.upload_id not in self._busy]
        for candidate in found if can_be_taken_up else ():
            if candidate.upload_id in self._busy:
                continue
            self._busy.add(candidate.upload_id)
            held: dict[int, HeldPart] | None = None
            try:
                held = await self._held(what, candidate, sizes)
            finally:
                if held is None:
                    self._busy.discard(candidate.upload_id)
            if held is not None:
                return _Upload(candidate, held)
        upload = await self._begin(what, key)
        upload.can_be_taken_up = can_be_taken_up
        return upload

    async def _held(self, what: str, candidate: Unfinished, sizes: list[int]) -> dict[int, HeldPart] | None:
        """The parts of an upload by their number; None when it is of other parts or attributes, or has ended."""
        if candidate.upload_id not in self._begun and (
            # Whether it was begun with another encryption, no server tells.
            "ServerSideEncryption" in self._attributes
            or candidate.storage_class not in ("", self._attributes["StorageClass"])
        ):
            return None
        try:
            parts = await self._unfinished.parts(what, candidate)
        except ObjectMissing:
            return None
        held = {part.number: part for part in parts}
        for part in parts:
            # SeaweedFS lists a part that came twice twice: well, if both are alike.
            if not 0 < part.number <= len(sizes) or held[part.number].etag != part.etag:
                return None
            if part.size_bytes != sizes[part.number - 1]:
                return None
        return held

    async def _begin(self, what: str, key: str) -> _Upload:
        answer = await self._connection.write(what, "create_multipart_upload", Key=key, **self._attributes)
        with self._connection.reading(what):
            found = Unfinished(key, answer["UploadId"], server_time(answer), self._attributes["StorageClass"])
        self._begun.add(found.upload_id)
        self._busy.add(found.upload_id)
        return _Upload(found)

    async def _send_parts(self, what: str, upload: _Upload, reader: PartReader, sizes: list[int]) -> None:
        """Read one part after the other and send several at a time, but none that is there already."""
        failures: list[StorageError] = []

        async def send(number: int, part: Part) -> None:
            try:
                answer = await self._connection.call(
                    what,
                    "upload_part",
                    part.stream,
                    ContentMD5=part.md5_base64,
                    **upload.found.names,
                    PartNumber=number,
                )
                with self._connection.reading(what):
                    upload.etags[number] = answer["ETag"]
                failpoint("put.part")
            except ObjectMissing as exc:
                # The upload has ended. The rest is read all the same: it tells whether the object is there.
                upload.ended = exc
            except StorageError as exc:
                failures.append(exc)
                nursery.cancel_scope.deadline = trio.current_time() + (FINISH_S if exc.temporary else 0)
            finally:
                self._buffers.give_back(sizes[number - 1], part.stream)

        async with trio.open_nursery() as nursery:
            for number, part_bytes in enumerate(sizes, 1):
                try:
                    part = await self._next_part(reader, part_bytes)
                except StorageError as exc:
                    failures.append(exc)
                    nursery.cancel_scope.cancel()
                    break
                if failures:
                    self._buffers.give_back(part_bytes, part.stream)
                    break
                upload.md5s.append(part.md5)
                held = upload.held.get(number)
                if held is None and upload.ended is None:
                    nursery.start_soon(send, number, part)
                    continue
                self._buffers.give_back(part_bytes, part.stream)
                upload.etags[number] = f'"{part.md5.hex()}"'
                if held is not None and held.etag != part.md5.hex():
                    # Sending it again would do on most servers; some keep the one that it replaces for ever.
                    upload.can_be_taken_up = False
                    failures.append(
                        StorageUnavailable(
                            f"backend {self._backend_id}: {what}: the upload that broke off holds other bytes as part "
                            f"{number}; the next one begins anew"
                        )
                    )
                    nursery.cancel_scope.cancel()
                    break
        if failures:
            raise failures[0]

    async def _complete(self, what: str, upload: _Upload, size: int) -> None:
        """Make the parts an object, and prove that it is the one that was put."""
        key, failure = upload.found.key, upload.ended
        if failure is None:
            listed = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(upload.etags.items())]
            try:
                await self._connection.call(
                    what, "complete_multipart_upload", **upload.found.names, MultipartUpload={"Parts": listed}
                )
            except StorageError as exc:
                if not exc.temporary and not isinstance(exc, ObjectMissing):
                    raise
                failure = exc
        if failure is None:
            await self._prove(what, key, size, _PARTS_ETAG, upload.etag)
            return
        # Either the answer was lost, or somebody else completed or aborted it: what is stored now decides. An object
        # from before this upload decides nothing: it may be what is to be repaired.
        with suppress(StorageError):
            answer = await self._prove(what, key, size, _PARTS_ETAG, upload.etag)
            with self._connection.reading(what):
                if answer["LastModified"] >= upload.found.initiated - _CLOCK_SLACK:
                    return
        if _refuses_the_parts(failure):
            upload.can_be_taken_up = False
        if isinstance(failure, ObjectMissing):
            raise StorageUnavailable(
                f"backend {self._backend_id}: {what}: somebody else ended the upload, and the object is not there"
            ) from failure
        raise failure

    async def _abort(self, what: str, upload: Unfinished) -> None:
        """It is of no use any more, and goes, unless that takes too long."""
        self._begun.discard(upload.upload_id)
        with trio.move_on_after(ABORT_S, shield=True), suppress(StorageError):
            await self._unfinished.abort(what, upload)

    async def _abort_others(self, what: str, completed: Unfinished) -> None:
        """The object is stored: nobody needs any other upload to its key.

        They are asked for now, and not before the put: a server that hung may have begun one since, for a request that
        its caller gave up on. The completed one is never aborted.
        """
        try:
            found = await self._unfinished.of_key(what, completed.key)
        except StorageError:
            return  # the object is stored all the same; a sweep finds them
        for other in found:
            if other.upload_id != completed.upload_id and other.upload_id not in self._busy:
                await self._abort(what, other)

    # proof

    async def _prove(self, what: str, key: str, size: int, form: re.Pattern[str], etag: str) -> Any:
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
        if not self._encrypted(answer):  # Ceph 16 takes AES256 and leaves it at that
            raise StorageRejected(
                f"backend {self._backend_id}: {what}: it is stored, but the server does not say that it is encrypted; "
                f'check sse = "{self._attributes["ServerSideEncryption"]}", which it may not know'
            )
        self._proves(what, answer, form, etag)
        return answer

    def _encrypted(self, answer: Any) -> bool:
        """Whether the object is encrypted as the settings want it, if they do."""
        wanted = self._attributes.get("ServerSideEncryption")
        return wanted is None or answer.get("ServerSideEncryption") == wanted

    def _proves(self, what: str, answer: Any, form: re.Pattern[str], etag: str) -> bool:
        """Whether the answer's ETag is made from MD5s and right. Raises StorageUnavailable when it is wrong."""
        match = form.fullmatch(answer.get("ETag", ""))
        encryption = answer.get("ServerSideEncryption") or self._attributes.get("ServerSideEncryption", "")
        if match is None or encryption.startswith("aws:kms"):  # what looks like an MD5 is none then
            return False
        if match[1] != etag:
            raise StorageUnavailable(f"backend {self._backend_id}: {what}: other bytes arrived than were sent")
        return True


def _refuses_the_parts(failure: StorageError) -> bool:
    """Whether the server says that it has not the parts that it was told to make an object of."""
    from castore.storage.backends.s3_errors import code_of  # loaded with the client by now

    return failure.__cause__ is not None and code_of(failure.__cause__) in ("InvalidPart", "InvalidPartOrder")
