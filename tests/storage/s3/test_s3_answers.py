"""What the S3 backend makes of answers that a sound server does not give."""

from __future__ import annotations

import hashlib
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from functools import partial
from pathlib import Path

import pytest
from trio.abc import Stream

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import (
    ObjectMissing,
    ObjectTruncated,
    StorageDenied,
    StorageError,
    StorageFull,
    StorageRejected,
    StorageTimeout,
    StorageUnavailable,
)
from castore.storage.backends.s3 import S3Backend
from castore.storage.conformance_sources import PATIENCE_S
from castore.storage.source import BytesSource
from tests.servers.scripted_http import Handler, Request, ScriptedHTTP, answer, serving

from .conftest import but

DATA = bytes(range(256)) * 16
DIGEST = Digest.of(DATA)


@pytest.fixture(params=["native", "aioboto3"])
def settings(request: pytest.FixtureRequest, of_nobody: S3Settings) -> S3Settings:
    return but(of_nobody, transfer=request.param)


@asynccontextmanager
async def asking(settings: S3Settings, handler: Handler) -> AsyncIterator[tuple[S3Backend, ScriptedHTTP]]:
    """A backend whose server is the handler."""
    async with serving(handler) as server:
        backend = S3Backend(but(settings, endpoint_url=server.endpoint_url))
        try:
            yield backend, server
        finally:
            await backend.aclose()


def always(data: bytes) -> Handler:
    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(data)

    return handler


def error(status: int, code: str = "", message: str = "") -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode() if code else b""
    return answer(status, body, content_type="application/xml")


def span(first: int, last: int, total: int | str = len(DATA), **headers: str) -> bytes:
    return answer(206, DATA[first : last + 1], **{"content_range": f"bytes {first}-{last}/{total}", **headers})


@pytest.mark.parametrize(
    "data",
    [
        span(100, 199),
        span(100, 199, "*"),
        span(100, 199, content_length=""),
        answer(200, DATA),
        answer(200, DATA[:200]),
    ],
    ids=["the range", "of unknown total", "until the connection ends", "all of it", "all of it, ending there"],
)
async def test_answers_that_hold_the_range(settings: S3Settings, data: bytes) -> None:
    async with asking(settings, always(data)) as (backend, server):
        buffer = bytearray(b"\xee" * 150)
        assert await backend.get(DIGEST, offset=100, length=100, into=buffer) == DATA[100:200]
        assert buffer[100:] == b"\xee" * 50
        assert server.requests[0].headers["range"] == "bytes=100-199"


async def test_all_of_it_from_the_start_is_cut(settings: S3Settings) -> None:
    async with asking(settings, always(answer(200, DATA))) as (backend, _):
        assert await backend.get(DIGEST, offset=0, length=10) == DATA[:10]


@pytest.mark.parametrize(
    ("data", "expected", "text"),
    [
        (span(101, 200), StorageUnavailable, "called 'bytes 101-200'"),
        (span(100, 198), StorageUnavailable, "sent 99 bytes"),
        (span(100, 199, content_range=""), StorageUnavailable, "called ''"),
        (answer(200, DATA[100:200]), StorageUnavailable, "sent 100 bytes, for 100 from byte 100"),
        (answer(200, DATA, content_length=""), StorageUnavailable, "sent None bytes"),
        (span(100, 149, 150), ObjectTruncated, "the object has 150 bytes, 200 are needed"),
        (error(416, "InvalidRange"), ObjectTruncated, "ends before"),
        (error(416), ObjectTruncated, "ends before"),
        (span(100, 199)[:-1], StorageUnavailable, "connection"),
        (span(100, 199)[:-100], StorageUnavailable, "connection"),
        (span(100, 199)[:20], StorageUnavailable, "connection"),
        (b"", StorageUnavailable, "connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", StorageUnavailable, "connection"),
        (answer(204), StorageUnavailable, "sent"),
    ],
)
async def test_answers_that_do_not(settings: S3Settings, data: bytes, expected: type[StorageError], text: str) -> None:
    async with asking(settings, always(data)) as (backend, server):
        buffer = bytearray(200)
        with pytest.raises(expected, match=text) as caught:
            await backend.get(DIGEST, offset=100, length=100, into=buffer)
        assert type(caught.value) is expected
        assert len(server.requests) == 1, "only RetryingBackend asks again"
        buffer.clear()  # nobody refers to it any more


