"""Servers that refuse, hang or are not there, and what cancelling does to a request that is under way."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from trio.abc import Stream

from castore.config import S3Settings
from castore.config_values import SecretRef
from castore.digest import Digest
from castore.errors import StorageDenied, StorageError, StorageRejected, StorageTimeout, StorageUnavailable
from castore.storage.backends.s3 import S3Backend
from castore.storage.backends.s3_upload import ABORT_S, PARTS_IN_FLIGHT
from castore.storage.conformance_sources import PATIENCE_S
from castore.storage.deadline import DeadlineBackend
from castore.storage.open import create_backend, open_backend
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend
from tests.servers.fault_proxy import Answer, Exchange, FaultProxy
from tests.servers.scripted_http import Request, answer, serving
from tests.servers.seaweedfs import SeaweedFS

from .conftest import MIB, but, in_file, uploads

SMALL: Final = b"some bytes"
LARGE: Final = bytes(11 * MIB)
CALLS: Final = ("put", "put large", "get", "get nothing", "head", "delete", "list")


def call(backend: StorageBackend, name: str) -> Awaitable[object]:
    async def listing() -> None:
        async with backend.list("sha256") as objects:
            async for _ in objects:
                pass

    digest, large = Digest.of(SMALL), Digest.of(LARGE)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "put": lambda: backend.put(digest, BytesSource(SMALL)),
        "put large": lambda: backend.put(large, BytesSource(LARGE)),
        "get": lambda: backend.get(digest, offset=0, length=len(SMALL)),
        "get nothing": lambda: backend.get(digest, offset=0, length=0),
        "head": lambda: backend.head(digest),
        "delete": lambda: backend.delete(digest),
        "list": listing,
    }
    return calls[name]()


@asynccontextmanager
async def opened(settings: S3Settings) -> AsyncIterator[S3Backend]:
    backend = S3Backend(settings)
    try:
        yield backend
    finally:
        await backend.aclose()


async def assert_all_raise(settings: S3Settings, kind: type[StorageError], text: str) -> None:
    """Each call, and health too, says so in one line that begins with the backend."""
    async with opened(settings) as backend:
        for name in CALLS:
            with pytest.raises(kind, match=text) as caught:
                await call(backend, name)
            line = str(caught.value)
            assert line.startswith("backend remote: "), name
            assert line.isprintable(), name
        health = await backend.health()
        assert health.status == "fail"
        assert health.detail.isprintable()


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listened at
        yield taken.getsockname()[1]


async def test_an_endpoint_that_nobody_listens_at(of_nobody: S3Settings, closed_port: int) -> None:
    settings = but(of_nobody, endpoint_url=f"http://127.0.0.1:{closed_port}")
    text = f"http://127.0.0.1:{closed_port} cannot be reached: Connection refused; check endpoint_url"
    await assert_all_raise(settings, StorageUnavailable, text)
    with pytest.raises(StorageUnavailable, match=text):
        await create_backend(settings)


async def test_an_endpoint_whose_name_is_unknown(of_nobody: S3Settings) -> None:
    async with opened(but(of_nobody, endpoint_url="http://no-such-host.invalid")) as backend:
        with pytest.raises(StorageUnavailable, match=r"no-such-host\.invalid cannot be reached: .*[Nn]ame"):
            await backend.head(Digest.of(SMALL))


@pytest.mark.parametrize("place", ["127.0.0.1:99999", "a..b"])
async def test_an_endpoint_that_cannot_be(of_nobody: S3Settings, place: str) -> None:
    async with opened(but(of_nobody, endpoint_url=f"http://{place}")) as backend:
        with pytest.raises(StorageRejected, match="check endpoint_url"):
            await backend.head(Digest.of(SMALL))


async def test_an_endpoint_that_speaks_no_tls(settings: S3Settings) -> None:
    async with opened(but(settings, endpoint_url=settings.endpoint_url.replace("http:", "https:"))) as backend:
        with pytest.raises(StorageUnavailable, match=r"no safe connection to https://.*SSL"):
            await backend.head(Digest.of(SMALL))


async def test_a_bucket_that_is_missing_until_it_is_made(settings: S3Settings, outside: Any) -> None:
    missing = but(settings, bucket=settings.key_prefix.replace("/", "-"))
    await assert_all_raise(missing, StorageRejected, f'check bucket = "{missing.bucket}"')
    await create_backend(missing)
    await create_backend(missing)
    async with opened(missing) as backend:
        assert (await backend.health()).status == "pass"
        for name in CALLS:
            await call(backend, name)


@pytest.mark.parametrize("wrong", ["access", "secret"])
async def test_credentials_that_are_wrong(settings: S3Settings, tmp_path: Path, wrong: str) -> None:
    (tmp_path / wrong).write_text("wrong")
    text = "check access_key_ref = file:.*/access and secret_key_ref = file:.*/secret"
    await assert_all_raise(settings, StorageDenied, text)
    with pytest.raises(StorageDenied, match=text):
        await create_backend(settings)


async def test_credentials_that_cannot_be_resolved(settings: S3Settings, tmp_path: Path) -> None:
    (tmp_path / "secret").unlink()
    text = "backends.remote.secret_key_ref: cannot resolve file:.*/secret: no such file"
    await assert_all_raise(settings, StorageDenied, text)
    ref = SecretRef("env:CASTORE_TESTS_SET_NOWHERE", "backends.remote.access_key_ref")
    text = "backends.remote.access_key_ref: cannot resolve env:CASTORE_TESTS_SET_NOWHERE: .* not set"
    await assert_all_raise(but(settings, access_key_ref=ref), StorageDenied, text)


async def test_credentials_are_read_again_when_they_change(settings: S3Settings, tmp_path: Path) -> None:
    right = (tmp_path / "secret").read_text()
    async with opened(settings) as backend:
        for _ in range(2):
            await call(backend, "put")
            (tmp_path / "secret").write_text("wrong")
            with pytest.raises(StorageDenied):
                await call(backend, "get")
            (tmp_path / "new").write_text(right)
            (tmp_path / "new").replace(tmp_path / "secret")


@pytest.mark.parametrize("name", ["put", "get", "head"])
async def test_credentials_that_change_under_way_get_another_try(
    of_nobody: S3Settings, tmp_path: Path, name: str
) -> None:
    """The server no longer takes the old ones when the request comes, and the new ones are there by then."""

    async def handler(request: Request, stream: Stream) -> None:
        if "Credential=new/" in request.headers["authorization"]:
            bodies = {"GET": SMALL, "PUT": b"", "HEAD": b""}
            span = f"bytes 0-{len(SMALL) - 1}/{len(SMALL)}"
            await stream.send_all(
                answer(
                    206 if name == "get" else 200,
                    bodies[request.method],
                    content_range=span,
                    last_modified="Sat, 03 Feb 2001 12:00:00 GMT",
                    etag=f'"{hashlib.md5(SMALL).hexdigest()}"',
                    content_length="0" if request.method == "PUT" else str(len(SMALL)),
                )
            )
        else:
            (tmp_path / "access").write_text("new")
            await stream.send_all(answer(403))

    async with serving(handler) as server, opened(but(of_nobody, endpoint_url=server.endpoint_url)) as backend:
        await call(backend, name)
        assert len(server.requests) == 2
        assert {request.body for request in server.requests} == {SMALL if name == "put" else b""}


async def test_credentials_that_do_not_change_get_no_other_try(of_nobody: S3Settings) -> None:
    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(answer(403))

    async with serving(handler) as server, opened(but(of_nobody, endpoint_url=server.endpoint_url)) as backend:
        with pytest.raises(StorageDenied):
            await call(backend, "get")
        assert len(server.requests) == 1


@pytest.fixture
def paused(server: SeaweedFS) -> Iterator[Callable[[], None]]:
    """Call it to let the server hang until the test's end."""
    yield server.pause
    server.resume()


