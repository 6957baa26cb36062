"""Gives memory back when nobody reads, as a good guest of its host. It does not decide what is kept while reading."""

from __future__ import annotations

import ctypes
from typing import Final

import trio

from castore.blobs.buffers import Buffers
from castore.blobs.memory import SpanMemory
from castore.blobs.stats import ReadStats

IDLE_SECONDS: Final = 10.0
"""Without a read for so long, nothing is kept. What was read stays in the kernel's page cache, so little is lost."""


async def forget_when_idle(memory: SpanMemory, buffers: Buffers, stats: ReadStats) -> None:
    """Drop what is kept after each `IDLE_SECONDS` to twice that without a read, until cancelled."""
    seen = (0, 0)
    while True:
        await trio.sleep(IDLE_SECONDS)
        now = (stats.gets, stats.cache_hits)
        if now == seen and memory.kept_bytes:
            memory.clear()
            buffers.free()
            await trio.to_thread.run_sync(_return_freed_memory)
        seen = now


def _return_freed_memory() -> None:
    """Freed buffers stay with the process until glibc is told (malloc_trim(3)); other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
