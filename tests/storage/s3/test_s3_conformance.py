"""The conformance suite on the S3 backend: bare on one server, and as configurations compose it on every server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from castore.config import S3Settings
from castore.storage.backends.s3 import S3Backend
from castore.storage.conformance import BackendConformance
from castore.storage.open import open_backend
from castore.storage.spi import StorageBackend
from tests.servers.every import S3_SERVERS, EveryServer

from .conftest import but, settings_on


@pytest.mark.parametrize("transfer", ["native", "aioboto3"])
class TestS3Backend(BackendConformance):
    @pytest.fixture
    async def backend(self, settings: S3Settings, transfer: str) -> AsyncIterator[StorageBackend]:
        backend = S3Backend(but(settings, transfer=transfer))
        yield backend
        await backend.aclose()


@pytest.mark.parametrize("name", S3_SERVERS, scope="session")
class TestS3AsConfigured(BackendConformance):
    @pytest.fixture
    async def backend(
        self, every_server: EveryServer, name: str, of_nobody: S3Settings, tmp_path: Path
    ) -> AsyncIterator[StorageBackend]:
        backend = open_backend(settings_on(every_server[name], of_nobody, tmp_path))
        yield backend
        await backend.aclose()
