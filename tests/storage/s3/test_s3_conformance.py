"""The conformance suite on the S3 backend, bare and as configurations compose it, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from castore.config import S3Settings
from castore.storage.backends.s3 import S3Backend
from castore.storage.conformance import BackendConformance
from castore.storage.open import open_backend
from castore.storage.spi import StorageBackend

from .conftest import but


class TestS3Backend(BackendConformance):
    @pytest.fixture
    async def backend(self, settings: S3Settings) -> AsyncIterator[StorageBackend]:
        backend = S3Backend(settings)
        yield backend
        await backend.aclose()


class TestS3AsConfigured(BackendConformance):
    @pytest.fixture
    async def backend(self, settings: S3Settings) -> AsyncIterator[StorageBackend]:
        backend = open_backend(but(settings, key_prefix=settings.key_prefix.replace("/", "-")))
        yield backend
        await backend.aclose()
