"""Hashing staged bytes behind the writer: one bounded queue, one thread at a time. It knows no files' names."""

from __future__ import annotations

import os
from collections.abc import Callable
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


class HashQueue:
    """Runs hashing jobs in order. `put` waits while the queue is full, and so slows the writer down."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[_Job](QUEUE_CHUNKS)
        self._limiter = trio.CapacityLimiter(1)

    async def run(self) -> None:
        """Work until cancelled. Jobs that wait together cost one hop to the thread."""
        async for first in self._receive:
            jobs = [first]
            while len(jobs) < QUEUE_CHUNKS:
                try:
                    jobs.append(self._receive.receive_nowait())
                except trio.WouldBlock:
                    break
            await trio.to_thread.run_sync(_run_all, jobs, limiter=self._limiter)
            for job in jobs:
                job.done()

    async def put(self, work: Callable[[], object], done: Callable[[], None]) -> None:
        """Queue `work` for the thread; `done` is called on the loop afterwards, in order."""
        await self._send.send(_Job(work, done))


def _run_all(jobs: list[_Job]) -> None:
    for job in jobs:
        job.work()


def hash_file(descriptor: int, block_digest: str) -> BlobSummary:
    """The summary of an open file's bytes, read from the disk, with checksums of that kind. Raises OSError.

    Blocking, for a thread of trio's: it ends with its task, since a large file may take many minutes.
    """
    hasher = BlobHasher(checksum_algorithm=block_digest)
    offset = 0
    while chunk := os.pread(descriptor, _READ_BYTES, offset):
        trio.from_thread.check_cancelled()
        hasher.update(chunk)
        offset += len(chunk)
    return hasher.finish()
