"""One S3 server for all tests here, and backends on it, each in a key prefix of its own."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from castore.config import S3Settings
from castore.config_values import SecretRef
from castore.storage.backends.s3 import S3Backend
from tests.servers.seaweedfs import SeaweedFS

BUCKET: Final = "castore-tests"
MIB: Final = 1 << 20


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server


@pytest.fixture
def settings(server: SeaweedFS, tmp_path: Path) -> S3Settings:
    """Of a backend without objects, which works in parts above 5 MiB. Its secrets are in files below `tmp_path`."""
    (tmp_path / "access").write_text(f"{server.access_key}\n")
    (tmp_path / "secret").write_text(f"{server.secret_key}\n")
    return S3Settings(
        backend_id="remote",
        endpoint_url=server.endpoint_url,
        region="us-east-1",
        bucket=BUCKET,
        key_prefix=f"prefix/{uuid.uuid4().hex}",
        access_key_ref=_file(tmp_path / "access", "access_key_ref"),
        secret_key_ref=_file(tmp_path / "secret", "secret_key_ref"),
        storage_class="STANDARD",
        sse=None,
        multipart_threshold_bytes=5 * MIB,
        multipart_chunk_bytes=5 * MIB,
    )


@pytest.fixture
async def backend(settings: S3Settings) -> AsyncIterator[S3Backend]:
    backend = S3Backend(settings)
    yield backend
    await backend.aclose()


@pytest.fixture
def outside(server: SeaweedFS) -> Iterator[Any]:
    """A plain client, to look at the server past the backend."""
    client = server.client()
    yield client
    client.close()


def but(settings: S3Settings, **changes: Any) -> S3Settings:
    """The same settings but for these."""
    return replace(settings, **changes)


def _file(path: Path, setting: str) -> SecretRef:
    return SecretRef(f"file:{path}", f"backends.remote.{setting}", path)
