"""Every setting does what it says: at a real server where one honours it, else in the request on the wire.

Credentials have test_s3_credentials.py, authorities test_s3_tls.py, values that are refused tests/test_config.py.
"""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from trio.abc import Stream
from trio.testing import wait_all_tasks_blocked

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import StorageDenied, StorageRejected, StorageTimeout
from castore.storage.backends.s3 import READS, WRITES, S3Backend
from castore.storage.conformance_sources import PATIENCE_S
from castore.storage.layout import key_of
from castore.storage.source import BytesSource
from tests.servers import rgw, seaweedfs
from tests.servers.every import S3_SERVERS, EveryServer
from tests.servers.s3_server import S3Server
from tests.servers.scripted_http import Request, answer, serving

from .conftest import MIB, but, settings_on
from .test_s3_process import run

SMALL: Final = b"some bytes"
PARTS: Final = random.Random(1).randbytes(11 * MIB)
"""Three parts of 5 MiB."""
SHORT_S: Final = 0.2


@pytest.fixture(params=["native", "aioboto3"])
def of_nobody(of_nobody: S3Settings, request: pytest.FixtureRequest) -> S3Settings:
    return but(of_nobody, transfer=request.param)


@asynccontextmanager
async def opened(settings: S3Settings) -> AsyncIterator[S3Backend]:
    backend = S3Backend(settings)
    try:
        yield backend
    finally:
        await backend.aclose()


async def put_and_get(backend: S3Backend, data: bytes) -> str:
    """The object's key below the prefix."""
    digest = Digest.of(data)
    await backend.put(digest, BytesSource(data))
    assert await backend.get(digest, offset=0, length=len(data)) == data
    return key_of(digest)


@pytest.fixture
def any_server(request: pytest.FixtureRequest, every_server: EveryServer) -> S3Server:
    return every_server[request.param]


@pytest.fixture
def client(any_server: S3Server) -> Iterator[Any]:
    """A plain client of it."""
    client = any_server.client()
    yield client
    client.close()


@pytest.mark.parametrize("any_server", S3_SERVERS, indirect=True)
async def test_an_object_lies_where_the_settings_say(
    any_server: S3Server, client: Any, of_nobody: S3Settings, tmp_path: Path
) -> None:
    """endpoint_url, region, bucket, key_prefix, the references, ca_bundle, storage_class, threshold and part size."""
    settings = but(
        settings_on(any_server, of_nobody, tmp_path),
        multipart_threshold_bytes=6 * MIB,
        multipart_chunk_bytes=7 * MIB,
    )
    async with opened(settings) as backend:
        for data, ending in ((PARTS[: 6 * MIB], ""), (PARTS[: 6 * MIB + 1], "-1"), (PARTS, "-2")):
            key = f"{settings.key_prefix}/{await put_and_get(backend, data)}"
            stored = client.head_object(Bucket=settings.bucket, Key=key)
            assert stored["ContentLength"] == len(data)
            assert stored.get("StorageClass", "STANDARD") == "STANDARD"
            etag = stored["ETag"].strip('"')
            assert etag[32:] == ending or "-" not in etag[:32], "parts, where the server's ETag tells"
            await backend.delete(Digest.of(data))


async def test_a_bucket_is_another_place(settings: S3Settings, outside: Any) -> None:
    other = but(settings, bucket=f"other-{settings.key_prefix[-20:]}")
    async with opened(other) as backend:
        await backend.create()
        key = f"{settings.key_prefix}/{await put_and_get(backend, SMALL)}"
    assert outside.head_object(Bucket=other.bucket, Key=key)["ContentLength"] == len(SMALL)
    async with opened(settings) as backend, backend.list("sha256") as objects:
        assert [info async for info in objects] == []


def test_a_bucket_can_be_a_part_of_the_hosts_name(server: seaweedfs.SeaweedFS) -> None:
    """addressing_style = "virtual": the server knows the bucket from the name alone. By a proxy: it is its own."""
    program = f"""
async def main():
    for style in ("virtual", "path"):
        backend = open_backend(settings(
            endpoint_url="http://{seaweedfs.DOMAIN}", addressing_style=style, key_prefix=style,
            multipart_threshold_bytes=5 << 20, multipart_chunk_bytes=5 << 20,
        ))
        large = bytes(6 << 20)
        for data in (DATA, large):
            await backend.put(Digest.of(data), BytesSource(data))
            assert await backend.get(Digest.of(data), offset=0, length=len(data)) == data
        await backend.delete(Digest.of(large))
        async with backend.list("sha256") as objects:
            print(style, [str(info.digest) async for info in objects] == [str(DIGEST)])
        await backend.aclose()

trio.run(main)
"""
    output = run(server, program, http_proxy=server.endpoint_url, no_proxy="")
    assert output == "virtual True\npath True\n"