ANSWERS: dict[bytes, tuple[type[StorageError], str]] = {
    error(400, "InvalidStorageClass"): (StorageRejected, 'check storage_class = "STANDARD"'),
    error(400, "AuthorizationHeaderMalformed", "expecting 'eu-west-1'"): (
        StorageRejected,
        'check region = "us-east-1"',
    ),
    error(400, "KMS.NotFoundException"): (StorageRejected, 'check sse = "None"'),
    error(400, "EntityTooSmall"): (StorageRejected, "check multipart_chunk_bytes"),
    error(400, "Whatever", "in\r\n two  lines"): (StorageRejected, r"400 Whatever: in two lines$"),
    error(400, "ExpiredToken"): (StorageDenied, "check access_key_ref"),
    error(400, "BadDigest"): (StorageUnavailable, "BadDigest"),
    error(400, "RequestTimeout"): (StorageTimeout, "RequestTimeout"),
    error(301, "PermanentRedirect"): (StorageRejected, 'check region = "us-east-1"'),
    error(307, "TemporaryRedirect"): (StorageUnavailable, "307 TemporaryRedirect.*check endpoint_url"),
    error(307): (StorageUnavailable, "307.*check endpoint_url"),
    error(400): (StorageRejected, "answers 400"),
    error(401): (StorageDenied, "check access_key_ref = file:"),
    error(403, "AccessDenied"): (StorageDenied, 'may not do that in bucket = "castore-tests"'),
    error(403, "RequestTimeTooSkewed"): (StorageDenied, "the clocks"),
    error(403, "QuotaExceeded"): (StorageFull, "QuotaExceeded"),
    error(404): (StorageUnavailable, "404 for what is being stored"),
    error(404, "NoSuchBucket"): (StorageRejected, 'check bucket = "castore-tests"'),
    error(405, "MethodNotAllowed"): (StorageRejected, "MethodNotAllowed"),
    error(409, "OperationAborted"): (StorageUnavailable, "OperationAborted"),
    error(411, "MissingContentLength"): (StorageRejected, "411"),
    error(429): (StorageUnavailable, "429"),
    error(500, "InternalError"): (StorageUnavailable, "InternalError"),
    error(503, "SlowDown"): (StorageUnavailable, "SlowDown"),
    error(504): (StorageTimeout, "504"),
    error(507): (StorageFull, "507"),
    answer(500, b"<html>not XML at all"): (StorageUnavailable, "500"),
    answer(200, b"", etag='"00000000000000000000000000000000"'): (StorageUnavailable, "other bytes arrived"),
}


@pytest.mark.parametrize("data", ANSWERS, ids=[data.split(b"\r\n")[0].decode()[9:] for data in ANSWERS])
async def test_answers_to_a_put(settings: S3Settings, data: bytes) -> None:
    kind, text = ANSWERS[data]

    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(answer() if request.method == "HEAD" else data)

    async with asking(settings, handler) as (backend, server):
        with pytest.raises(StorageError, match=text) as caught:
            await backend.put(DIGEST, BytesSource(DATA))
        assert type(caught.value) is kind
        assert str(caught.value).startswith(f"backend remote: put {DIGEST}: ")
        assert str(caught.value).isprintable()
        assert [request.method for request in server.requests].count("PUT") == 1, "only RetryingBackend tries again"


async def test_what_a_put_says_on_the_wire(settings: S3Settings, tmp_path: Path) -> None:
    settings = but(settings, storage_class="COLD", sse="aws:kms")

    async def handler(request: Request, stream: Stream) -> None:
        length = len(DATA) if request.method == "HEAD" else 0
        sent = answer(etag='"not-an-md5"', x_amz_server_side_encryption="aws:kms", content_length=str(length))
        await stream.send_all(sent)

    async with asking(settings, handler) as (backend, server):
        await backend.put(DIGEST, BytesSource(DATA))
    put, head = server.requests
    assert (put.method, head.method) == ("PUT", "HEAD")
    assert put.target == head.target
    assert put.target.startswith(f"/{settings.bucket}/{settings.key_prefix}/sha256/")
    assert put.body == DATA
    assert put.headers["content-md5"] == b64encode(hashlib.md5(DATA).digest()).decode()
    assert put.headers["x-amz-content-sha256"] == DIGEST.hex
    assert put.headers["x-amz-storage-class"] == "COLD"
    assert put.headers["x-amz-server-side-encryption"] == "aws:kms"
    assert f"Credential={(tmp_path / 'access').read_text().strip()}/" in put.headers["authorization"]
    assert "/us-east-1/s3/aws4_request" in put.headers["authorization"]
    assert [name for name in put.headers if "checksum" in name or name == "expect"] == []


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        (answer(content_length="4095"), "4095 bytes arrived of 4096"),
        (answer(content_length="4096", etag='"00000000000000000000000000000000"'), "other bytes arrived"),
        (answer(404), "not there right after it was stored"),
    ],
)
async def test_a_put_is_not_believed_unless_it_is_proven(settings: S3Settings, stored: bytes, text: str) -> None:
    async def handler(request: Request, stream: Stream) -> None:
        of_the_bucket = request.target.rstrip("/").count("/") == 1
        await stream.send_all(stored if request.method == "HEAD" and not of_the_bucket else answer())

    async with asking(settings, handler) as (backend, _):
        with pytest.raises(StorageUnavailable, match=text):
            await backend.put(DIGEST, BytesSource(DATA))


