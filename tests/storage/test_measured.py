"""What is counted of a backend's calls: answers, errors by kind, bytes, and not what was cancelled."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from castore.digest import Digest
from castore.durations import BUCKETS_S, Durations
from castore.errors import ObjectMissing, StorageError, StorageTimeout
from castore.storage.measured import CallStats, MeasuredBackend, kind_of
from castore.storage.source import BytesSource

from .memory_backend import MemoryBackend

DATA = b"twelve bytes"
DIGEST = Digest.of(DATA)


async def test_answers_and_errors(autojump_clock: MockClock) -> None:
    inner, stats = MemoryBackend(), CallStats()
    backend = MeasuredBackend(inner, stats)
    await backend.put(DIGEST, BytesSource(DATA))

    async def slow(operation: str) -> None:
        await trio.sleep(0.2)

    inner.before = slow
    await backend.get(DIGEST, offset=0, length=5)
    with pytest.raises(ObjectMissing):
        await backend.head(Digest.of(b""))
    async with backend.list("sha256") as objects:
        assert [info.digest async for info in objects] == [DIGEST]
    counts = {operation: durations.count for operation, durations in stats.durations.items()}
    assert counts == {"put": 1, "get": 1, "head": 1, "list": 2}
    assert (stats.read_bytes, stats.written_bytes, stats.in_progress) == (5, len(DATA), 0)
    assert stats.errors == {"object_missing": 1}
    assert stats.durations["get"].sum_s == pytest.approx(0.2)
    assert stats.durations["get"].within(0.95) == 0.25


async def test_a_call_that_is_cancelled(autojump_clock: MockClock) -> None:
    inner, stats = MemoryBackend(), CallStats()
    backend = MeasuredBackend(inner, stats)

    async def hang(operation: str) -> None:
        assert stats.in_progress == 1
        await trio.sleep_forever()

    inner.before = hang
    with trio.move_on_after(1):
        await backend.head(DIGEST)
    assert (dict(stats.durations), stats.errors, stats.in_progress) == ({}, {}, 0)


def test_kinds_are_those_that_castore_knows() -> None:
    class Peculiar(StorageTimeout):
        pass

    assert [kind_of(kind) for kind in (Peculiar, StorageTimeout, StorageError)] == [
        *("storage_timeout", "storage_timeout", "storage_error")
    ]


def test_durations() -> None:
    durations = Durations()
    assert (durations.count, durations.within(0.5)) == (0, None)
    for seconds in (0.0, BUCKETS_S[0], 0.3, 1000.0):
        durations.add(seconds)
    counts = dict(durations.cumulative())
    assert (counts[BUCKETS_S[0]], counts[0.25], counts[0.5], counts[60.0], counts[float("inf")]) == (2, 2, 3, 3, 4)
    assert (durations.within(0.5), durations.within(0.75), durations.within(1)) == (0.001, 0.5, float("inf"))
    both = Durations()
    both.include(durations)
    both.include(durations)
    assert (both.count, both.sum_s) == (8, 2 * durations.sum_s)
