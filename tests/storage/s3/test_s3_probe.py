"""The probe of S3 servers: what real ones are found to do, and that each thing castore relies on is found missing."""

from __future__ import annotations

import hashlib
import itertools
import re
from base64 import b64decode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import StorageDenied, StorageError, StorageRejected, StorageUnavailable
from castore.storage.backends.s3 import S3Backend
from castore.storage.backends.s3_probe_place import LEFTOVER_S
from castore.storage.backends.s3_probe_put import crc
from castore.storage.open import probe_backend
from castore.storage.source import BytesSource
from castore.storage.spi import Finding, ProbeReport
from tests.servers.every import EveryServer
from tests.servers.scripted_http import Request
from tests.servers.seaweedfs import SeaweedFS
from tests.servers.tampering import Answered, Forward, Tamper, tampering

from .conftest import but, in_file, settings_on, uploads

OPERATOR = Path(__file__).parents[3] / "docs/OPERATOR.md"
COLUMNS = {"SeaweedFS": "seaweedfs", "RGW, http": "rgw", "RGW, https": "rgw-https", "MinIO": "juicefs"}
"""Columns of the document's table, and the servers that they are of."""
SHOWN = {"yes": "yes", "no": "**no**", "not supported": "refused", "unknown": "fails"}


def stated() -> dict[str, dict[str, str]]:
    """The document's table of what each server enforces: column -> name of the question -> what stands there."""
    lines = OPERATOR.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| name | what is asked |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return {
        column: {row[0].strip("`"): row[number] for row in rows}
        for number, column in enumerate(header)
        if column in COLUMNS
    }


def found(report: ProbeReport) -> dict[str, Finding]:
    return {finding.name: finding for finding in report.findings}


def failed(report: ProbeReport) -> set[str]:
    """What castore relies on and is not given."""
    return {finding.name for finding in report.findings if finding.severity == "fail"}


def everything(outside: Any, settings: S3Settings) -> list[str]:
    """All that lies below the backend's prefix."""
    page = outside.list_objects_v2(Bucket=settings.bucket, Prefix=settings.key_prefix)
    return [entry["Key"] for entry in page.get("Contents", ())] + uploads(outside, settings)


@pytest.mark.parametrize("column", COLUMNS)
async def test_real_servers_do_what_the_document_says(
    every_server: EveryServer, of_nobody: S3Settings, tmp_path: Path, column: str
) -> None:
    server = every_server[COLUMNS[column]]
    settings = settings_on(server, of_nobody, tmp_path)
    report = await probe_backend(settings)
    answers = {name: f"{finding.enforced}: {finding.answer}" for name, finding in found(report).items()}
    assert {name: SHOWN[finding.enforced] for name, finding in found(report).items()} == stated()[column], answers
    assert failed(report) == set()
    client = server.client()
    assert everything(client, settings) == []
    client.close()


async def test_answers_are_named(settings: S3Settings) -> None:
    report = await probe_backend(settings)
    assert report.server.startswith("SeaweedFS")
    findings = found(report)
    assert len(findings) == len(report.findings)
    assert findings["put-md5"].answer == "400 BadDigest"
    assert findings["checksum-sha256"].answer == "400 BadDigest; a right one is returned"
    assert findings["create-only-race"].answer == "1 of 8 wins"
    assert findings["range-past-end"].answer == "416, 416, 206"
    assert (findings["payload-sha256"].enforced, findings["payload-sha256"].severity) == ("no", "info")
    assert all(finding.question and finding.expected for finding in report.findings)


async def test_objects_are_left_alone(settings: S3Settings, outside: Any) -> None:
    data = b"an object of somebody's"
    backend = S3Backend(settings)
    await backend.put(Digest.of(data), BytesSource(data))
    before = everything(outside, settings)
    await backend.probe()
    assert everything(outside, settings) == before
    assert await backend.get(Digest.of(data), offset=0, length=len(data)) == data
    await backend.aclose()


def test_checksums_are_the_published_ones() -> None:
    # The check values of these CRCs, for the digits 1 to 9 (RFC 3720 has CRC-32C, NVM Express 64b CRC the other).
    assert crc(b"123456789", 0x82F63B78, 32).hex() == "e3069283"
    assert crc(b"123456789", 0x9A6C9329AC4BC9B5, 64).hex() == "ae8b14860a799888"


# servers that do one thing differently

