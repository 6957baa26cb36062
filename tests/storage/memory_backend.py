"""A backend in memory for tests of what lies above: a fake that passes the conformance suite. Not durable."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import trio

from castore.digest import Digest
from castore.errors import ObjectMissing, ObjectTruncated
from castore.storage.receive import receiving_view
from castore.storage.source import read_exactly
from castore.storage.spi import BackendHealth, ObjectInfo, Source


async def _nothing(operation: str) -> None:
    await trio.lowlevel.checkpoint()


class MemoryBackend:
    """Objects in a dictionary.

    Tests give `before` what is to happen first in every call and every step of a listing, by the name of the method:
    raise a StorageError, or wait. `calls` counts them, those that failed included.
    """

    backend_type = "memory"

    def __init__(self, backend_id: str = "memory") -> None:
        self.backend_id = backend_id
        self.before: Callable[[str], Awaitable[None]] = _nothing
        self.calls: list[str] = []
        self._objects: dict[Digest, tuple[bytes, ObjectInfo]] = {}
        self._writes = 0

    async def put(self, digest: Digest, source: Source) -> None:
        await self._begin("put")
        data = await trio.to_thread.run_sync(lambda: b"".join(read_exactly(digest, source)), abandon_on_cancel=True)
        self._writes += 1
        self._objects[digest] = data, ObjectInfo(digest, len(data), self._writes)

    async def get(
        self, digest: Digest, *, offset: int, length: int, into: bytearray | memoryview | None = None
    ) -> memoryview:
        view = receiving_view(offset, length, into)
        await self._begin("get")
        data, _ = self._find(digest)
        if length and offset + length > len(data):
            raise ObjectTruncated(f"{digest} has {len(data)} bytes")
        view[:] = data[offset : offset + length]
        return view

    async def head(self, digest: Digest) -> ObjectInfo:
        await self._begin("head")
        _, info = self._find(digest)
        return info

    async def delete(self, digest: Digest) -> None:
        await self._begin("delete")
        self._objects.pop(digest, None)

    async def abandon(self, digest: Digest) -> None:
        await self._begin("abandon")

    @asynccontextmanager
    async def list(self, algorithm: str, *, prefix: str = "") -> AsyncIterator[AsyncIterator[ObjectInfo]]:
        async with aclosing(self._infos(algorithm, prefix)) as infos:
            yield infos

    async def _infos(self, algorithm: str, prefix: str) -> AsyncGenerator[ObjectInfo]:
        for digest, (_, info) in sorted(self._objects.items()):
            if digest.algorithm == algorithm and digest.hex.startswith(prefix):
                await self._begin("list")
                yield info
        await self._begin("list")

    async def health(self) -> BackendHealth:
        await self._begin("health")
        return BackendHealth("pass", "in memory")

    async def aclose(self) -> None:
        await self._begin("aclose")

    async def _begin(self, operation: str) -> None:
        self.calls.append(operation)
        await self.before(operation)

    def _find(self, digest: Digest) -> tuple[bytes, ObjectInfo]:
        if digest not in self._objects:
            raise ObjectMissing(f"no object {digest}")
        return self._objects[digest]
