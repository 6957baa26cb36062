"""What unfinished puts left in backends, and nobody goes on from: known by their intents, removed. Puts nothing."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import trio

from castore.catalog.workspace import WorkspaceStore
from castore.catalog.writer import CatalogWriter
from castore.digest import Digest
from castore.errors import ConfigError, NotFound, StateError, StorageError
from castore.registry.routing import Route
from castore.seldom import SeldomLog
from castore.state_lock import living_owners
from castore.storage.spi import StorageBackend

log = logging.getLogger(__name__)

RETRY_SECONDS_MIN: Final = 1.0
RETRY_SECONDS_MAX: Final = 60.0
"""Between tries while a backend cannot be asked, doubling from the first to the last: as the uploader, which waits for
the same backend."""


class Leftovers:
    """For one daemon, which holds the state directory's lock. `route` tells where the files of a version go.

    `puts_dir` tells which commands are putting beside it.
    """

    def __init__(
        self,
        store: WorkspaceStore,
        *,
        writer: CatalogWriter,
        backends: Mapping[str, StorageBackend],
        route: Callable[[int], Awaitable[Route]],
        owner: str,
        puts_dir: Path,
    ) -> None:
        self._store = store
        self._writer = writer
        self._backends = backends
        self._route = route
        self._owner = owner
        self._complaints = SeldomLog(log)
        self._puts_dir = puts_dir

    def is_wanted(self, digest: Digest) -> bool:
        """Whether staged files with these bytes wait to be stored somewhere."""
        return bool(self._store.versions_wanting(digest))

    async def remove(self, digest: Digest, backend_id: str) -> bool:
        """Whether nothing unfinished of the digest is left there now. Logs why not, seldom."""
        backend = self._backends.get(backend_id)
        if backend is None:
            return True  # not configured any more: nobody here can do anything about it
        try:
            await backend.abandon(digest)
        except StorageError as exc:
            self._complaints.warning(type(exc).__name__, f"what an unfinished put left stays for now: {exc}")
            return False
        return True

    async def remove_of_the_dead(self) -> None:
        """Remove what puts of earlier daemons left, but where a staged file is put again and goes on from it.

        Returns when nothing of that kind is left; tries again while a backend cannot be asked.
        """
        seconds = RETRY_SECONDS_MIN
        while not await self._try():
            await trio.sleep(seconds)
            seconds = min(seconds * 2, RETRY_SECONDS_MAX)

    async def _try(self) -> bool:
        try:
            living = await trio.to_thread.run_sync(living_owners, self._puts_dir)
            begun = await self._writer.run(
                lambda transaction: transaction.intents_of_others(self._owner, living=living)
            )
            all_done = True
            for digest, backend_id in begun:
                # One that is wanted becomes an intent of this daemon when it is put again.
                if not await self._is_wanted_there(digest, backend_id):
                    all_done &= await self._forget(digest, backend_id)
        except StateError as exc:
            log.warning("puts of an earlier daemon are not cleared away yet: %s", exc)
            return False
        return all_done

    async def _forget(self, digest: Digest, backend_id: str) -> bool:
        if not await self.remove(digest, backend_id):
            return False
        pairs = [(digest, backend_id)]
        await self._writer.run(lambda transaction: transaction.drop_intents_of_others(pairs, self._owner))
        log.info("a put of %s in backend %s that an earlier daemon began is abandoned", digest, backend_id)
        return True

    async def _is_wanted_there(self, digest: Digest, backend_id: str) -> bool:
        for version_inode in self._store.versions_wanting(digest):
            try:
                route = await self._route(version_inode)
            except NotFound:
                continue
            except ConfigError:
                return True
            if backend_id in route.backend_ids:
                return True
        return False
