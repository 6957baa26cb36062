"""What a writing daemon does for `castore status`, `publish` and `umount`: the answers of its control socket."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pyfuse3
import trio

from castore.api.control import Report
from castore.api.status import StatusDocument
from castore.config import IngestSettings
from castore.digest import Digest
from castore.errors import CastoreError, NotFound, StateError
from castore.ingest.bulk import BulkImport
from castore.ingest.bulk_order import ImportOrder
from castore.ingest.publisher import PublishProgress
from castore.ingest.service import Ingest
from castore.registry.names import parse_ref

log = logging.getLogger(__name__)

DRAIN_REPORT_SECONDS: Final = 0.25
IMPORT_END_SECONDS: Final = 5.0
"""For an import whose caller went away: that is noticed at the next heartbeat."""
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
        take_away: Callable[[], Awaitable[None]],
        state_dir: Path,
        mountpoint: Path,
        open_digests: Callable[[], set[Digest]],
    ) -> None:
        self._open_digests = open_digests
        self._state_dir = state_dir
        self._mountpoint = mountpoint
        self._imports: dict[str, trio.Event] = {}
        """The versions that are being imported, and when each ends."""
        self._settings = settings
        self._ingest = ingest
        self._status = status
        self._take_away = take_away

    def handlers(self) -> dict[str, Any]:
        """By the name of the command."""
        return {
            "status": self._answer_status,
            "publish": self._publish,
            "import": self._import,
            "reading": self._answer_reading,
            "umount": self._umount,
        }

    async def _answer_status(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        return await self._status.make()

    async def _answer_reading(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        """What is open, or in memory: garbage collection leaves it alone."""
        return {"digests": [str(digest) for digest in self._open_digests()]}

    async def _publish(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        name, version = parse_ref(str(request.get("ref", "")))
        tree = self._ingest.tree
        try:
            node = tree.version(name, version)
        except NotFound:
            await self._ingest.publisher.check_absent(name, version)
            raise
        parent = tree.parent(node.inode)

        async def tell(progress: PublishProgress) -> None:
            await report(asdict(progress))

        # Someone else may be quicker: publish says so.
        with suppress(NotFound), self._ingest.files.room.leaving(node.inode):
            await self._ingest.publisher.wait_stored(node.inode, report=tell)
        if tree.find(node.inode) is not None and tree.version_path(node.inode) != (name, version):
            raise NotFound(f"ingest/{name}/{version} was renamed while it was stored")
        await self._ingest.publisher.publish(
            node.inode, name, version.encode(), wait_seconds=self._settings.publish_wait_seconds, report=tell
        )
        await self._forget_old_name(parent, version.encode())
        return {"ref": f"{name}/{version}"}

    async def _import(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        order = ImportOrder.from_request(request)
        with trio.move_on_after(IMPORT_END_SECONDS):
            while order.ref in self._imports:
                await self._imports[order.ref].wait()
        if order.ref in self._imports:
            raise StateError(f"{order.ref} is being imported just now")
        ended = self._imports[order.ref] = trio.Event()
        try:
            return await self._run_import(order, (request.get("device"), request.get("inode")), report)
        finally:
            del self._imports[order.ref]
            ended.set()

    async def _run_import(self, order: ImportOrder, place: tuple[Any, Any], report: Report) -> dict[str, Any]:
        own = await trio.to_thread.run_sync(self._own_places)
        bulk = BulkImport(self._ingest, order, avoid=own, place=place, on_changed=_forget_later)

        async def publish(version_inode: int) -> None:
            parent = self._ingest.tree.parent(version_inode)
            await bulk.publish(version_inode, wait_seconds=self._settings.publish_wait_seconds)
            await self._forget_old_name(parent, order.version.encode())

        async def tell() -> None:
            while True:
                await report(asdict(bulk.progress()))
                await trio.sleep(DRAIN_REPORT_SECONDS)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            try:
                await bulk.run(publish)
            except CastoreError as exc:
                error: CastoreError | None = exc
            else:
                error = None
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error
        return asdict(bulk.progress())

    def _own_places(self) -> frozenset[tuple[int, int]]:
        """The state directory, and all of the mount."""
        state = os.stat(self._state_dir)
        return frozenset({(state.st_dev, state.st_ino), (os.stat(self._mountpoint).st_dev, 0)})

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
        while (left := self._ingest.unfinished())[0] or self._imports:
            await report({"staged_files": left[0], "staged_bytes": left[1], "eta_s": self._ingest.eta_seconds()})
            if time.monotonic() > end:
                raise StateError(
                    f"{left[0]} files ({left[1]} bytes) are not stored after {seconds:g} s; wait on, or use --force"
                )
            with trio.move_on_after(DRAIN_REPORT_SECONDS):
                await self._ingest.uploader.progress.wait()


def _forget_later(parent: int, name: bytes) -> None:
    """What the kernel knows of a name is old; it is told by a thread of pyfuse3's."""
    pyfuse3.invalidate_entry_async(pyfuse3.InodeT(parent), pyfuse3.FileNameT(name), ignore_enoent=True)


def _forget_entry(parent: int, name: bytes) -> None:
    """Make the kernel forget a name. Blocks while a rename in that directory waits: never call it in a handler."""
    try:
        pyfuse3.invalidate_entry(parent, name)
    except FileNotFoundError:
        pass  # it did not know it
    except OSError as exc:
        log.debug("%r in inode %d is not invalidated: %s", name, parent, exc)
