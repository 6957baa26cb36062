"""The way to a bucket: the native path for what it does, the asyncio client for all else. Knows no objects.

Each is opened with the first call that needs it.
"""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

import trio

from castore.config_backends import S3Settings
from castore.errors import ObjectMissing, StorageUnavailable
from castore.storage.asyncio_thread import AsyncioThread

if TYPE_CHECKING:
    from castore.storage.backends.s3_client import S3Client
    from castore.storage.backends.s3_native import S3Native

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class S3Connection:
    """Requests to one bucket. Making one touches neither network nor disk. Methods raise StorageError."""

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._thread = AsyncioThread()
        self._opening = trio.Lock()
        self._client: S3Client | None = None
        self._native: S3Native | None = None
        self._native_is_open = settings.transfer != "native"

    async def call(self, what: str, operation: str, body: io.BytesIO | None = None, **params: Any) -> Any:
        """The server's answer, with the names of the S3 API. `what` is what it is about, for the text of an error."""
        native = self._native if self._native_is_open else await self._open_native()
        if native is not None and native.does(operation, params):
            return await native.call(what, operation, params, body)
        client = self._client or await self._open()
        return await self._thread.run(client.call, what, operation, params, body)

    async def write(self, what: str, operation: str, body: io.BytesIO | None = None, **params: Any) -> Any:
        """The same for requests that store something, for which no object can be missing.

        (Ceph answers 404 for a body that ended early.)
        """
        try:
            return await self.call(what, operation, body, **params)
        except ObjectMissing as exc:
            raise StorageUnavailable(f"{exc}: 404 for what is being stored") from exc

    async def receive(self, what: str, key: str, offset: int, target: memoryview) -> None:
        """Fill `target`, which is not empty, with an object's bytes from `offset` on. Untouched after this returns."""
        native = self._native if self._native_is_open else await self._open_native()
        if native is not None:
            await native.receive(what, key, offset, target)
            return
        client = self._client or await self._open()
        await self._thread.run(client.receive, what, key, offset, target)

    async def bucket_exists(self, what: str) -> bool:
        client = self._client or await self._open()
        return await self._thread.run(client.bucket_exists, what)

    async def run(self, function: Callable[[S3Client, *Ts], Coroutine[Any, Any, T]], *args: *Ts) -> T:
        """What `function(client, *args)` returns in the asyncio loop; StorageError is all that it may raise."""
        client = self._client or await self._open()
        return await self._thread.run(function, client, *args)

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Around the reading of an answer: one that lacks a field is the server's mistake, not the program's."""
        try:
            yield
        except (KeyError, TypeError, ValueError) as exc:
            settings = self._settings
            raise StorageUnavailable(
                f"backend {settings.backend_id}: {what}: {settings.endpoint_url} gives an answer that makes no sense: "
                f"{exc!r}"
            ) from exc

    async def _open(self) -> S3Client:
        async with self._opening:
            if self._client is None:
                self._client = await self._thread.run(_open_client, self._settings)
            return self._client

    async def _open_native(self) -> S3Native | None:
        async with self._opening:
            if not self._native_is_open:
                # In a thread: the import takes a third of a second, and so may the certificates of the host.
                self._native = await trio.to_thread.run_sync(_native, self._settings, self.run)
                self._native_is_open = True
            return self._native

    async def aclose(self) -> None:
        """Close all connections, and the asyncio thread if nobody else uses it. Idempotent."""
        native, self._native = self._native, None
        if native is not None:
            native.close()
        client, self._client = self._client, None
        if client is not None:
            await self._thread.run(client.close)
        await self._thread.aclose()


async def _open_client(settings: S3Settings) -> S3Client:
    # Here, because the import takes half a second, which nobody waits for in this thread.
    from castore.storage.backends.s3_client import S3Client

    client = S3Client(settings)
    await client.open()
    return client


def _native(settings: S3Settings, run: Callable[..., Awaitable[Any]]) -> S3Native | None:
    from castore.storage.backends.s3_native import open_native

    return open_native(settings, run)