async def test_a_bucket_can_be_a_part_of_the_hosts_name_without_a_proxy(settings: S3Settings, outside: Any) -> None:
    """What is native: all else resolves names elsewhere."""

    class AllAreHere(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: bytes | None, port: Any, *rest: Any, **others: Any) -> Any:
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", int(port)))]

        async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
            raise NotImplementedError

    asked: list[bytes | None] = []
    place = settings.endpoint_url.replace("127.0.0.1", seaweedfs.DOMAIN)
    trio.socket.set_custom_hostname_resolver(AllAreHere())
    async with opened(but(settings, transfer="native", endpoint_url=place, addressing_style="virtual")) as backend:
        key = await put_and_get(backend, SMALL)
    assert outside.head_object(Bucket=settings.bucket, Key=f"{settings.key_prefix}/{key}")["ContentLength"] == 10
    assert set(asked) == {f"{settings.bucket}.{seaweedfs.DOMAIN}".encode()}


@pytest.mark.parametrize("style", ["path", "virtual"])
async def test_which_host_is_asked(style: str) -> None:
    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"))

    async with serving(handler) as server:
        port = server.endpoint_url.rpartition(":")[2]
        program = f"""
async def main():
    backend = open_backend(settings(endpoint_url="http://s3.test:{port}", addressing_style={style!r}))
    print((await backend.health()).status)
    await backend.aclose()

trio.run(main)
"""
        environment = {"http_proxy": server.endpoint_url, "no_proxy": ""}
        nobody = S3Server("nobody", access_key="a", secret_key="b")
        nobody.endpoint_url = server.endpoint_url
        output = await trio.to_thread.run_sync(lambda: run(nobody, program, **environment))
        assert output == "pass\n"
        (request,) = server.requests
    bucket = nobody.bucket
    expected = {"path": (f"s3.test:{port}", f"/{bucket}"), "virtual": (f"{bucket}.s3.test:{port}", "")}[style]
    assert request.headers["host"] == expected[0]
    assert request.target.removeprefix(f"http://{expected[0]}").partition("?")[0].rstrip("/") == expected[1]


@pytest.mark.parametrize("region", ["eu-west-9", "default"])
async def test_the_region_is_in_the_signature(of_nobody: S3Settings, region: str) -> None:
    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(answer(204))

    async with serving(handler) as server:
        async with opened(but(of_nobody, endpoint_url=server.endpoint_url, region=region)) as backend:
            await backend.delete(Digest.of(SMALL))
    assert f"/{region}/s3/aws4_request," in server.requests[0].headers["authorization"]


# storage class and encryption


async def test_what_says_how_an_object_is_stored(of_nobody: S3Settings) -> None:
    """A whole put and the beginning of one in parts say it, parts do not."""
    settings = but(of_nobody, storage_class="COLD", sse="aws:kms", sse_kms_key_id="arn:aws:kms:eu-west-9:1:key/a-b")
    stored = {"x-amz-server-side-encryption": "aws:kms", "date": "Sat, 03 Feb 2001 12:00:00 GMT"}
    parts = iter(["a", "b", "c"])

    async def handler(request: Request, stream: Stream) -> None:
        names = {"uploads", "uploadId", "partNumber"} & request.query.keys()
        if request.method == "GET":
            body = "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"
        elif names == {"uploads"}:
            body = "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
        elif names == {"uploadId"}:
            body = "<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
        else:
            body = ""
        if request.method == "HEAD":
            size = len(PARTS) if digest_of_parts.hex in request.target else len(SMALL)
            await stream.send_all(answer(200, b"", content_length=str(size), etag="e", **stored))
        else:
            etag = next(parts) if "partNumber" in names else "e"
            await stream.send_all(answer(200, body.encode(), etag=etag, **stored))

    digest_of_parts = Digest.of(PARTS)
    async with serving(handler) as server, opened(but(settings, endpoint_url=server.endpoint_url)) as backend:
        await backend.put(Digest.of(SMALL), BytesSource(SMALL))
        await backend.put(digest_of_parts, BytesSource(PARTS))
    names = ("x-amz-storage-class", "x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id")
    said = [
        tuple(request.headers.get(name) for name in names)
        for request in server.requests
        if request.method in ("PUT", "POST")
    ]
    everything = ("COLD", "aws:kms", "arn:aws:kms:eu-west-9:1:key/a-b")
    assert said == [everything, everything, *[(None, None, None)] * 4]


ENCRYPTING: Final = [
    ("seaweedfs", "AES256", None),
    ("seaweedfs", "aws:kms", seaweedfs.KMS_KEY_ID),
    ("rgw-https", "aws:kms", rgw.KMS_KEY_ID),
]


@pytest.mark.parametrize(("any_server", "sse", "key_id"), ENCRYPTING, indirect=["any_server"])
async def test_what_a_server_encrypts(
    any_server: S3Server, client: Any, of_nobody: S3Settings, tmp_path: Path, sse: str, key_id: str | None
) -> None:
    settings = but(settings_on(any_server, of_nobody, tmp_path), sse=sse, sse_kms_key_id=key_id)
    async with opened(settings) as backend:
        for data in (b"", SMALL, PARTS):
            key = f"{settings.key_prefix}/{await put_and_get(backend, data)}"
            stored = client.head_object(Bucket=settings.bucket, Key=key)
            assert stored["ServerSideEncryption"] == sse
            assert stored.get("SSEKMSKeyId") == key_id


