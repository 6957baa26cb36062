"""What many tasks found, recorded in shared transactions. Knows nothing of what was found."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

import trio

from castore.catalog.writer import CatalogWriter, Transaction
from castore.errors import CatalogBusy

T = TypeVar("T")

BATCH_LOCATIONS: Final = 256
"""Locations that share one transaction: its sync costs as much as some ten small reads. It holds the write lock for
some 30 ms, which no publish notices."""
BATCH_SECONDS: Final = 1.0
"""How long a finding waits for others: bounds what a kill loses."""
COMMIT_TRIES: Final = 6
"""Each waits for another process's write lock, 30 s in all."""


async def commit_batches(findings: trio.MemoryReceiveChannel[T], commit: Callable[[list[T]], Awaitable[None]]) -> None:
    """Give what comes to `commit`, many at a time, until the channel ends.

    `commit` empties its list. When cancelled, what came until then is committed first.
    """
    batch: list[T] = []
    try:
        async for finding in findings:
            batch.append(finding)
            with trio.move_on_after(BATCH_SECONDS):
                while len(batch) < BATCH_LOCATIONS:
                    try:
                        batch.append(await findings.receive())
                    except trio.EndOfChannel:
                        break
            await commit(batch)
    except trio.Cancelled:
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                batch.append(findings.receive_nowait())
        if batch:
            with trio.CancelScope(shield=True):
                await commit(batch)
        raise


async def transact(writer: CatalogWriter, work: Callable[[Transaction], T], *, workspace: Path | None = None) -> T:
    """One transaction, tried again while another process holds the write lock. Raises StateError."""
    for _ in range(COMMIT_TRIES - 1):
        try:
            return await writer.run(work, workspace=workspace)
        except CatalogBusy:
            continue
    return await writer.run(work, workspace=workspace)