@pytest.mark.parametrize("operation", ["get", "head", "delete"])
@pytest.mark.parametrize("bucket", [answer(404), answer(403), answer(500)], ids=["no bucket", "forbidden", "broken"])
async def test_a_bare_404_means_the_object_only_where_the_bucket_is_known(
    settings: S3Settings, operation: str, bucket: bytes
) -> None:
    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(bucket if request.target.rstrip("/").count("/") == 1 else answer(404))

    async with asking(settings, handler) as (backend, _):
        with pytest.raises((StorageRejected, StorageDenied, StorageUnavailable)):
            await ask(backend, operation)
    async with asking(settings, missing_in_a_bucket) as (backend, _):
        if operation == "delete":
            await ask(backend, operation)
        else:
            with pytest.raises(ObjectMissing):
                await ask(backend, operation)


async def missing_in_a_bucket(request: Request, stream: Stream) -> None:
    await stream.send_all(answer(200 if request.target.rstrip("/").count("/") == 1 else 404))


def ask(backend: S3Backend, operation: str) -> Awaitable[object]:
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "get": lambda: backend.get(DIGEST, offset=0, length=1),
        "head": lambda: backend.head(DIGEST),
        "delete": lambda: backend.delete(DIGEST),
    }
    return calls[operation]()


@pytest.mark.parametrize(
    "data",
    [
        b"no XML",
        b"<ListBucketResult></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Size>1</Size></Contents></ListBucketResult>",
        b"<ListBucketResult><Contents><Key>k</Key><LastModified>soon</LastModified></Contents></ListBucketResult>",
    ],
)
async def test_a_listing_that_makes_no_sense(settings: S3Settings, data: bytes) -> None:
    async with asking(settings, always(answer(200, data))) as (backend, _):
        with pytest.raises(StorageUnavailable, match=r"makes no sense|answers 500"):
            async with backend.list("sha256") as objects:
                await anext(objects)


async def test_a_head_that_makes_no_sense(settings: S3Settings) -> None:
    async with asking(settings, always(answer(200, last_modified="soon"))) as (backend, _):
        with pytest.raises(StorageUnavailable, match="makes no sense"):
            await backend.head(DIGEST)


async def test_sweep_spares_an_upload_that_somebody_works_on(settings: S3Settings) -> None:
    """One began long ago, but its last part came a minute before the server's own clock."""
    key = f"{settings.key_prefix}/sha256/{DIGEST.hex[:2]}/{DIGEST.hex[2:4]}/{DIGEST.hex}"
    listing = (
        "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>"
        + "".join(
            f"<Upload><Key>{key}</Key><UploadId>{upload_id}</UploadId><Initiated>2001-02-03T00:00:00Z</Initiated></Upload>"
            for upload_id in ("at-work", "abandoned")
        )
        + "</ListMultipartUploadsResult>"
    )
    parts = (
        "<ListPartsResult><IsTruncated>false</IsTruncated>"
        "<Part><PartNumber>1</PartNumber><Size>1</Size><ETag>e</ETag><LastModified>{moment}</LastModified></Part>"
        "</ListPartsResult>"
    )
    moments = {"at-work": "2001-02-03T11:59:00Z", "abandoned": "2001-02-03T10:59:00Z"}

    async def handler(request: Request, stream: Stream) -> None:
        upload_id = request.query.get("uploadId")
        text = parts.format(moment=moments[upload_id]) if upload_id else listing
        await stream.send_all(
            answer(204)
            if request.method == "DELETE"
            else answer(200, text.encode(), date="Sat, 03 Feb 2001 12:00:00 GMT")
        )

    async with asking(settings, handler) as (backend, server):
        assert await backend.sweep() == 1
        deleted = [request.query["uploadId"] for request in server.requests if request.method == "DELETE"]
        assert deleted == ["abandoned"]


