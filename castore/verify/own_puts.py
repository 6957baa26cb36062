"""The puts of a command that works beside mounts: their intents have an owner of whom everybody can tell that it lives.

What a command that died had begun is cleared away by the next one: unfinished uploads, temporary files, intents.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import trio

from castore.catalog.writer import CatalogWriter, Transaction
from castore.errors import StorageError
from castore.state_lock import dead_owner, owners, take_owner
from castore.storage.spi import StorageBackend
from castore.verify.batches import transact

CLEAR_SECONDS: Final = 10.0
"""For clearing away what the own puts that failed left, at the end. A backend that is away then is left to the next."""


@asynccontextmanager
async def own_puts(writer: CatalogWriter, backends: Mapping[str, StorageBackend], folder: Path) -> AsyncIterator[str]:
    """The owner of this command's puts, until it ends, when those that failed leave nothing. Raises StateError."""
    await clear_dead_puts(writer, backends, folder)
    owner, descriptor = take_owner(folder)
    try:
        yield owner
    finally:
        os.close(descriptor)
        with trio.CancelScope(shield=True), trio.move_on_after(CLEAR_SECONDS):
            await _clear(writer, backends, folder, owner)


async def clear_dead_puts(writer: CatalogWriter, backends: Mapping[str, StorageBackend], folder: Path) -> None:
    """Remove what puts of commands that died left in these backends, and their intents. Raises StateError.

    What a backend that is away has stays, with its intents, for the next one.
    """
    for owner in sorted(owners(folder)):
        await _clear(writer, backends, folder, owner)


async def _clear(writer: CatalogWriter, backends: Mapping[str, StorageBackend], folder: Path, owner: str) -> None:
    with dead_owner(folder, owner) as is_dead:
        if not is_dead:
            return
        away: set[str] = set()
        for digest, backend_id in await transact(writer, lambda transaction: transaction.intents_of(owner)):
            try:
                if backend_id not in away:
                    await backends[backend_id].abandon(digest)
            except (StorageError, KeyError):
                away.add(backend_id)  # one try is enough: it is another one's turn to find out when it is back
            if backend_id in away:
                continue
            await transact(writer, partial(Transaction.drop_intents, pairs=[(digest, backend_id)], of=owner))
        if not away:
            (folder / owner).unlink(missing_ok=True)