Tampering = Callable[[S3Settings, Any], Tamper]


def answering(tamper: Callable[[Request, Answered], Answered]) -> Tampering:
    """Changes what the real server answered."""

    def make(settings: S3Settings, outside: Any) -> Tamper:
        async def handle(request: Request, forward: Forward) -> Answered:
            return tamper(request, await forward(request))

        return handle

    return make


def key_of(request: Request, settings: S3Settings) -> str:
    return request.target.partition("?")[0].removeprefix(f"/{settings.bucket}/")


def is_wrong_md5(request: Request) -> bool:
    said = request.headers.get("content-md5")
    return said is not None and b64decode(said) != hashlib.md5(request.body, usedforsecurity=False).digest()


def takes_wrong_md5(of_parts: bool) -> Tampering:
    def make(settings: S3Settings, outside: Any) -> Tamper:
        async def handle(request: Request, forward: Forward) -> Answered:
            is_part = "partNumber" in request.query
            if request.method != "PUT" or not is_wrong_md5(request) or is_part != of_parts:
                return await forward(request)
            names: dict[str, Any] = {"Bucket": settings.bucket, "Key": key_of(request, settings), "Body": request.body}
            if is_part:
                names |= {"UploadId": request.query["uploadId"], "PartNumber": int(request.query["partNumber"])}
            put = outside.upload_part if is_part else outside.put_object
            etag = (await trio.to_thread.run_sync(partial(put, **names)))["ETag"]
            return Answered(200, (("etag", etag),))

        return handle

    return make


def lists_as_before(settings: S3Settings, outside: Any) -> Tamper:
    known: dict[str, Answered] = {}

    async def handle(request: Request, forward: Forward) -> Answered:
        if "list-type" not in request.query:
            return await forward(request)
        if request.target not in known:
            known[request.target] = await forward(request)
        return known[request.target]

    return handle


def reads_as_before(settings: S3Settings, outside: Any) -> Tamper:
    known: dict[str, Answered] = {}

    async def handle(request: Request, forward: Forward) -> Answered:
        answered = await forward(request)
        is_object = request.method == "GET" and not request.query and answered.status == 200
        return known.setdefault(request.target, answered) if is_object else answered

    return handle


def keeps_what_is_deleted(settings: S3Settings, outside: Any) -> Tamper:
    known: dict[tuple[str, str], Answered] = {}

    async def handle(request: Request, forward: Forward) -> Answered:
        answered = await forward(request)
        name = request.method, request.target
        if request.method not in ("GET", "HEAD") or "range" in request.headers:
            return answered
        if answered.status == 200:
            known[name] = answered
        return known.get(name, answered) if answered.status == 404 else answered

    return handle


def takes_aborts_and_does_nothing(settings: S3Settings, outside: Any) -> Tamper:
    async def handle(request: Request, forward: Forward) -> Answered:
        if request.method == "DELETE" and "uploadId" in request.query:
            return Answered(204)
        return await forward(request)

    return handle


def all_of_it(request: Request, answered: Answered) -> Answered:
    return answered.but(status=200) if answered.status == 206 else answered


def other_bytes_of_it(request: Request, answered: Answered) -> Answered:
    return answered.but(body=answered.body[::-1]) if answered.status == 206 and len(answered.body) > 50 else answered


def another_range(request: Request, answered: Answered) -> Answered:
    said = dict(answered.headers).get("content-range", "")
    return answered.but(content_range=said.replace("bytes 1-", "bytes 0-")) if said else answered


def zeros_behind_the_end(request: Request, answered: Answered) -> Answered:
    if answered.status != 416:
        return answered
    return Answered(206, (("content-range", "bytes 1000-1009/1010"),), bytes(10))


def found_empty(request: Request, answered: Answered) -> Answered:
    is_get = request.method == "GET" and "range" in request.headers
    return Answered(200) if is_get and answered.status == 404 else answered


def without_framing(request: Request, answered: Answered) -> Answered:
    return answered.but(body=b"hello") if b"chunk-signature" in answered.body else answered


def one_page(request: Request, answered: Answered) -> Answered:
    body = answered.body.replace(b"<IsTruncated>true<", b"<IsTruncated>false<")
    return answered.but(body=body) if request.query.get("max-keys") == "5" else answered