async def test_a_key_that_the_server_has_not(every_server: EveryServer, of_nobody: S3Settings, tmp_path: Path) -> None:
    settings = settings_on(every_server["rgw-https"], of_nobody, tmp_path)
    async with opened(but(settings, sse="aws:kms", sse_kms_key_id="no-such-key")) as backend:
        # Ceph 16 says so in several ways.
        with pytest.raises((StorageRejected, StorageDenied), match="no-such-key"):
            await backend.put(Digest.of(SMALL), BytesSource(SMALL))


@pytest.mark.parametrize("data", [SMALL, PARTS], ids=["whole", "in parts"])
async def test_a_server_that_does_not_encrypt_is_found_out(
    every_server: EveryServer, of_nobody: S3Settings, tmp_path: Path, data: bytes
) -> None:
    """Ceph 16 answers a put with AES256 with 200, and stores it as it is."""
    settings = settings_on(every_server["rgw-https"], of_nobody, tmp_path)
    async with opened(but(settings, sse="AES256")) as backend:
        with pytest.raises(StorageRejected, match='does not say that it is encrypted; check sse = "AES256"'):
            await backend.put(Digest.of(data), BytesSource(data))


# timeouts and connections


async def test_a_connection_that_is_not_taken(of_nobody: S3Settings) -> None:
    """The queue of a listening socket is full: the kernel lets further ones wait."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        place = listening.getsockname()
        while True:
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(SHORT_S)
            try:
                waiting.connect(place)
            except TimeoutError:
                break
        settings = but(of_nobody, endpoint_url=f"http://127.0.0.1:{place[1]}", connect_timeout_seconds=SHORT_S)
        async with opened(settings) as backend:
            with trio.fail_after(PATIENCE_S), pytest.raises(StorageTimeout, match=r'connect_timeout = "0\.2s"'):
                await backend.head(Digest.of(SMALL))


async def test_a_handshake_that_does_not_come_is_no_connection(of_nobody: S3Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = f"https://127.0.0.1:{listening.getsockname()[1]}"
        async with opened(but(of_nobody, endpoint_url=place, connect_timeout_seconds=SHORT_S)) as backend:
            with trio.fail_after(PATIENCE_S), pytest.raises(StorageTimeout, match=r'connect_timeout = "0\.2s"'):
                await backend.head(Digest.of(SMALL))


@pytest.mark.parametrize("sent", [b"", answer(206, SMALL[:4], content_range="bytes 0-9/10", content_length="10")])
async def test_silence(of_nobody: S3Settings, sent: bytes) -> None:
    """Before the answer, and in the middle of a body."""

    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(sent)
        await trio.sleep_forever()

    async with serving(handler) as server:
        settings = but(of_nobody, endpoint_url=server.endpoint_url, read_timeout_seconds=SHORT_S)
        async with opened(settings) as backend:
            with trio.fail_after(PATIENCE_S), pytest.raises(StorageTimeout, match=r'read_timeout = "0\.2s"'):
                await backend.get(Digest.of(SMALL), offset=0, length=len(SMALL))


async def test_requests_wait_for_a_connection(of_nobody: S3Settings) -> None:
    """Of six at a time three reach the server, where each stays until the others are there; then the rest."""
    bound, wanted = 3, 6
    together, full, go_on = 0, trio.Event(), trio.Event()

    async def handler(request: Request, stream: Stream) -> None:
        nonlocal together
        together += 1
        if together == bound:
            full.set()
        await go_on.wait()
        together -= 1
        await stream.send_all(answer(204))

    async with serving(handler) as server:
        settings = but(of_nobody, endpoint_url=server.endpoint_url, max_connections=bound)
        async with opened(settings) as backend, opened(settings) as another, trio.open_nursery() as nursery:
            assert (backend.reads, backend.writes) == (bound, bound)
            for number in range(wanted):
                nursery.start_soon(backend.delete, Digest.of(str(number).encode()))
            await full.wait()
            await wait_all_tasks_blocked()
            # A request of somebody else, made after them in the same loop, comes through: so would a fourth have.
            nursery.start_soon(another.delete, Digest.of(SMALL))
            with trio.fail_after(PATIENCE_S):
                while len(server.requests) <= bound:
                    await trio.lowlevel.checkpoint()
            assert together == bound + 1
            assert len([1 for request in server.requests if Digest.of(SMALL).hex not in request.target]) == bound
            go_on.set()
        assert len(server.requests) == wanted + 1


async def test_one_connection_is_enough(settings: S3Settings) -> None:
    async with opened(but(settings, max_connections=1)) as backend:
        with trio.fail_after(2 * PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for data in (SMALL, PARTS, PARTS[1:], b"", PARTS[:MIB]):
                    nursery.start_soon(put_and_get, backend, data)


def test_by_default_bounds_on_calls_are_reached_before_that_on_connections(of_nobody: S3Settings) -> None:
    backend = S3Backend(of_nobody)
    assert (backend.reads, backend.writes) == (READS, WRITES)
    assert of_nobody.max_connections > READS + WRITES
