"""Each row of the table of faults, against a real server behind a proxy that does the harm; and the table in docs/."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from botocore.exceptions import ClientError

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import StorageError
from castore.storage.conformance_sources import PATIENCE_S
from castore.storage.deadline import BASE_S, READ_BASE_S
from castore.storage.layout import key_of
from castore.storage.retry import LAST_TRY_S
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend
from tests.blobs.blob_world import World
from tests.servers.fault_proxy import FaultProxy

from .conftest import MIB, but, uploads
from .fault_table import DATA, DOCUMENT, FAULTS, ONE, REFUSED, ROWS, TWO, Known, Row, table, with_table
from .quick import SPEED, wrapped

DIGEST: Final = Digest.of(DATA)
NEW: Final = b"what is put"
PARTS: Final = bytes(16 * MIB)
"""Of four parts."""
OFFSET, LENGTH = 1000, 200_000

_STALLED: Final = {Known.READ: LAST_TRY_S / SPEED, Known.WRITE: BASE_S / SPEED}
"""Seconds that such a row takes at least."""
_METHODS: Final = {
    "get": "GET",
    "head": "HEAD",
    "put": "PUT",
    "list": "GET",
    "delete": "DELETE",
    ONE: "GET",
    TWO: "GET",
}


async def listing(backend: StorageBackend) -> list[Digest]:
    async with backend.list("sha256") as objects:
        return [info.digest async for info in objects]


def call(backend: StorageBackend, operation: str) -> Awaitable[object]:
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "get": lambda: backend.get(DIGEST, offset=OFFSET, length=LENGTH),
        "head": lambda: backend.head(DIGEST),
        "put": lambda: backend.put(Digest.of(NEW), BytesSource(NEW)),
        "put in parts": lambda: backend.put(Digest.of(PARTS), BytesSource(PARTS)),
        "list": lambda: listing(backend),
        "delete": lambda: backend.delete(DIGEST),
    }
    return calls[operation]()


def break_it(proxy: FaultProxy, row: Row) -> None:
    if row.fault == REFUSED:
        proxy.cut()
    elif row.fault.startswith("part 3"):
        proxy.break_with(FAULTS[row.fault], method="PUT", value=("partNumber", "3"), times=row.times)
    elif row.fault.startswith("Complete"):
        proxy.break_with(FAULTS[row.fault], method="POST", query=["uploadId"], times=row.times)
    else:
        proxy.break_with(FAULTS[row.fault], method=_METHODS[row.operation], times=row.times)


def mend_it(proxy: FaultProxy, row: Row) -> None:
    if row.fault == REFUSED:
        proxy.restore()
    proxy.mend()


def stored(outside: Any, settings: S3Settings, digest: Digest) -> bytes | None:
    """What the server itself has under a digest."""
    try:
        answer = outside.get_object(Bucket=settings.bucket, Key=f"{settings.key_prefix}/{key_of(digest)}")
    except ClientError as exc:
        if exc.response["Error"]["Code"] != "NoSuchKey":
            raise
        return None
    body: bytes = answer["Body"].read()
    return body


CALLS: Final = [row for row in ROWS if row.operation not in (ONE, TWO)]
BOTH: Final = [row for row in CALLS if row.operation.startswith(("get", "put")) and row.known not in _STALLED]
"""What is asked both by the native transfer and by the other one. Of silence the wrappers' deadlines know."""
READS: Final = [row for row in ROWS if row.operation in (ONE, TWO)]


def ids(rows: list[Row]) -> list[str]:
    return [f"{row}{'' if row.error else ', overcome'}".replace("`", "") for row in rows]


@pytest.mark.parametrize(
    ("row", "transfer"),
    [*((row, "native") for row in CALLS), *((row, "aioboto3") for row in BOTH)],
    ids=[*ids(CALLS), *(f"{text}, aioboto3" for text in ids(BOTH))],
)
async def test_a_call(
    settings: S3Settings, through: S3Settings, proxy: FaultProxy, outside: Any, row: Row, transfer: str
) -> None:
    stalled_s = _STALLED.get(row.known, 0.0)
    speed = SPEED if stalled_s else None if row.operation == "get" else 1
    async with wrapped(but(through, transfer=transfer), speed=speed) as backend:
        await backend.put(DIGEST, BytesSource(DATA))
        break_it(proxy, row)
        began = trio.current_time()
        result = error = None
        with trio.fail_after(stalled_s + PATIENCE_S):
            try:
                result = await call(backend, row.operation)
            except StorageError as exc:
                error = exc
        assert type(error) is (row.error or type(None)), error
        assert trio.current_time() - began >= stalled_s
        if row.known is Known.ASKED:
            assert trio.current_time() - began >= row.tries
        assert len(proxy.met) == row.tries
        if row.operation in _METHODS and row.fault != REFUSED:
            sent = [request for request in proxy.requests if request.method == _METHODS[row.operation]]
            assert len(sent) == row.tries + (1 if row.error is None and row.tries == row.times else 0)
        if row.operation == "get" and error is None:
            assert result == DATA[OFFSET : OFFSET + LENGTH]
        for data in (NEW, PARTS):
            assert stored(outside, settings, Digest.of(data)) in (None, data), "whole or absent"
        mend_it(proxy, row)
        result = await call(backend, row.operation)
        if row.operation == "get":
            assert result == DATA[OFFSET : OFFSET + LENGTH]
        elif row.operation == "list":
            assert result == [DIGEST]
        elif row.operation == "put":
            assert stored(outside, settings, Digest.of(NEW)) == NEW
        elif row.operation == "put in parts":
            assert stored(outside, settings, Digest.of(PARTS)) == PARTS
        elif row.operation == "delete":
            assert stored(outside, settings, DIGEST) is None
    assert uploads(outside, settings) == []


@pytest.mark.parametrize("row", READS, ids=ids(READS))
async def test_a_read(through: S3Settings, proxy: FaultProxy, tmp_path: Path, nursery: trio.Nursery, row: Row) -> None:
    """By the read path, with its real bounds: what a backend cannot know, it finds."""
    world = await World(tmp_path, "remote", "copy").create()
    async with wrapped(through) as backend:
        copy = world["copy"]
        world.backends = {"remote": backend, "copy": copy}  # type: ignore[dict-item]
        reader = world.reader()
        await nursery.start(reader.run)
        blob = await world.add(DATA, *(("remote",) if row.operation == ONE else ("remote", "copy")))
        break_it(proxy, row)
        error = None
        began = trio.current_time()
        with trio.fail_after(PATIENCE_S):
            try:
                assert await reader.open(blob).read(0, len(DATA)) == DATA
            except Exception as exc:
                error = exc
        assert type(error) is (row.error or type(None)), error
        if row.known is Known.PATIENCE:
            assert trio.current_time() - began < READ_BASE_S, "long before the first location has failed"
        assert len(proxy.met) == row.tries
        assert len(copy.gets) == (1 if row.operation == TWO else 0)
        flipped_for_good = row.fault == "a flipped bit" and row.times > 1
        assert [report[1:] for report in world.reports] == ([("remote", "digest_mismatch")] if flipped_for_good else [])
        mend_it(proxy, row)
        assert await reader.open(blob).read(0, len(DATA)) == DATA
    world.close()


def test_every_fault_has_a_row() -> None:
    assert {row.fault for row in ROWS} == {REFUSED, *FAULTS}


def test_the_document_has_the_table_of_now() -> None:
    """Else: python -m tests.storage.s3.fault_table"""
    text = DOCUMENT.read_text()
    assert table() in text
    assert with_table(text) == text