def one_page_again_and_again(request: Request, answered: Answered) -> Answered:
    body = answered.body.replace(b"<IsTruncated>false<", b"<IsTruncated>true<")
    return answered.but(body=body) if request.query.get("max-keys") == "5" else answered


def downwards(request: Request, answered: Answered) -> Answered:
    entries = re.findall(rb"<Contents>.*?</Contents>", answered.body, flags=re.DOTALL)
    if len(entries) < 2:
        return answered
    rest = re.sub(rb"<Contents>.*</Contents>", b"@", answered.body, flags=re.DOTALL)
    return answered.but(body=rest.replace(b"@", b"".join(reversed(entries))))


def in_small_letters(request: Request, answered: Answered) -> Answered:
    return answered.but(body=answered.body.replace(b"Az09", b"az09")) if "list-type" in request.query else answered


def parts_the_other_way(request: Request, answered: Answered) -> Answered:
    in_parts = dict(answered.headers).get("etag", "").strip('"').endswith("-2")
    return answered.but(body=answered.body[::-1]) if in_parts and answered.body else answered


def completes_without_a_part(request: Request, answered: Answered) -> Answered:
    if request.method == "POST" and b"<Part>" in request.body and request.body.count(b"<PartNumber>") == 2:
        done = b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
        return Answered(200, (("content-type", "application/xml"),), done) if answered.status == 400 else answered
    return answered


def without_parts(request: Request, answered: Answered) -> Answered:
    if request.method != "GET" or "uploadId" not in request.query:
        return answered
    return answered.but(body=re.sub(rb"<Part>.*</Part>", b"", answered.body, flags=re.DOTALL))


def without_uploads(request: Request, answered: Answered) -> Answered:
    if request.method != "GET" or "uploads" not in request.query:
        return answered
    return answered.but(body=re.sub(rb"<Upload>.*</Upload>", b"", answered.body, flags=re.DOTALL))


DIFFERENT: dict[str, tuple[Tampering, set[str]]] = {
    "takes a wrong Content-MD5": (takes_wrong_md5(False), {"put-md5"}),
    "takes a part's wrong Content-MD5": (takes_wrong_md5(True), {"part-md5"}),
    "takes framing out of bodies": (answering(without_framing), {"put-payload"}),
    "gives 200 for ranges": (answering(all_of_it), {"range", "range-past-end"}),
    "gives other bytes for ranges": (
        answering(other_bytes_of_it),
        {"range"},
    ),
    "calls ranges by another name": (answering(another_range), {"range"}),
    "makes up what is behind the end": (answering(zeros_behind_the_end), {"range-past-end"}),
    "finds what was never put": (answering(found_empty), {"missing"}),
    "reads what was there before": (reads_as_before, {"read-after-write"}),
    "reads what was deleted": (keeps_what_is_deleted, {"read-after-delete"}),
    "lists what was there before": (lists_as_before, {"list-after-write"}),
    "ends after one page": (answering(one_page), {"list-pages"}),
    "lists downwards": (answering(downwards), {"list-order"}),
    "lists in small letters": (answering(in_small_letters), {"key-prefix"}),
    "turns parts around": (answering(parts_the_other_way), {"parts-whole"}),
    "completes without a part": (answering(completes_without_a_part), {"part-missing"}),
    "lists no parts": (answering(without_parts), {"parts-listed"}),
    "lists no uploads": (answering(without_uploads), {"uploads-listed"}),
    "aborts nothing": (takes_aborts_and_does_nothing, {"abort"}),
}


@pytest.mark.parametrize("difference", DIFFERENT)
async def test_a_server_that_is_different(
    settings: S3Settings, server: SeaweedFS, outside: Any, difference: str
) -> None:
    make, expected = DIFFERENT[difference]
    async with tampering(server.endpoint_url, make(settings, outside)) as between:
        report = await probe_backend(but(settings, endpoint_url=between.endpoint_url))
    answers = {finding.name: finding.answer for finding in report.findings if finding.severity not in ("pass", "info")}
    assert failed(report) == expected, answers
    assert {finding.name for finding in report.findings if finding.severity == "unknown"} == set(), answers
    assert all(finding.consequence for finding in report.findings if finding.severity == "fail")
    if difference != "aborts nothing":
        assert everything(outside, settings) == []


async def test_everything_relied_on_is_broken_by_some_server(settings: S3Settings) -> None:
    relied_on = {finding.name for finding in (await probe_backend(settings)).findings if finding.consequence}
    assert set().union(*(names for _, names in DIFFERENT.values())) == relied_on


