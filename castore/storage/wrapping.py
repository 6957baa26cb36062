"""The base of backends that add behaviour to another backend. Adds none itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from castore.digest import Digest
from castore.storage.spi import BackendHealth, ObjectInfo, Scanning, Source, StorageBackend, TakerT

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a backend: its name, what it is about, and the bytes that it moves at most."""

    name: Literal["put", "get", "head", "delete", "abandon", "list"]
    subject: str
    size_bytes: int = 0


class Wrapping(ABC):
    """Hands every call to the inner backend, each by way of `_around`.

    A listing goes through `_around` once for each step. `health` and `aclose` go straight through.
    """

    def __init__(self, inner: StorageBackend) -> None:
        self._inner = inner
        self._scanning = inner if isinstance(inner, Scanning) and inner.scans else None

    @abstractmethod
    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        """Do `call`, which may be done again; what it returns or raises."""

    @property
    def backend_id(self) -> str:
        return self._inner.backend_id

    @property
    def backend_type(self) -> str:
        return self._inner.backend_type

    async def put(self, digest: Digest, source: Source) -> None:
        operation = Operation("put", str(digest), source.size_bytes)
        await self._around(operation, partial(self._inner.put, digest, source))

    async def get(
        self, digest: Digest, *, offset: int, length: int, into: bytearray | memoryview | None = None
    ) -> memoryview:
        call = partial(self._inner.get, digest, offset=offset, length=length, into=into)
        return await self._around(Operation("get", str(digest), length), call)

    @property
    def scans(self) -> bool:
        return self._scanning is not None

    async def scan(self, digest: Digest, *, offset: int, length: int, begin: Callable[[], TakerT]) -> TakerT:
        assert self._scanning is not None, "whoever calls has asked"
        call = partial(self._scanning.scan, digest, offset=offset, length=length, begin=begin)
        return await self._around(Operation("get", str(digest), length), call)

    async def head(self, digest: Digest) -> ObjectInfo:
        return await self._around(Operation("head", str(digest)), partial(self._inner.head, digest))

    async def delete(self, digest: Digest) -> None:
        await self._around(Operation("delete", str(digest)), partial(self._inner.delete, digest))

    async def abandon(self, digest: Digest) -> None:
        await self._around(Operation("abandon", str(digest)), partial(self._inner.abandon, digest))

    def list(self, algorithm: str, *, prefix: str = "") -> AbstractAsyncContextManager[AsyncIterator[ObjectInfo]]:
        return self._list(algorithm, prefix)

    @asynccontextmanager
    async def _list(self, algorithm: str, prefix: str) -> AsyncIterator[AsyncIterator[ObjectInfo]]:
        async with self._inner.list(algorithm, prefix=prefix) as objects:
            yield Steps(objects, partial(self._around, Operation("list", f"{algorithm}:{prefix}")))

    async def health(self) -> BackendHealth:
        return await self._inner.health()

    async def aclose(self) -> None:
        await self._inner.aclose()


class Steps:
    """A listing whose every step goes through a function."""

    def __init__(
        self,
        objects: AsyncIterator[ObjectInfo],
        around: Callable[[Callable[[], Awaitable[ObjectInfo]]], Awaitable[ObjectInfo]],
    ) -> None:
        self._objects = objects
        self._around = around

    def __aiter__(self) -> Steps:
        return self

    async def __anext__(self) -> ObjectInfo:
        return await self._around(self._objects.__anext__)
