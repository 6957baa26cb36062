"""Versions of ingest/ in which nothing changed for long: found, logged once, told to who asks. Removes nothing."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Final

import trio

from castore.catalog.workspace import WorkspaceStore
from castore.errors import StateError
from castore.ingest.files import StagedFiles
from castore.seldom import SeldomLog

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 60.0
"""Between two looks, a scan of the workspace in a thread; less where versions expire within minutes."""
_LOOKS: Final = 4
"""At least so many before a version expires."""


@dataclass(frozen=True, slots=True)
class Expired:
    """A version, and when something below it changed last."""

    ref: str
    changed_ns: int


class ExpiryWatch:
    """Looks now and then, unless `after_seconds` is 0."""

    def __init__(self, store: WorkspaceStore, *, files: StagedFiles, after_seconds: float) -> None:
        self._store = store
        self._files = files
        self._after_seconds = after_seconds
        self._complaints = SeldomLog(log)
        self._told: set[int] = set()
        self.expired: tuple[Expired, ...] = ()
        """As of the last look, by reference."""

    async def run(self) -> None:
        """Look until cancelled; return at once when nothing expires."""
        while self._after_seconds:
            try:
                await self._look()
            except StateError as exc:  # housekeeping: no reason to end a mount
                self._complaints.warning("expiry", f"versions that expired are not looked for: {exc}")
            await trio.sleep(min(LOOK_SECONDS, self._after_seconds / _LOOKS))

    async def _look(self) -> None:
        until_ns = time.time_ns() - int(self._after_seconds * 1e9)
        changes = await trio.to_thread.run_sync(self._last_changes)
        old = {
            inode: Expired(f"{name}/{version}", changes[inode])
            for name, version, inode in self._store.versions()
            if changes.get(inode, until_ns) < until_ns and not any(file.is_dirty for file in self._files.open_in(inode))
        }
        for inode in old.keys() - self._told:
            log.warning(
                "nothing in ingest/%s changed for %.0f hours, longer than ingest.expire_after: publish or remove it",
                old[inode].ref,
                (time.time_ns() - old[inode].changed_ns) / 3.6e12,
            )
        self._told = set(old)
        self.expired = tuple(old.values())

    def _last_changes(self) -> dict[int, int]:
        """On a connection of its own: the loop goes on."""
        store = WorkspaceStore(self._store.path, read_only=True)
        try:
            return store.last_changes(time.time_ns())
        finally:
            store.close()