@pytest.mark.parametrize("name", CALLS)
async def test_a_server_that_hangs_is_an_error_at_the_deadline(
    settings: S3Settings, server: SeaweedFS, paused: Callable[[], None], name: str
) -> None:
    async with opened(settings) as bare:
        backend = DeadlineBackend(bare, base_s=0.3, min_bytes_per_s=1 << 40, health_s=0.3)
        await call(bare, "put")
        paused()
        start = trio.current_time()
        with pytest.raises(StorageTimeout):
            await call(backend, name)
        assert trio.current_time() - start < 0.3 + ABORT_S + PATIENCE_S / 4, "long before the client library gives up"
        assert (await backend.health()).status == "fail"
        server.resume()
        with trio.fail_after(PATIENCE_S):
            while True:  # until it has caught up
                try:
                    return await call(backend, name)  # type: ignore[return-value]
                except StorageTimeout:
                    continue


async def test_cancelling_ends_the_request(of_nobody: S3Settings) -> None:
    """When the call returns, its connection is closed, and the buffer is the caller's."""
    asked = trio.Event()
    left = trio.Event()

    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(answer(206, b"half", content_range="bytes 0-7/8", content_length="8"))
        asked.set()
        with trio.fail_after(PATIENCE_S):
            assert await stream.receive_some(1) == b""
        left.set()

    async with serving(handler) as server, opened(but(of_nobody, endpoint_url=server.endpoint_url)) as backend:
        buffer = bytearray(8)
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(backend.get, Digest.of(SMALL), offset=0, length=8, into=buffer))
                await asked.wait()
                nursery.cancel_scope.cancel()
            buffer.clear()
            await left.wait()


