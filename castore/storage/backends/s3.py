"""The `s3` backend: a bucket of any server that speaks S3. The names of that API end here, with its neighbours s3_*.

Objects are `<key_prefix>/<key>`. The client library is aioboto3, loaded by the first call; docs/decisions says why.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import Any, Final

from castore.config_backends import S3Settings
from castore.digest import Digest
from castore.errors import ConfigError, ObjectMissing, StorageError
from castore.storage.backends.s3_connection import S3Connection
from castore.storage.backends.s3_probe import probe_s3
from castore.storage.backends.s3_unfinished import UnfinishedUploads, server_time
from castore.storage.backends.s3_upload import Uploads
from castore.storage.layout import digest_of, key_of
from castore.storage.pages import Pages
from castore.storage.receive import receiving_view
from castore.storage.spi import BackendHealth, ObjectInfo, ProbeReport, Source

READS: Final = 32
"""Reads at a time: they wait for the way there and back, not for this host."""
WRITES: Final = 8
"""Puts and deletes at a time: as many as the uploader has workers, and as a deadline reckons with."""
SWEEP_GRACE_S: Final = 3600.0
"""Silence in seconds after which an upload is abandoned. One that lives is never silent for so long: at the 1 MiB/s
that a deadline demands, 4 parts at a time of up to 900 MiB each arrive within that."""

_NO_CONSTRAINT: Final = frozenset({"us-east-1", "default"})
"""Regions that CreateBucket must not name: Amazon's first, and Ceph's."""
_NS_PER_S: Final = 1_000_000_000
_HEX: Final = re.compile("[0-9a-f]*")


class S3Backend:
    """Objects in a bucket. Making one touches no network; `create` makes the bucket.

    A missing bucket raises StorageRejected from everything but `health`. Requests that are cancelled have ended when
    the call returns. Raises ConfigError when aioboto3 is not installed.
    """

    backend_type = "s3"

    def __init__(self, settings: S3Settings) -> None:
        if find_spec("aioboto3") is None:
            raise ConfigError(
                f'backend {settings.backend_id}: type = "s3" needs aioboto3, which is not installed: '
                "pip install 'castore[s3]'"
            )
        self.backend_id = settings.backend_id
        self._settings = settings
        # More would wait for a connection, and their deadlines not with them.
        self.reads = min(READS, settings.max_connections)
        self.writes = min(WRITES, settings.max_connections)
        self._prefix = f"{settings.key_prefix}/" if settings.key_prefix else ""
        self._connection = S3Connection(settings)
        self._uploads = Uploads(self._connection, settings)
        self._unfinished = UnfinishedUploads(self._connection)

    async def create(self) -> bool:
        """Make the bucket; False when it is there. Raises StorageError."""
        if await self._connection.bucket_exists("create"):
            return False
        region = self._settings.region
        place: dict[str, Any] = {}
        if region not in _NO_CONSTRAINT:
            place["CreateBucketConfiguration"] = {"LocationConstraint": region}
        try:
            await self._connection.write("create", "create_bucket", **place)
        except StorageError:
            if not await self._connection.bucket_exists("create"):
                raise
            return False  # somebody else made it a moment before
        return True

    async def put(self, digest: Digest, source: Source) -> None:
        await self._uploads.put(digest, source, self._key(digest))

    async def get(
        self, digest: Digest, *, offset: int, length: int, into: bytearray | memoryview | None = None
    ) -> memoryview:
        target = receiving_view(offset, length, into)
        if length == 0:
            await self._head(f"get {digest}", digest)
            return target
        try:
            await self._connection.receive(f"get {digest}", self._key(digest), offset, target)
        except BaseException:
            target.release()  # the exception's traceback refers to it, but the buffer is the caller's
            raise
        return target

    async def head(self, digest: Digest) -> ObjectInfo:
        answer = await self._head(f"head {digest}", digest)
        with self._connection.reading(f"head {digest}"):
            return ObjectInfo(digest, answer["ContentLength"], _whole_seconds(answer["LastModified"]))

    async def _head(self, what: str, digest: Digest) -> Any:
        return await self._connection.call(what, "head_object", Key=self._key(digest))

    async def delete(self, digest: Digest) -> None:
        with suppress(ObjectMissing):
            await self._connection.call(f"delete {digest}", "delete_object", Key=self._key(digest))

    @asynccontextmanager
    async def list(self, algorithm: str, *, prefix: str = "") -> AsyncIterator[AsyncIterator[ObjectInfo]]:
        what = f"list {algorithm}:{prefix}*"
        start = f"{self._prefix}{algorithm}/{_folders(prefix)}"
        position: dict[str, Any] | None = {} if _HEX.fullmatch(prefix) else None

        async def next_page() -> Iterable[ObjectInfo]:
            nonlocal position
            objects: tuple[ObjectInfo, ...] = ()
            while position is not None and not objects:  # a page of strangers is not the end
                answer = await self._connection.call(what, "list_objects_v2", Prefix=start, **position)
                with self._connection.reading(what):
                    objects = tuple(self._infos(answer.get("Contents", ()), prefix))
                    more = answer["IsTruncated"]
                    position = {"ContinuationToken": answer["NextContinuationToken"]} if more else None
            return objects

        yield Pages(next_page)

    def _infos(self, contents: Iterable[Any], prefix: str) -> Iterable[ObjectInfo]:
        for entry in contents:
            digest = digest_of(entry["Key"].removeprefix(self._prefix))
            if digest is not None and digest.hex.startswith(prefix):
                yield ObjectInfo(digest, entry["Size"], _whole_seconds(entry["LastModified"]))

    async def health(self) -> BackendHealth:
        settings = self._settings
        try:
            answer = await self._connection.call("health", "list_objects_v2", Prefix=self._prefix, MaxKeys=1)
        except StorageError as exc:
            return BackendHealth("fail", str(exc))
        ahead_s = None
        with suppress(KeyError, TypeError, ValueError):  # a server need not say what time it is
            ahead_s = (datetime.now(UTC) - server_time(answer)).total_seconds()
        detail = f"bucket {settings.bucket} at {settings.endpoint_url} answers"
        return BackendHealth("pass", detail, clock_ahead_s=ahead_s)

    async def abandon(self, digest: Digest) -> None:
        await self._uploads.abandon(digest, self._key(digest))

    async def sweep(self, *, grace_s: float = SWEEP_GRACE_S, is_wanted: Callable[[Digest], bool] | None = None) -> int:
        """Abort uploads that nobody sent anything to for `grace_s` seconds, by the server's clock; how many.

        Safe at any time, beside puts of this and of other processes. Touches nothing but uploads to keys of this
        layout, and of those none of a digest that is wanted, which may be put soon.
        """
        return await self._unfinished.sweep(self._prefix, grace_s=grace_s, is_wanted=is_wanted)

    async def probe(self) -> ProbeReport:
        """What the server does and enforces, found out: see `castore.storage.spi.Probing`."""
        return await probe_s3(self._connection, self._settings)

    async def aclose(self) -> None:
        await self._connection.aclose()

    def _key(self, digest: Digest) -> str:
        return self._prefix + key_of(digest)


def _folders(prefix: str) -> str:
    """The beginning of a digest's hex as the layout writes it: `abcdef` -> `ab/cd/abcdef`."""
    if len(prefix) < 2:
        return prefix
    if len(prefix) < 4:
        return f"{prefix[:2]}/{prefix[2:]}"
    return f"{prefix[:2]}/{prefix[2:4]}/{prefix}"


def _whole_seconds(moment: datetime) -> int:
    """Nanoseconds since the epoch, without fractions: a listing gives them on some servers, an object never does."""
    return int(moment.timestamp()) * _NS_PER_S
