"""One S3 server for the tests here, or any other, and backends on it, each in a key prefix of its own."""

from __future__ import annotations

import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest

from castore.config import S3Settings
from castore.config_values import SecretRef
from castore.storage.asyncio_thread import THREAD_NAME
from castore.storage.backends.s3 import S3Backend
from tests.servers.fault_proxy import FaultProxy
from tests.servers.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server
from tests.servers.seaweedfs import SeaweedFS

MIB: Final = 1 << 20


@pytest.fixture(scope="session")
def server(s3_server: SeaweedFS) -> SeaweedFS:
    return s3_server


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name == THREAD_NAME] == []


@pytest.fixture
def of_nobody(tmp_path: Path) -> S3Settings:
    """Settings that lead nowhere: work in parts above 5 MiB, and secrets in the files `access` and `secret`."""
    (tmp_path / "access").write_text(f"{ACCESS_KEY}\n")
    (tmp_path / "secret").write_text(f"{SECRET_KEY}\n")
    return S3Settings(
        backend_id="remote",
        endpoint_url="http://127.0.0.1:9",
        region="us-east-1",
        bucket=BUCKET,
        key_prefix=f"prefix/{uuid.uuid4().hex}",
        access_key_ref=in_file(tmp_path / "access", "access_key_ref"),
        secret_key_ref=in_file(tmp_path / "secret", "secret_key_ref"),
        storage_class="STANDARD",
        sse=None,
        multipart_threshold_bytes=5 * MIB,
        multipart_chunk_bytes=5 * MIB,
    )


@pytest.fixture
def settings(server: SeaweedFS, of_nobody: S3Settings) -> S3Settings:
    """Of a backend on the server, without objects."""
    return but(of_nobody, endpoint_url=server.endpoint_url)


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


@pytest.fixture
def proxy(server: SeaweedFS) -> Iterator[FaultProxy]:
    """Before the server; it does no harm until it is told to."""
    port = urlsplit(server.endpoint_url).port
    assert port is not None
    with FaultProxy(port) as proxy:
        yield proxy


@pytest.fixture
def through(settings: S3Settings, proxy: FaultProxy) -> S3Settings:
    """The settings, by way of the proxy."""
    return but(settings, endpoint_url=proxy.endpoint_url)


def but(settings: S3Settings, **changes: Any) -> S3Settings:
    """The same settings but for these."""
    return replace(settings, **changes)


def settings_on(server: S3Server, of_nobody: S3Settings, folder: Path) -> S3Settings:
    """Of a backend on any server, without objects. Its secrets are files of `folder`."""
    (folder / "access").write_text(server.access_key)
    (folder / "secret").write_text(server.secret_key)
    return but(
        of_nobody,
        endpoint_url=server.endpoint_url,
        region=server.region,
        bucket=server.bucket,
        key_prefix=server.key_prefix + of_nobody.key_prefix,
        access_key_ref=in_file(folder / "access", "access_key_ref"),
        secret_key_ref=in_file(folder / "secret", "secret_key_ref"),
        ca_bundle=server.ca_bundle,
    )


def in_file(path: Path, setting: str) -> SecretRef:
    return SecretRef(f"file:{path}", f"backends.remote.{setting}", path)


def uploads(outside: Any, settings: S3Settings) -> list[str]:
    """The keys of uploads that are begun and not ended, below the backend's prefix."""
    page = outside.list_multipart_uploads(Bucket=settings.bucket, Prefix=settings.key_prefix)
    return [upload["Key"] for upload in page.get("Uploads", ())]
