"""Hashing staged bytes behind the writer: bounded queues, a thread for each. It knows no files' names."""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from castore.digest import BlobHasher, BlobSummary

QUEUE_CHUNKS: Final = 32
"""Chunks that wait for the hashing thread. The kernel writes 1 MiB at most, so at most 32 MiB wait."""

INLINE_BYTES: Final = 64 * 1024
"""Up to here hashing at once (under 50 us) is cheaper than a hop to the thread (100 us)."""

_READ_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[], object]
    done: Callable[[], None]


PutJob = Callable[[Callable[[], object], Callable[[], None]], Awaitable[None]]
"""`put` or `put_whole`."""


class HashQueue:
    """Runs hashing jobs in order, in two lanes: a whole file may take minutes, and writers must not wait for it."""

    def __init__(self) -> None:
        self._chunks = trio.open_memory_channel[_Job](QUEUE_CHUNKS)
        # As many as there are files: a job is small, and nobody waits for its turn.
        self._files = trio.open_memory_channel[_Job](math.inf)

    async def run(self) -> None:
        """Work until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_run_lane, self._chunks[1], QUEUE_CHUNKS)
            nursery.start_soon(_run_lane, self._files[1], 1)

    async def put(self, work: Callable[[], object], done: Callable[[], None]) -> None:
        """Queue a chunk's `work` for the thread; `done` is called on the loop afterwards, in order.

        Waits while the queue is full, and so slows the writer down.
        """
        await self._chunks[0].send(_Job(work, done))

    async def put_whole(self, work: Callable[[], object], done: Callable[[], None]) -> None:
        """As `put`, for a pass over a whole file: in order with its like only. Never waits."""
        await self._files[0].send(_Job(work, done))


async def _run_lane(receive: trio.MemoryReceiveChannel[_Job], together: int) -> None:
    """Up to `together` jobs that wait cost one hop to the thread."""
    limiter = trio.CapacityLimiter(1)
    async for first in receive:
        jobs = [first]
        while len(jobs) < together:
            try:
                jobs.append(receive.receive_nowait())
            except trio.WouldBlock:
                break
        await trio.to_thread.run_sync(_run_all, jobs, limiter=limiter)
        for job in jobs:
            job.done()


def _run_all(jobs: list[_Job]) -> None:
    for job in jobs:
        job.work()


def hash_file(descriptor: int) -> BlobSummary:
    """The summary of an open file's bytes, read from the disk. Raises OSError.

    Blocking, for a thread of trio's: it ends with its task, since a large file may take many minutes.
    """
    hasher = BlobHasher()
    offset = 0
    while chunk := os.pread(descriptor, _READ_BYTES, offset):
        trio.from_thread.check_cancelled()
        hasher.update(chunk)
        offset += len(chunk)
    return hasher.finish()