async def test_encryption_is_relied_on_where_it_is_configured(
    settings: S3Settings, server: SeaweedFS, outside: Any
) -> None:
    async def tamper(request: Request, forward: Forward) -> Answered:
        if "x-amz-server-side-encryption" not in request.headers:
            return await forward(request)
        put = partial(outside.put_object, Bucket=settings.bucket, Key=key_of(request, settings), Body=request.body)
        await trio.to_thread.run_sync(put)
        return Answered()

    async with tampering(server.endpoint_url, tamper) as between:
        report = await probe_backend(but(settings, endpoint_url=between.endpoint_url, sse="AES256"))
    assert failed(report) == {"encryption"}
    assert found(report)["encryption"].answer == "taken, and not said of the object"


# what cannot be asked


async def test_what_fails_for_now_is_unknown(settings: S3Settings, server: SeaweedFS) -> None:
    asked: list[str] = []

    async def tamper(request: Request, forward: Forward) -> Answered:
        if "range" in request.headers:
            asked.append(request.headers["range"])
            return Answered(503, body=b"<Error><Code>SlowDown</Code></Error>")
        return await forward(request)

    async with tampering(server.endpoint_url, tamper) as between:
        report = await probe_backend(but(settings, endpoint_url=between.endpoint_url))
    assert failed(report) == set()
    unknown = {name for name, finding in found(report).items() if finding.severity == "unknown"}
    assert unknown == {"range", "range-past-end", "missing", "parts-whole"}
    assert "503 SlowDown" in found(report)["range"].answer
    assert asked.count("bytes=0-0") == 2  # once more, and no oftener


async def test_one_failure_says_nothing(settings: S3Settings, server: SeaweedFS) -> None:
    refused: set[str] = set()

    async def tamper(request: Request, forward: Forward) -> Answered:
        span = request.headers.get("range", "")
        if span and span not in refused:
            refused.add(span)
            return Answered(500)
        return await forward(request)

    async with tampering(server.endpoint_url, tamper) as between:
        report = await probe_backend(but(settings, endpoint_url=between.endpoint_url))
    assert refused
    assert found(report)["range-suffix"].enforced == "yes"


async def test_a_server_that_cannot_be_asked(settings: S3Settings, of_nobody: S3Settings, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("not the secret")
    refused = but(settings, secret_key_ref=in_file(tmp_path / "other", "secret_key_ref"))
    for others, expected in (
        (of_nobody, StorageUnavailable),
        (but(settings, bucket="no-such-bucket"), StorageRejected),
        (refused, StorageDenied),
    ):
        with pytest.raises(StorageError) as caught:
            await probe_backend(others)
        assert type(caught.value) is expected, str(caught.value)
        assert str(caught.value).startswith("backend remote: probe: ")


# what is left


async def test_a_probe_that_is_cancelled_leaves_nothing(settings: S3Settings, server: SeaweedFS, outside: Any) -> None:
    reached = trio.Event()

    async def tamper(request: Request, forward: Forward) -> Answered:
        answered = await forward(request)
        if "partNumber" in request.query:
            reached.set()
        return answered

    async with tampering(server.endpoint_url, tamper) as between:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(probe_backend, but(settings, endpoint_url=between.endpoint_url))
            await reached.wait()
            assert everything(outside, settings)
            nursery.cancel_scope.cancel()
    assert everything(outside, settings) == []


async def test_what_a_killed_probe_left_goes_when_it_is_old(
    settings: S3Settings, server: SeaweedFS, outside: Any
) -> None:
    left = f"{settings.key_prefix}/probe/0000/0001/object"
    outside.put_object(Bucket=settings.bucket, Key=left, Body=b"x")
    outside.create_multipart_upload(Bucket=settings.bucket, Key=left)
    await probe_backend(settings)
    assert everything(outside, settings) == [left, left]  # it may be at work

    async def tamper(request: Request, forward: Forward) -> Answered:
        later = datetime.now(UTC) + timedelta(seconds=LEFTOVER_S + 60)
        return (await forward(request)).but(date=format_datetime(later, usegmt=True))

    async with tampering(server.endpoint_url, tamper) as between:
        await probe_backend(but(settings, endpoint_url=between.endpoint_url))
    assert everything(outside, settings) == []
