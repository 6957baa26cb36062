"""Puts in parts on real servers: their sizes, and what becomes of one that breaks off in the middle."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from botocore.exceptions import ClientError

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import StorageDenied, StorageRejected, StorageUnavailable
from castore.storage.backends.s3 import S3Backend
from castore.storage.backends.s3_parts import MAX_OBJECT_BYTES, MAX_PARTS, Buffers, part_sizes
from castore.storage.conformance_sources import PATIENCE_S, BlockingSource, ScriptedSource
from castore.storage.layout import key_of
from castore.storage.open import open_backend
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend
from tests.bench import peak_memory
from tests.mount.store import wait_until
from tests.servers.every import S3_SERVERS, EveryServer
from tests.servers.s3_server import S3Server
from tests.servers.scripted_http import Request, ScriptedHTTP
from tests.servers.tampering import Answered, Forward, tampering

from .conftest import MIB, but, settings_on

PART: Final = 5 * MIB
GIB: Final = 1 << 30
TIB: Final = 1 << 40

PLAIN_HTTP: Final = [name for name in S3_SERVERS if name not in ("rgw-https", "endpoint")]
Interfere = Callable[[Request, Forward], Awaitable[Answered | None]]
"""The answer to a request, or None for that of the server, which may have been asked already."""

every_server_here = pytest.mark.parametrize("name", PLAIN_HTTP, scope="session")


def blob(size: int, seed: int = 0) -> tuple[Digest, bytes]:
    data = random.Random(f"{size} {seed}").randbytes(size)
    return Digest.of(data), data


# sizes


@pytest.mark.parametrize(
    ("size", "part", "count"),
    [
        (1, 16 * MIB, 1),
        (16 * MIB, 16 * MIB, 1),
        (16 * MIB + 1, 16 * MIB, 2),
        (10_000 * 16 * MIB, 16 * MIB, 10_000),
        (10_000 * 16 * MIB + 1, 17 * MIB, 9_412),
        (160 * GIB, 17 * MIB, 9_638),
        (TIB, 105 * MIB, 9_987),
        (5 * TIB - 1, 525 * MIB, 9_987),
        (5 * TIB, 525 * MIB, 9_987),
    ],
)
def test_the_parts_of_an_object(size: int, part: int, count: int) -> None:
    sizes = list(part_sizes(size, 16 * MIB))
    assert (max(sizes), len(sizes)) == (min(part, size), count)
    assert len(sizes) <= MAX_PARTS
    assert sum(sizes) == size
    assert set(sizes[:-1]) <= {part}


async def test_an_object_that_no_server_takes_is_refused_at_once(of_nobody: S3Settings) -> None:
    def never() -> Any:
        raise AssertionError("nothing is read")

    digest, _ = blob(1)
    backend = S3Backend(of_nobody)
    with pytest.raises(StorageRejected, match=rf"^backend remote: put {digest}: {5 * TIB + 1} bytes, .*5 TiB.*split"):
        await backend.put(digest, ScriptedSource(MAX_OBJECT_BYTES + 1, never))
    await backend.aclose()


@pytest.mark.parametrize(
    ("threshold", "size", "parts"),
    [
        (7 * MIB, 0, 0),
        (7 * MIB, 1, 0),
        (7 * MIB, PART + 1, 0),
        (7 * MIB, 7 * MIB - 1, 0),
        (7 * MIB, 7 * MIB, 0),
        (7 * MIB, 7 * MIB + 1, 2),
        (7 * MIB, 2 * PART, 2),
        (1, 1, 0),
        (1, 2, 1),
        (1, PART, 1),
        (1, PART + 1, 2),
        (1, 3 * PART, 3),
    ],
)
@every_server_here
async def test_sizes_at_every_edge(world: World, threshold: int, size: int, parts: int) -> None:
    digest, data = blob(size)
    async with world.backend(multipart_threshold_bytes=threshold) as (backend, requests):
        await backend.put(digest, BytesSource(data))
        assert sorted(parts_sent(requests)) == list(range(1, parts + 1))
        await world.expect_stored(digest, data)


async def test_parts_in_memory_share_their_bound() -> None:
    buffers = Buffers(4, 10)
    held = [await buffers.take(size) for size in (0, 10, 11)]
    with trio.move_on_after(0) as scope:
        await buffers.take(1)
    assert scope.cancelled_caught, "they fill all four shares"
    buffers.give_back(11, held.pop())
    with trio.move_on_after(0) as scope:
        await buffers.take(1000)
    assert scope.cancelled_caught, "one that needs all of them waits for all"
    held.append(await buffers.take(11))
    for size, stream in zip((0, 10, 11), held, strict=True):
        buffers.give_back(size, stream)
    buffers.give_back(1000, await buffers.take(1000))
    held = [await buffers.take(10) for _ in range(4)]


@pytest.mark.parametrize("transfer", peak_memory.TRANSFERS)
def test_the_most_memory_that_an_object_takes(server: S3Server, transfer: str) -> None:
    """The short form of scripts/bench-memory: an object that would not fit, put and got."""
    figures = peak_memory.measure(server, 256, transfer)
    assert figures.put_bytes < figures.get_bytes + 1 < peak_memory.LIMIT_BYTES
    assert figures.put_bytes > figures.idle_bytes + 32 * MIB, "what is measured is what transfers take"


# what breaks off is taken up


class World:
    """A server, and backends on it that reach it through a server of the test."""

    def __init__(self, server: S3Server, settings: S3Settings, outside: Any) -> None:
        self.server = server
        self.settings = settings
        self.outside = outside

    @asynccontextmanager
    async def backend(
        self, interfere: Interfere | None = None, *, composed: bool = False, **changes: Any
    ) -> AsyncIterator[tuple[StorageBackend, ScriptedHTTP]]:
        """A backend, bare or as configurations compose it, and what it asked so far."""

        async def tamper(request: Request, forward: Forward) -> Answered:
            answered = await interfere(request, forward) if interfere else None
            return answered or await forward(request)

        async with tampering(self.server.endpoint_url, tamper) as proxy:
            settings = but(self.settings, endpoint_url=proxy.endpoint_url, **changes)
            backend: StorageBackend = open_backend(settings) if composed else S3Backend(settings)
            try:
                yield backend, proxy
            finally:
                await backend.aclose()

    def key(self, digest: Digest) -> str:
        return f"{self.settings.key_prefix}/{key_of(digest)}"

    def begin(self, digest: Digest, parts: Sequence[tuple[int, bytes]] = ()) -> str:
        """An upload by somebody else; its id."""
        where = {"Bucket": self.settings.bucket, "Key": self.key(digest)}
        upload_id: str = self.outside.create_multipart_upload(**where)["UploadId"]
        for number, data in parts:
            self.outside.upload_part(**where, UploadId=upload_id, PartNumber=number, Body=data)
        return upload_id

    def abort(self, digest: Digest) -> None:
        for upload_id in self.uploads(digest):
            self.outside.abort_multipart_upload(Bucket=self.settings.bucket, Key=self.key(digest), UploadId=upload_id)

    def uploads(self, digest: Digest) -> list[str]:
        """Ids of what is begun and not ended."""
        # By the whole key: MinIO's listing, and JuiceFS's, answers nothing else.
        page = self.outside.list_multipart_uploads(Bucket=self.settings.bucket, Prefix=self.key(digest))
        return [upload["UploadId"] for upload in page.get("Uploads", ())]

    def parts(self, digest: Digest) -> list[int]:
        """Numbers of the parts that the server holds of its only upload."""
        [upload_id] = self.uploads(digest)
        page = self.outside.list_parts(Bucket=self.settings.bucket, Key=self.key(digest), UploadId=upload_id)
        return [part["PartNumber"] for part in page.get("Parts", ())]

    async def until_it_has(self, digest: Digest, part_count: int) -> None:
        def look() -> None:
            wait_until(lambda: self.parts(digest) == list(range(1, part_count + 1)), f"{part_count} parts are there")

        await trio.to_thread.run_sync(look, abandon_on_cancel=True)

    async def expect_stored(self, digest: Digest, data: bytes) -> None:
        """The object is there, and no upload is."""
        async with self.backend() as (backend, _):
            info = await backend.head(digest)
            assert info.size_bytes == len(data)
            assert await backend.get(digest, offset=0, length=len(data)) == data
        assert self.uploads(digest) == []


@pytest.fixture
def world(every_server: EveryServer, name: str, of_nobody: S3Settings, tmp_path: Path) -> Iterator[World]:
    server = every_server[name]
    client = server.client()
    yield World(server, settings_on(server, of_nobody, tmp_path), client)
    client.close()


def parts_sent(server: ScriptedHTTP) -> list[int]:
    """The numbers of all parts that were sent, in that order."""
    return [int(each.query["partNumber"]) for each in server.requests if is_part(each)]


def is_part(request: Request, number: int | None = None) -> bool:
    """Whether it sends that part, or any."""
    sent = request.query.get("partNumber") if request.method == "PUT" else None
    return sent is not None and number in (None, int(sent))


def is_complete(request: Request) -> bool:
    return request.method == "POST" and "uploadId" in request.query


def refuse(status: int, code: str, is_meant: Callable[[Request], bool], times: int = 1000) -> Interfere:
    """Answers the first few requests of a kind with an error, and does not hand them on."""
    left = times

    async def interfere(request: Request, forward: Forward) -> Answered | None:
        nonlocal left
        if not is_meant(request) or not left:
            return None
        left -= 1
        return Answered(status, body=f"<Error><Code>{code}</Code></Error>".encode())

    return interfere


async def break_off(world: World, digest: Digest, data: bytes, good_parts: int, **changes: Any) -> None:
    """Put, and cancel when the server holds so many parts."""
    source = BlockingSource(data, good_parts * PART)
    try:
        async with world.backend(**changes) as (backend, _):
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(backend.put, digest, source)
                    await trio.to_thread.run_sync(source.blocked.wait, abandon_on_cancel=True)
                    await world.until_it_has(digest, good_parts)
                    nursery.cancel_scope.cancel()
    finally:
        source.go_on.set()
    assert world.parts(digest) == list(range(1, good_parts + 1))


@every_server_here
async def test_the_next_put_goes_on_from_the_parts_that_are_there(world: World) -> None:
    digest, data = blob(4 * PART + 1)
    await break_off(world, digest, data, 2)
    async with world.backend() as (another_process, requests):
        await another_process.put(digest, BytesSource(data))
        assert sorted(parts_sent(requests)) == [3, 4, 5]
    await world.expect_stored(digest, data)


@every_server_here
async def test_parts_that_were_sent_are_not_sent_again_by_the_next_try(world: World) -> None:
    digest, data = blob(4 * PART)
    there = {1: trio.Event(), 2: trio.Event()}
    third_fails = refuse(503, "SlowDown", lambda request: is_part(request, 3), times=2)

    async def interfere(request: Request, forward: Forward) -> Answered | None:
        for number, event in there.items():
            if is_part(request, number):
                answered = await forward(request)
                event.set()
                return answered
            if is_part(request, 3):
                await event.wait()
        return await third_fails(request, forward)

    async with world.backend(interfere, composed=True) as (backend, requests):
        await backend.put(digest, BytesSource(data))
        sent = parts_sent(requests)
    assert [sent.count(number) for number in (1, 2, 3)] == [1, 1, 3]
    await world.expect_stored(digest, data)


@every_server_here
async def test_a_put_that_cannot_succeed_leaves_no_upload(world: World) -> None:
    digest, data = blob(3 * PART)
    async with world.backend(refuse(403, "AccessDenied", lambda request: is_part(request, 2))) as (backend, _):
        with pytest.raises(StorageDenied):
            await backend.put(digest, BytesSource(data))
    assert world.uploads(digest) == []


@every_server_here
async def test_abandon_removes_what_is_left_of_that_digest(world: World) -> None:
    digest, data = blob(3 * PART)
    other, other_data = blob(3 * PART, seed=1)
    await break_off(world, digest, data, 1)
    await break_off(world, other, other_data, 1)
    world.begin(digest)
    async with world.backend(composed=True) as (backend, _):
        for _ in range(2):
            await backend.abandon(digest)
            assert world.uploads(digest) == []
        assert world.parts(other) == [1]
        await backend.put(other, BytesSource(other_data))
        await backend.abandon(other)
    await world.expect_stored(other, other_data)


@pytest.mark.parametrize(
    "leave",
    [
        lambda data: [(1, data[: PART + MIB])],
        lambda data: [(4, data[:PART])],
        lambda data: [],
    ],
    ids=["parts of another size", "more parts", "nothing"],
)
@every_server_here
async def test_uploads_of_other_parts_go_when_the_object_is_stored(
    world: World, leave: Callable[[bytes], Sequence[tuple[int, bytes]]]
) -> None:
    digest, data = blob(2 * PART + 1)
    world.begin(digest)
    world.begin(digest, leave(data))
    async with world.backend() as (backend, requests):
        await backend.put(digest, BytesSource(data))
        assert sorted(parts_sent(requests)) == [1, 2, 3]
    await world.expect_stored(digest, data)


@every_server_here
async def test_a_part_of_other_bytes_is_never_made_use_of(world: World) -> None:
    digest, data = blob(2 * PART + 1)
    _, wrong = blob(PART, seed=1)
    world.begin(digest, [(1, data[:PART]), (2, wrong)])
    async with world.backend() as (backend, _):
        with pytest.raises(StorageUnavailable, match="holds other bytes as part 2; the next one begins anew"):
            await backend.put(digest, BytesSource(data))
        assert world.uploads(digest) == []
    world.begin(digest, [(1, wrong)])
    async with world.backend(composed=True) as (backend, requests):
        await backend.put(digest, BytesSource(data))
        assert sorted(parts_sent(requests)) == [1, 2, 3]
    await world.expect_stored(digest, data)


# others do something to the same upload


@every_server_here
async def test_an_upload_that_somebody_else_completes(world: World) -> None:
    digest, data = blob(3 * PART)
    source = BlockingSource(data, PART)
    with trio.fail_after(PATIENCE_S):
        async with world.backend() as (slow, slow_requests), world.backend() as (quick, quick_requests):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(slow.put, digest, source)
                await trio.to_thread.run_sync(source.blocked.wait, abandon_on_cancel=True)
                await world.until_it_has(digest, 1)
                await quick.put(digest, BytesSource(data))
                assert sorted(parts_sent(quick_requests)) == [2, 3]
                source.go_on.set()
            assert len(slow_requests.requests) < 10, "it does not put again what is there"
    await world.expect_stored(digest, data)


@pytest.mark.parametrize("when", ["part", "complete"])
@every_server_here
async def test_an_upload_that_somebody_else_aborts(world: World, when: str) -> None:
    digest, data = blob(3 * PART)
    aborted = False

    async def interfere(request: Request, forward: Forward) -> Answered | None:
        nonlocal aborted
        if not aborted and (is_part(request, 3) if when == "part" else is_complete(request)):
            aborted = True
            await trio.to_thread.run_sync(world.abort, digest)
        return None

    async with world.backend(interfere) as (backend, _):
        with pytest.raises(StorageUnavailable):
            await backend.put(digest, BytesSource(data))
    aborted = False
    async with world.backend(interfere, composed=True) as (backend, _):
        await backend.put(digest, BytesSource(data))
    assert aborted
    await world.expect_stored(digest, data)


@every_server_here
async def test_many_puts_of_one_object_in_two_processes(world: World) -> None:
    digest, data = blob(2 * PART + 1)
    async with world.backend(composed=True) as (one, _), world.backend(composed=True) as (other, _):
        async with trio.open_nursery() as nursery:
            for backend in (one, other, one, other):
                nursery.start_soon(backend.put, digest, BytesSource(data))
        for backend in (one, other):
            await backend.abandon(digest)
    await world.expect_stored(digest, data)


# Complete

ANSWERS_TO_COMPLETE: Final = {
    "500": Answered(500, body=b"<Error><Code>InternalError</Code></Error>"),
    "404 NoSuchUpload": Answered(404, body=b"<Error><Code>NoSuchUpload</Code></Error>"),
    "200 with an error": Answered(200, body=b"<?xml version='1.0'?>\n<Error><Code>InternalError</Code></Error>"),
    "200 without a body": Answered(200),
    "200 that breaks off": Answered(200, (("content-length", "1000"),), b"<CompleteMulti"),
    "200 with an empty ETag": Answered(
        200, body=b"<CompleteMultipartUploadResult><ETag></ETag></CompleteMultipartUploadResult>"
    ),
    "no answer": None,
}


def say(lie: str) -> Answered:
    answered = ANSWERS_TO_COMPLETE[lie]
    if answered is None:
        raise EOFError  # the connection ends
    return answered


@pytest.mark.parametrize("lie", ANSWERS_TO_COMPLETE)
@every_server_here
async def test_a_complete_that_was_done_whatever_its_answer(world: World, lie: str) -> None:
    digest, data = blob(2 * PART)

    async def interfere(request: Request, forward: Forward) -> Answered | None:
        if not is_complete(request):
            return None
        await forward(request)
        return say(lie)

    async with world.backend(interfere) as (backend, requests):
        await backend.put(digest, BytesSource(data))
        assert [is_complete(request) for request in requests.requests].count(True) == 1
    await world.expect_stored(digest, data)


@pytest.mark.parametrize("lie", ANSWERS_TO_COMPLETE)
@every_server_here
async def test_a_complete_that_was_not_done_whatever_its_answer(world: World, lie: str) -> None:
    """Nor are the parts sent again: the next put completes what is there."""
    digest, data = blob(2 * PART)

    async def interfere(request: Request, forward: Forward) -> Answered | None:
        return say(lie) if is_complete(request) else None

    async with world.backend(interfere) as (backend, _):
        with pytest.raises(StorageUnavailable):
            await backend.put(digest, BytesSource(data))
    async with world.backend() as (backend, requests):
        await backend.put(digest, BytesSource(data))
        assert parts_sent(requests) == []
    await world.expect_stored(digest, data)


@every_server_here
async def test_an_upload_whose_parts_are_refused_is_not_taken_up_again(world: World) -> None:
    digest, data = blob(2 * PART)
    async with world.backend(refuse(400, "InvalidPart", is_complete)) as (backend, _):
        with pytest.raises(StorageUnavailable, match="InvalidPart"):
            await backend.put(digest, BytesSource(data))
    assert world.uploads(digest) == []


# what servers do late, or twice


@every_server_here
async def test_an_upload_that_begins_when_its_caller_is_gone(world: World) -> None:
    """A server that hung takes in what it was sent meanwhile: also a request whose caller gave up, and tried again."""
    digest, data = blob(2 * PART)
    late: list[Callable[[], Awaitable[Answered]]] = []

    async def interfere(request: Request, forward: Forward) -> Answered | None:
        if request.method == "POST" and "uploads" in request.query and not late:
            late.append(partial(forward, request))
            raise EOFError  # the connection ends
        if is_complete(request):
            assert (await late[0]()).status == 200
        return None

    async with world.backend(interfere) as (backend, _):
        with pytest.raises(StorageUnavailable):
            await backend.put(digest, BytesSource(data))
        await backend.put(digest, BytesSource(data))
        assert late
    await world.expect_stored(digest, data)


@every_server_here
async def test_an_upload_that_was_completed_is_aborted_and_completed_again(world: World) -> None:
    """Whoever lost the answer to a Complete may do either: the object stays as it is."""
    digest, data = blob(2 * PART)
    upload_id = world.begin(digest)
    where = {"Bucket": world.settings.bucket, "Key": world.key(digest), "UploadId": upload_id}
    parts = []
    for number in (1, 2):
        body = data[(number - 1) * PART : number * PART]
        etag = world.outside.upload_part(**where, PartNumber=number, Body=body)["ETag"]
        parts.append({"PartNumber": number, "ETag": etag})
    complete = partial(world.outside.complete_multipart_upload, MultipartUpload={"Parts": parts})
    complete(**where)
    for again in (world.outside.abort_multipart_upload, complete, world.outside.abort_multipart_upload):
        with suppress(ClientError):
            again(**where)
        await world.expect_stored(digest, data)


# what depends on settings and rights


@pytest.mark.parametrize("name", ["seaweedfs"], scope="session")
async def test_credentials_that_may_not_list_uploads(world: World) -> None:
    """Then nothing can be taken up, so nothing is left either, where that can be helped."""
    digest, data = blob(3 * PART)

    def listing(request: Request) -> bool:
        return request.method == "GET" and "uploads" in request.query

    no_listing = refuse(403, "AccessDenied", listing)

    async def nor_a_third_part(request: Request, forward: Forward) -> Answered | None:
        if is_part(request, 3):
            return Answered(503)
        return await no_listing(request, forward)

    async with world.backend(nor_a_third_part) as (backend, _):
        with pytest.raises(StorageUnavailable):
            await backend.put(digest, BytesSource(data))
    assert world.uploads(digest) == []
    async with world.backend(no_listing) as (backend, _):
        await backend.put(digest, BytesSource(data))
    await world.expect_stored(digest, data)