async def test_parts_are_sent_at_once_up_to_a_bound(through: S3Settings, proxy: FaultProxy) -> None:
    data = bytes((PARTS_IN_FLIGHT + 2) * 5 * MIB)
    under_way = most = 0
    full = threading.Event()

    def count(exchange: Exchange) -> bool:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == PARTS_IN_FLIGHT:
            full.set()
        full.wait(PATIENCE_S)
        answer = exchange.ask()
        under_way -= 1  # before the answer, after which the next part may come
        exchange.answer(answer)
        return True

    proxy.break_with(count, method="PUT", query=["partNumber"])
    async with opened(through) as backend:
        await backend.put(Digest.of(data), BytesSource(data))
    assert most == PARTS_IN_FLIGHT
    assert len(proxy.met) == PARTS_IN_FLIGHT + 2


async def test_a_part_that_fails_ends_the_others(through: S3Settings, proxy: FaultProxy) -> None:
    data = bytes(20 * 5 * MIB)

    def third_fails(exchange: Exchange) -> None:
        if exchange.request.query["partNumber"] == "3":
            exchange.answer(Answer(503, {"content-length": "0"}, b""))
        else:
            exchange.hang()

    proxy.break_with(third_fails, method="PUT", query=["partNumber"])
    async with opened(through) as backend:
        with trio.fail_after(PATIENCE_S), pytest.raises(StorageUnavailable, match="503"):
            await backend.put(Digest.of(data), BytesSource(data))
    assert len(proxy.met) <= PARTS_IN_FLIGHT


async def test_a_server_that_hangs_for_a_moment_costs_a_put_nothing_but_time(
    settings: S3Settings, server: SeaweedFS, paused: Callable[[], None], outside: Any
) -> None:
    backend = open_backend(settings)
    await call(backend, "put")
    paused()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, backend, "put large")
        nursery.start_soon(call, backend, "get")
        await trio.testing.wait_all_tasks_blocked()
        server.resume()
    assert uploads(outside, settings) == []
    await backend.aclose()


def test_settings_and_backend_show_no_secret(of_nobody: S3Settings, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a-very-secret-secret")
    settings = but(of_nobody, secret_key_ref=in_file(tmp_path / "secret", "secret_key_ref"))
    assert "a-very-secret-secret" not in f"{settings!r} {S3Backend(settings)!r} {vars(S3Backend(settings))!r}"
