"""Puts that meet an upload begun by somebody else: what is taken up, and what is left. The server is scripted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import StorageError, StorageUnavailable
from castore.storage.backends.s3 import S3Backend
from castore.storage.conformance_sources import PATIENCE_S, BlockingSource
from castore.storage.layout import key_of
from castore.storage.source import BytesSource
from tests.servers.scripted_http import Request, ScriptedHTTP, answer, serving

from .conftest import but
from .test_s3_multipart import PART, blob

LISTING: Final = """<ListMultipartUploadsResult><IsTruncated>false</IsTruncated><Upload><Key>{key}</Key>
<UploadId>of-somebody</UploadId><Initiated>2001-02-03T00:00:00Z</Initiated>{storage_class}</Upload>
</ListMultipartUploadsResult>"""
PARTS: Final = "<ListPartsResult><IsTruncated>false</IsTruncated></ListPartsResult>"
BEGUN: Final = "<InitiateMultipartUploadResult><UploadId>new</UploadId></InitiateMultipartUploadResult>"
NOW: Final = "Sat, 03 Feb 2001 12:00:00 GMT"


@asynccontextmanager
async def scripted(settings: S3Settings, digest: Digest, size: int, **more: str) -> AsyncIterator[Any]:
    """A backend whose server holds an upload that somebody began, and answers a part and a Complete as it is told."""

    async def handler(request: Request, stream: Any) -> None:
        key = f"{settings.key_prefix}/{key_of(digest)}"
        body = ""
        headers = {"date": NOW}
        status = 200
        if request.method == "GET":
            of_uploads = "uploads" in request.query
            body = LISTING.format(key=key, storage_class=more.get("storage_class", "")) if of_uploads else PARTS
        elif request.method == "POST" and "uploads" in request.query:
            body = BEGUN
        elif request.method == "HEAD":
            headers |= {"content_length": str(size), "last_modified": more["stored"], "etag": '"opaque"'}
            headers["x_amz_server_side_encryption"] = settings.sse or ""
        elif request.method == "PUT":
            status = int(more.get("part", "200"))
            headers["etag"] = '"whatever"'
        elif request.method == "POST":
            status = int(more.get("complete", "200"))
        else:
            status = 204
        await stream.send_all(answer(status, body.encode(), **headers))

    async with serving(handler) as server:
        backend = S3Backend(but(settings, endpoint_url=server.endpoint_url))
        try:
            yield backend, server
        finally:
            await backend.aclose()


def begun_anew(server: ScriptedHTTP) -> bool:
    return any(request.method == "POST" and "uploads" in request.query for request in server.requests)


def aborted(server: ScriptedHTTP) -> list[str]:
    return [request.query["uploadId"] for request in server.requests if request.method == "DELETE"]


@pytest.mark.parametrize(
    ("changes", "storage_class", "taken_up"),
    [
        ({}, "", True),
        ({}, "<StorageClass>STANDARD</StorageClass>", True),
        ({}, "<StorageClass>COLD</StorageClass>", False),
        ({"storage_class": "COLD"}, "<StorageClass>STANDARD</StorageClass>", False),
        ({"sse": "AES256"}, "", False),
        ({"sse": "aws:kms"}, "", False),
    ],
)
async def test_an_upload_of_somebody_with_other_settings(
    of_nobody: S3Settings, changes: dict[str, Any], storage_class: str, taken_up: bool
) -> None:
    digest, data = blob(PART + 1)
    settings = but(of_nobody, **changes)
    async with scripted(settings, digest, len(data), storage_class=storage_class, stored=NOW) as (backend, server):
        await backend.put(digest, BytesSource(data))
        assert begun_anew(server) != taken_up
        assert aborted(server) == ([] if taken_up else ["of-somebody"])


@pytest.mark.parametrize(("sse", "left"), [(None, True), ("AES256", True), ("aws:kms", False)])
async def test_what_is_left_is_what_can_be_taken_up(of_nobody: S3Settings, sse: str | None, left: bool) -> None:
    """Where keys of the server encrypt, no ETag is an MD5, and nothing tells what a part holds."""
    digest, data = blob(PART + 1)
    settings = but(of_nobody, sse=sse, storage_class="MINE")
    async with scripted(settings, digest, len(data), part="503", storage_class="<StorageClass>ITS</StorageClass>") as (
        backend,
        server,
    ):
        with pytest.raises(StorageUnavailable):
            await backend.put(digest, BytesSource(data))
        assert begun_anew(server)
        assert aborted(server) == ([] if left else ["new"])


async def test_a_cancelled_put_leaves_nothing_that_cannot_be_taken_up(of_nobody: S3Settings) -> None:
    digest, data = blob(3 * PART)
    source = BlockingSource(data, 2 * PART)
    try:
        async with scripted(but(of_nobody, sse="aws:kms"), digest, len(data)) as (backend, server):
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(backend.put, digest, source)
                    await trio.to_thread.run_sync(source.blocked.wait, abandon_on_cancel=True)
                    nursery.cancel_scope.cancel()
            assert aborted(server) == ["new"]
    finally:
        source.go_on.set()


@pytest.mark.parametrize(
    ("stored", "believed"),
    [(NOW, True), ("Sat, 03 Feb 2001 12:00:09 GMT", True), ("Sat, 03 Feb 2001 11:59:00 GMT", False)],
)
async def test_an_object_from_before_proves_nothing(of_nobody: S3Settings, stored: str, believed: bool) -> None:
    """It may be the damaged one that is to be repaired, with a size and an ETag from when it was whole."""
    digest, data = blob(PART + 1)
    cold = "<StorageClass>COLD</StorageClass>"
    async with scripted(of_nobody, digest, len(data), storage_class=cold, stored=stored, complete="500") as (
        backend,
        _,
    ):
        if believed:
            await backend.put(digest, BytesSource(data))
        else:
            with pytest.raises(StorageError, match="answers 500"):
                await backend.put(digest, BytesSource(data))
