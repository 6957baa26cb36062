"""What a writing daemon does for `castore status`, `publish` and `umount`: the answers of its control socket."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

import pyfuse3
import trio

from castore.api.control import Report
from castore.api.status import StatusDocument
from castore.config import IngestSettings
from castore.errors import NotFound, StateError
from castore.ingest.publisher import PublishProgress
from castore.ingest.service import Ingest
from castore.registry.names import parse_ref
from mount.operations import CastoreOperations

log = logging.getLogger(__name__)

DRAIN_REPORT_SECONDS: Final = 0.25
FORGET_SECONDS: Final = 1.0
"""For the kernel to forget a name, beyond what it may have to wait for a publish by rename."""


class Commands:
    """The commands of one mount. `take_away` unmounts it, or raises StateError."""

    def __init__(
        self,
        settings: IngestSettings,
        *,
        ingest: Ingest,
        status: StatusDocument,
        operations: CastoreOperations,
        take_away: Callable[[], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._ingest = ingest
        self._status = status
        self._operations = operations
        self._take_away = take_away

    def handlers(self) -> dict[str, Any]:
        """By the name of the command."""
        return {"status": self._answer_status, "publish": self._publish, "umount": self._umount}

    async def _answer_status(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        return await self._status.make()

    async def _publish(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        name, version = parse_ref(str(request.get("ref", "")))
        tree = self._ingest.tree
        node = tree.version(name, version)
        parent = tree.parent(node.inode)

        async def tell(progress: PublishProgress) -> None:
            await report(asdict(progress))

        with suppress(NotFound):  # someone else was quicker: publish says so
            await self._ingest.publisher.wait_stored(node.inode, report=tell)
        if tree.find(node.inode) is not None and tree.version_path(node.inode) != (name, version):
            raise NotFound(f"ingest/{name}/{version} was renamed while it was stored")
        await self._ingest.publisher.publish(
            node.inode, name, version.encode(), wait_seconds=self._settings.publish_wait_seconds, report=tell
        )
        await self._forget_old_name(parent, version.encode())
        self._operations.forget_latest(name)
        return {"ref": f"{name}/{version}"}

    async def _forget_old_name(self, parent: int, version: bytes) -> None:
        """The kernel was not asked, so it still knows a published version under its old name.

        Until it forgets that, it may answer the new name with ESTALE. It waits for whoever holds the old parent, a
        publish by rename at the most.
        """
        with trio.move_on_after(self._settings.publish_wait_seconds + FORGET_SECONDS):
            await trio.to_thread.run_sync(_forget_entry, parent, version, abandon_on_cancel=True)

    async def _umount(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        if not request.get("force"):
            await self._drain(float(request.get("timeout_seconds", 600.0)), report)
        files, size_bytes = self._ingest.unfinished()
        await self._take_away()
        return {"staged_files": files, "staged_bytes": size_bytes}

    async def _drain(self, seconds: float, report: Report) -> None:
        """Wait until all closed files are stored. Raises StateError when that takes longer than `seconds`."""
        end = time.monotonic() + seconds
        while (left := self._ingest.unfinished())[0]:
            await report({"staged_files": left[0], "staged_bytes": left[1]})
            if time.monotonic() > end:
                raise StateError(
                    f"{left[0]} files ({left[1]} bytes) are not stored after {seconds:g} s; wait on, or use --force"
                )
            with trio.move_on_after(DRAIN_REPORT_SECONDS):
                await self._ingest.uploader.progress.wait()


def _forget_entry(parent: int, name: bytes) -> None:
    """Make the kernel forget a name. Blocks while a rename in that directory waits: never call it in a handler."""
    try:
        pyfuse3.invalidate_entry(parent, name)
    except FileNotFoundError:
        pass  # it did not know it
    except OSError as exc:
        log.debug("%r in inode %d is not invalidated: %s", name, parent, exc)