@pytest.mark.parametrize(("region", "constraint"), [("us-east-1", None), ("default", None), ("eu-west-1", "eu-west-1")])
async def test_where_a_bucket_is_made(settings: S3Settings, region: str, constraint: str | None) -> None:
    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(answer(404 if request.method == "HEAD" else 200))

    async with asking(but(settings, region=region), handler) as (backend, server):
        await backend.create()
    _, create = server.requests
    assert create.method == "PUT"
    assert create.target.rstrip("/") == f"/{settings.bucket}"
    if constraint is None:
        assert create.body == b""
    else:
        assert f"<LocationConstraint>{constraint}</LocationConstraint>".encode() in create.body


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", None),
        ("0", 0),
        ("7", 7),
        (" 120 ", 120),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("٣", None),
        ("Sat, 03 Feb 2001 12:00:00 GMT", 0),
        ("Sat, 99 Feb 2001 12:00:00 GMT", None),
    ],
)
async def test_what_retry_after_says(settings: S3Settings, text: str, seconds: float | None) -> None:
    async with asking(settings, always(answer(503, retry_after=text))) as (backend, _):
        with pytest.raises(StorageUnavailable) as caught:
            await backend.get(DIGEST, offset=0, length=1)
    assert caught.value.retry_after_s == seconds


async def test_retry_after_may_be_a_date(settings: S3Settings) -> None:
    date = formatdate(time.time() + 60, usegmt=True)
    async with asking(settings, always(answer(503, retry_after=date))) as (backend, _):
        with pytest.raises(StorageUnavailable) as caught:
            await backend.get(DIGEST, offset=0, length=1)
    assert caught.value.retry_after_s is not None
    assert 60 - PATIENCE_S < caught.value.retry_after_s <= 60


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("region", ["", "eu-west-1"])
async def test_nobody_is_sent_anything_by_a_redirect(settings: S3Settings, status: int, region: str) -> None:
    """Not the body, not a signature, and not a second request to the server itself, with another region."""
    async with serving(always(answer(200))) as elsewhere:
        redirect = answer(status, location=f"{elsewhere.endpoint_url}/a/b", x_amz_bucket_region=region)
        async with asking(settings, always(redirect)) as (backend, server):
            kind = StorageUnavailable if status == 307 else StorageRejected
            with pytest.raises(kind, match=f"answers {status}"):
                await backend.put(DIGEST, BytesSource(DATA))
            with pytest.raises(kind, match=f"answers {status}"):
                await backend.get(DIGEST, offset=0, length=1)
            with pytest.raises(kind, match=f"answers {status}"):
                await backend.head(DIGEST)
            assert [request.method for request in server.requests] == ["PUT", "GET", "HEAD"]
        assert elsewhere.requests == []


async def test_a_wrong_region_is_said_and_not_corrected(settings: S3Settings) -> None:
    body = (
        b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region 'us-east-1' is wrong; expecting "
        b"'eu-west-1'</Message><Region>eu-west-1</Region></Error>"
    )
    async with asking(settings, always(answer(400, body))) as (backend, server):
        with pytest.raises(StorageRejected, match=r"expecting 'eu-west-1'; check region = \"us-east-1\""):
            await backend.get(DIGEST, offset=0, length=1)
        assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["get", "put"])
async def test_a_kept_connection_that_ends_costs_a_try(settings: S3Settings, name: str) -> None:
    """It answers once, and then is closed by the server instead of an answer."""

    async def handler(request: Request, stream: Stream) -> None:
        await stream.send_all(span(0, 0, connection="keep-alive"))
        await stream.receive_some(1)

    async with asking(settings, handler) as (backend, server):
        get = partial(backend.get, DIGEST, offset=0, length=1)
        await get()
        with pytest.raises(StorageUnavailable, match=r"connection .* broke"):
            await (get() if name == "get" else backend.put(DIGEST, BytesSource(DATA)))
        assert len(server.requests) == 1, "the second came by the connection that was closed"
