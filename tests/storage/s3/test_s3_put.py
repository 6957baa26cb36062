"""Puts to a real server: in one piece and in parts, and what is left when one fails."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable
from typing import Any

import pytest
import trio

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import ObjectMissing, SourceChanged
from castore.storage.backends.s3 import S3Backend
from castore.storage.backends.s3_parts import MAX_PARTS, part_sizes
from castore.storage.conformance_sources import PATIENCE_S, BlockingSource, ScriptedSource, failing_reader
from castore.storage.layout import key_of
from castore.storage.open import sweep_backend
from castore.storage.source import BytesSource

from .conftest import MIB, but, uploads

PART = 5 * MIB
TIB = 1 << 40


def blob(size: int) -> tuple[Digest, bytes]:
    data = random.Random(size).randbytes(size)
    return Digest.of(data), data


def key(settings: S3Settings, digest: Digest) -> str:
    return f"{settings.key_prefix}/{key_of(digest)}"


@pytest.mark.parametrize(
    ("size", "parts"),
    [(0, 0), (1, 0), (PART - 1, 0), (PART, 0), (PART + 1, 2), (2 * PART, 2), (2 * PART + 1, 3), (5 * PART - 1, 5)],
)
async def test_every_edge_of_parts(
    backend: S3Backend, settings: S3Settings, outside: Any, size: int, parts: int
) -> None:
    digest, data = blob(size)
    await backend.put(digest, BytesSource(data))
    assert await backend.get(digest, offset=0, length=size) == data
    stored = outside.head_object(Bucket=settings.bucket, Key=key(settings, digest))
    assert stored["ContentLength"] == size
    if parts:
        assert stored["ETag"].strip('"').endswith(f"-{parts}")
    else:
        assert stored["ETag"].strip('"') == hashlib.md5(data).hexdigest()
    assert uploads(outside, settings) == []


async def test_a_threshold_of_nothing_puts_all_but_the_empty_in_parts(settings: S3Settings, outside: Any) -> None:
    backend = S3Backend(but(settings, multipart_threshold_bytes=0))
    for size, ending in ((0, hashlib.md5(b"").hexdigest()), (1, "-1")):
        digest, data = blob(size)
        await backend.put(digest, BytesSource(data))
        assert await backend.get(digest, offset=0, length=size) == data
        assert (
            outside.head_object(Bucket=settings.bucket, Key=key(settings, digest))["ETag"].strip('"').endswith(ending)
        )
    await backend.aclose()


@pytest.mark.parametrize("key_prefix", ["", "one", "a/deeper.one/of_three"])
async def test_objects_lie_below_the_prefix(settings: S3Settings, outside: Any, key_prefix: str) -> None:
    digest, data = blob(1000 + len(key_prefix))
    backend = S3Backend(but(settings, key_prefix=key_prefix))
    await backend.put(digest, BytesSource(data))
    expected = "/".join(filter(None, [key_prefix, key_of(digest)]))
    assert outside.get_object(Bucket=settings.bucket, Key=expected)["Body"].read() == data
    async with backend.list(digest.algorithm, prefix=digest.hex[:6]) as objects:
        assert [info.digest async for info in objects] == [digest]
    await backend.delete(digest)
    with pytest.raises(ObjectMissing):
        await backend.head(digest)
    await backend.aclose()


async def test_what_does_not_belong_to_the_layout_is_not_listed(
    backend: S3Backend, settings: S3Settings, outside: Any
) -> None:
    digest, data = blob(10)
    await backend.put(digest, BytesSource(data))
    for name in ("README", f"sha256/{digest.hex}", f"sha256/00/00/{digest.hex}", f"{key_of(digest)}.bak"):
        outside.put_object(Bucket=settings.bucket, Key=f"{settings.key_prefix}/{name}", Body=b"a stranger")
    async with backend.list("sha256") as objects:
        assert [info.digest async for info in objects] == [digest]


async def test_a_listing_has_many_pages(backend: S3Backend, settings: S3Settings, outside: Any) -> None:
    digests = sorted(Digest.of(str(number).encode()) for number in range(1100))
    async with trio.open_nursery() as nursery:
        for digest in digests:
            nursery.start_soon(backend.put, digest, BytesSource(b"x"))
    async with backend.list("sha256") as objects:
        assert [info.digest async for info in objects] == digests


@pytest.mark.parametrize(
    "opener",
    [
        lambda data: failing_reader(data, PART + 1),
        lambda data: failing_reader(data, 2 * PART),
        lambda data: io.BytesIO(data[:-1]),
        lambda data: io.BytesIO(data + b"x"),
    ],
    ids=["fails in part 2", "fails in part 3", "too short", "too long"],
)
async def test_a_source_that_fails_leaves_no_upload(
    backend: S3Backend, settings: S3Settings, outside: Any, opener: Callable[[bytes], Any]
) -> None:
    digest, data = blob(3 * PART)
    with pytest.raises(SourceChanged):
        await backend.put(digest, ScriptedSource(len(data), lambda: opener(data)))
    assert uploads(outside, settings) == []
    with pytest.raises(ObjectMissing):
        await backend.head(digest)


@pytest.mark.parametrize("good_bytes", [0, PART, 2 * PART + 1])
async def test_a_cancelled_put_leaves_its_upload_for_the_next(
    backend: S3Backend, settings: S3Settings, outside: Any, good_bytes: int
) -> None:
    digest, data = blob(3 * PART)
    source = BlockingSource(data, good_bytes)
    try:
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(backend.put, digest, source)
                await trio.to_thread.run_sync(source.blocked.wait, abandon_on_cancel=True)
                [begun] = uploads(outside, settings)
                nursery.cancel_scope.cancel()
        assert uploads(outside, settings) == [begun]
    finally:
        source.go_on.set()
    await backend.put(digest, BytesSource(data))
    assert uploads(outside, settings) == []
    assert await backend.get(digest, offset=0, length=len(data)) == data


async def test_sweep_aborts_what_is_abandoned_and_nothing_else(
    backend: S3Backend, settings: S3Settings, outside: Any
) -> None:
    digest, _ = blob(10)
    ours = key(settings, digest)
    for name in (ours, ours, f"{settings.key_prefix}/not/of/this/layout", f"{settings.key_prefix}-elsewhere/{ours}"):
        upload = outside.create_multipart_upload(Bucket=settings.bucket, Key=name)
        outside.upload_part(Bucket=settings.bucket, Key=name, UploadId=upload["UploadId"], PartNumber=1, Body=b"a part")
    assert await sweep_backend(settings) == 0
    assert await backend.sweep(grace_s=-60, is_wanted=lambda wanted: wanted == digest) == 0
    assert uploads(outside, settings).count(ours) == 2
    assert await backend.sweep(grace_s=-60) == 2
    assert await backend.sweep(grace_s=-60) == 0
    assert ours not in uploads(outside, settings)
    assert len(uploads(outside, settings)) == 2


async def test_sweep_takes_what_a_server_began_late_and_leaves_the_object(
    backend: S3Backend, settings: S3Settings, outside: Any
) -> None:
    """An upload of a dead request, of an object that is stored by now: no intent tells of it, no put looks again."""
    digest, data = blob(2 * PART + 1)
    await backend.put(digest, BytesSource(data))
    ours = key(settings, digest)
    upload = outside.create_multipart_upload(Bucket=settings.bucket, Key=ours)
    outside.upload_part(Bucket=settings.bucket, Key=ours, UploadId=upload["UploadId"], PartNumber=1, Body=data[:PART])
    assert uploads(outside, settings) == [ours]
    assert await backend.sweep(is_wanted=lambda wanted: False) == 0, "somebody may work on it"
    assert uploads(outside, settings) == [ours]
    assert await backend.sweep(grace_s=-60, is_wanted=lambda wanted: False) == 1
    assert uploads(outside, settings) == []
    assert await backend.get(digest, offset=0, length=len(data)) == data


async def test_puts_of_one_object_at_once_all_succeed(backend: S3Backend, settings: S3Settings, outside: Any) -> None:
    digest, data = blob(2 * PART + 1)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(backend.put, digest, BytesSource(data))
    assert await backend.get(digest, offset=0, length=len(data)) == data
    assert uploads(outside, settings) == []


@pytest.mark.parametrize(
    ("size", "chunk"),
    [(1, PART), (PART, PART), (PART + 1, PART), (10_000 * PART, PART), (10_000 * PART + 1, PART), (5 * TIB, 16 * MIB)],
)
def test_parts_grow_so_that_they_suffice(size: int, chunk: int) -> None:
    sizes = list(part_sizes(size, chunk))
    assert sum(sizes) == size
    assert len(sizes) <= MAX_PARTS
    assert len(set(sizes[:-1])) <= 1
    assert sizes[0] == min(size, chunk) or sizes[0] % MIB == 0
    assert 0 < sizes[-1] <= sizes[0]
    if size <= MAX_PARTS * chunk:
        assert sizes[0] == min(size, chunk)


def test_nothing_has_no_parts() -> None:
    assert list(part_sizes(0, PART)) == []
