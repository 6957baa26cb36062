"""When the native path is taken, what it asks for, and when the client library does it instead."""

from __future__ import annotations

import logging
import threading
from typing import Final

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from trio.abc import Stream

from castore.config import S3Settings
from castore.digest import Digest
from castore.storage.asyncio_thread import THREAD_NAME
from castore.storage.backends.s3 import S3Backend
from castore.storage.backends.s3_signing import NO_BODY, Hidden, Signer
from castore.storage.source import BytesSource
from tests.servers.scripted_http import Request, answer, serving

from .conftest import MIB, but

DATA: Final[bytes] = b"some bytes"
DIGEST: Final = Digest.of(DATA)


def library_runs() -> bool:
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


@pytest.mark.parametrize("transfer", ["native", "aioboto3"])
async def test_bytes_need_no_client_library(settings: S3Settings, transfer: str) -> None:
    backend = S3Backend(but(settings, transfer=transfer))
    try:
        await backend.put(DIGEST, BytesSource(DATA))
        assert await backend.get(DIGEST, offset=2, length=5) == DATA[2:7]
        assert (await backend.head(DIGEST)).size_bytes == len(DATA)
        await backend.delete(DIGEST)
        assert library_runs() == (transfer == "aioboto3")
        assert (await backend.health()).status == "pass"
        assert library_runs()
    finally:
        await backend.aclose()


async def test_a_proxy_is_for_the_client_library(
    of_nobody: S3Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log says so, once."""

    async def handler(request: Request, stream: Stream) -> None:
        span = f"bytes 0-{len(DATA) - 1}/{len(DATA)}"
        await stream.send_all(answer(206, DATA, content_range=span))

    caplog.set_level(logging.INFO, "castore")
    async with serving(handler) as proxy:
        monkeypatch.setenv("http_proxy", proxy.endpoint_url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        backend = S3Backend(but(of_nobody, endpoint_url="http://far.away.invalid"))
        try:
            for _ in range(2):
                assert await backend.get(DIGEST, offset=0, length=len(DATA)) == DATA
        finally:
            await backend.aclose()
        assert all(request.target.startswith("http://far.away.invalid/") for request in proxy.requests)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("castore")]
    assert said == ["backend remote: all requests go by the client library: a proxy is set in the environment"]


async def test_a_proxy_that_is_not_for_this_host(of_nobody: S3Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(answer(200, DATA))

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    async with serving(handler) as server:
        backend = S3Backend(but(of_nobody, endpoint_url=server.endpoint_url))
        try:
            assert await backend.get(DIGEST, offset=0, length=len(DATA)) == DATA
            assert not library_runs()
        finally:
            await backend.aclose()


async def test_a_part_is_signed_by_its_md5(of_nobody: S3Settings) -> None:
    """It is hashed once; a body that is sent whole is signed by its SHA-256."""

    async def handler(request: Request, stream: Stream) -> None:
        if "uploads" in request.query and request.method == "GET":
            body = b"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>"
        else:
            body = b"<InitiateMultipartUploadResult><UploadId>an-id</UploadId></InitiateMultipartUploadResult>"
        body = b"" if request.method in ("PUT", "HEAD") else body
        date = "Sat, 03 Feb 2001 12:00:00 GMT"
        await stream.send_all(answer(200, body, date=date, etag='"one"', content_length="" if body else "0"))

    large = bytes(6 * MIB)
    async with serving(handler) as server:
        backend = S3Backend(but(of_nobody, endpoint_url=server.endpoint_url))
        try:
            for data in (large, DATA):
                with pytest.raises(Exception, match="bytes arrived"):  # this server stores nothing
                    await backend.put(Digest.of(data), BytesSource(data))
        finally:
            await backend.aclose()
        puts = [request for request in server.requests if request.method == "PUT"]
    assert len(puts) == 3
    for put in puts:
        is_part = "partNumber" in put.query
        assert put.headers["x-amz-content-sha256"] == ("UNSIGNED-PAYLOAD" if is_part else DIGEST.hex)
        assert "content-md5;" in put.headers["authorization"], "so the signature is for these bytes"


@pytest.mark.parametrize(
    ("endpoint_url", "style", "host", "target"),
    [
        ("http://127.0.0.1:8333", "path", "127.0.0.1:8333", "/a-bucket/k/ey"),
        ("http://s3.example:80", "path", "s3.example", "/a-bucket/k/ey"),
        ("https://s3.example", "path", "s3.example", "/a-bucket/k/ey"),
        ("https://s3.example:80", "virtual", "a-bucket.s3.example:80", "/k/ey"),
        ("https://S3.Example:443", "virtual", "a-bucket.s3.example", "/k/ey"),
        ("http://[::1]:8333", "path", "[::1]:8333", "/a-bucket/k/ey"),
        ("http://[::1]", "path", "[::1]", "/a-bucket/k/ey"),
    ],
)
def test_a_signature_is_the_client_librarys(
    of_nobody: S3Settings, endpoint_url: str, style: str, host: str, target: str
) -> None:
    signer = Signer(but(of_nobody, endpoint_url=endpoint_url, addressing_style=style, bucket="a-bucket"))
    asked = signer.target("k/ey", partNumber="1", uploadId="a b/c+d")
    assert asked == f"{target}?partNumber=1&uploadId=a%20b%2Fc%2Bd"
    credentials = Hidden("a-key", "a-secret", "a-token")
    signed = signer.signed(credentials, "GET", asked, {"Range": "bytes=0-9"}, NO_BODY)
    assert signed["Host"] == host
    # What the library makes of the same request at the same second.
    request = AWSRequest(
        "GET",
        f"{endpoint_url.partition(':')[0]}://{host}{target}",
        params={"partNumber": "1", "uploadId": "a b/c+d"},
        headers={"Range": "bytes=0-9", "User-Agent": "any"},
    )
    auth = S3SigV4Auth(credentials, "s3", of_nobody.region)
    request.context["timestamp"] = signed["X-Amz-Date"]
    auth._modify_request_before_signing(request)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    assert signed["Authorization"].endswith(f"Signature={auth.signature(text, request)}")
    assert "a-secret" not in repr(credentials)
