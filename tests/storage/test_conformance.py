"""The conformance suite on every backend and every wrapper, alone and all together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from castore.config import LocalSettings
from castore.digest import Digest
from castore.storage.backends.local import LocalBackend
from castore.storage.breaker import BreakerBackend
from castore.storage.conformance import BackendConformance
from castore.storage.deadline import DeadlineBackend
from castore.storage.layout import key_of
from castore.storage.limit import LimitedBackend
from castore.storage.measured import CallStats, MeasuredBackend
from castore.storage.open import create_backend, open_backend
from castore.storage.retry import RetryingBackend
from castore.storage.spi import StorageBackend

from .memory_backend import MemoryBackend

WRAPPERS: dict[str, Callable[[StorageBackend], StorageBackend]] = {
    "breaker": BreakerBackend,
    "deadline": DeadlineBackend,
    "retry": RetryingBackend,
    "limit": lambda inner: LimitedBackend(inner, reads=4, writes=4),
    "measured": lambda inner: MeasuredBackend(inner, CallStats()),
    "limit to one": lambda inner: LimitedBackend(inner, reads=1, writes=1),
}


class TestMemoryBackend(BackendConformance):
    @pytest.fixture
    async def backend(self) -> MemoryBackend:
        return MemoryBackend()


class _OnDisk(BackendConformance):
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "objects"

    @pytest.fixture(autouse=True)
    def _remember_path(self, path: Path) -> None:
        self._path = path

    async def damage(self, backend: StorageBackend, digest: Digest, data: bytes) -> None:
        (self._path / key_of(digest)).write_bytes(data)


class TestLocalBackend(_OnDisk):
    @pytest.fixture
    async def backend(self, path: Path) -> AsyncIterator[StorageBackend]:
        backend = LocalBackend("local", path)
        await backend.create()
        yield backend
        await backend.aclose()


@pytest.mark.parametrize("wrapper", WRAPPERS)
class TestWrappers(BackendConformance):
    @pytest.fixture
    async def backend(self, wrapper: str) -> StorageBackend:
        return WRAPPERS[wrapper](MemoryBackend())


class TestLocalAsConfigured(_OnDisk):
    @pytest.fixture
    async def backend(self, path: Path) -> AsyncIterator[StorageBackend]:
        settings = LocalSettings("objects", path)
        await create_backend(settings)
        backend = open_backend(settings, CallStats())
        yield backend
        await backend.aclose()
