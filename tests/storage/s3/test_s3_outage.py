"""A real server that is stopped with SIGSTOP, and goes on: who waits for it how long, and how it comes back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import StorageError, StorageTimeout, StorageUnavailable
from castore.storage.breaker import FAILURES
from castore.storage.conformance_sources import PATIENCE_S
from castore.storage.deadline import BASE_S, HEALTH_S, MIN_BYTES_PER_S, READ_BASE_S
from castore.storage.retry import LAST_TRY_S
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend
from tests.servers.seaweedfs import SeaweedFS

from .conftest import MIB
from .quick import SPEED, wrapped

OBJECTS = [str(number).encode() * 1000 for number in range(8)]
LARGE = bytes(11 * MIB)


async def first_of_listing(backend: StorageBackend) -> None:
    async with backend.list("sha256") as objects:
        await anext(objects)


async def test_a_stopped_server_is_an_error_for_everybody_and_comes_back(
    settings: S3Settings, server: SeaweedFS, caplog: pytest.LogCaptureFixture
) -> None:
    async with wrapped(settings, speed=SPEED) as backend:
        for data in OBJECTS:
            await backend.put(Digest.of(data), BytesSource(data))
        calls: list[tuple[float, Callable[[], Awaitable[object]]]] = [
            *((READ_BASE_S, partial(backend.get, Digest.of(data), offset=0, length=9)) for data in OBJECTS),
            (READ_BASE_S, partial(backend.head, Digest.of(OBJECTS[0]))),
            (BASE_S, partial(backend.put, Digest.of(b"new"), BytesSource(b"new"))),
            (BASE_S + len(LARGE) / MIN_BYTES_PER_S, partial(backend.put, Digest.of(LARGE), BytesSource(LARGE))),
            (BASE_S, partial(backend.delete, Digest.of(OBJECTS[0]))),
            (BASE_S, partial(first_of_listing, backend)),
        ]
        ended: list[StorageError] = []

        async def fails_in_time(deadline_s: float, call: Callable[[], Awaitable[object]]) -> None:
            with trio.fail_after((LAST_TRY_S + deadline_s) / SPEED + PATIENCE_S):
                with pytest.raises(StorageTimeout) as caught:
                    await call()
            ended.append(caught.value)

        server.pause()
        try:
            async with trio.open_nursery() as nursery:
                for deadline_s, call in calls:
                    nursery.start_soon(fails_in_time, deadline_s, call)
            assert len(ended) == len(calls)

            said = []
            for data in OBJECTS:
                with pytest.raises((StorageUnavailable, StorageTimeout)) as caught:
                    await backend.get(Digest.of(data), offset=0, length=9)
                said.append(str(caught.value))
            assert any("not asked, since" in text for text in said), "all but those that are let through now and then"
            with trio.fail_after(HEALTH_S + PATIENCE_S):
                health = await backend.health()
            assert health.status == "fail"
            assert "calls fail at once since" in health.detail
        finally:
            server.resume()

        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    assert await backend.get(Digest.of(OBJECTS[1]), offset=0, length=9) == OBJECTS[1][:9]
                    break
                except (StorageUnavailable, StorageTimeout):
                    await trio.sleep(0.02)  # until the next call that is let through
        for data in OBJECTS[1:]:
            assert await backend.get(Digest.of(data), offset=0, length=9) == data[:9]
        await backend.put(Digest.of(LARGE), BytesSource(LARGE))
        assert (await backend.health()).status == "pass"
    lines = [record.getMessage() for record in caplog.records if record.name == "castore.storage.breaker"]
    assert [line.split(" since ")[0].split(":")[0] for line in lines] == [
        f"backend remote is left alone after {FAILURES} calls in a row that failed",
        "backend remote answers again; it was left alone",
    ]
