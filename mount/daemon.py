"""The daemon: puts the library's parts together, serves one mount, and ends it. The composition root of the mount."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pyfuse3
import trio

from castore.api.control import Report, serve_control
from castore.api.health import HealthDocument, queue_state
from castore.api.http_api import HttpApi
from castore.api.http_server import open_listener, serve_http, url_of
from castore.api.probes import BackendProbes
from castore.api.status import StatusDocument
from castore.blobs.reader import BlobReader
from castore.catalog.connection import open_reader
from castore.catalog.reader import CatalogReader
from castore.catalog.records import FailureReason
from castore.catalog.writer import CatalogWriter
from castore.config import Config
from castore.digest import Digest
from castore.errors import ConfigError, NotFound, StateError, StateLocked
from castore.ingest.publisher import PublishProgress
from castore.ingest.service import Ingest
from castore.mountinfo import mount_source
from castore.registry.locations import record_bad_read
from castore.registry.names import parse_ref
from castore.storage.open import open_backend
from mount import kernel, mountpoint
from mount.by_digest import ByDigestTree
from mount.control import ControlTree
from mount.guard import waits
from mount.operations import CastoreOperations
from mount.packages import PackagesTree
from mount.sweeping import sweep_always

log = logging.getLogger(__name__)

STOP_SECONDS: Final = 20.0
"""From a signal to the end of the background work; with the unmount it stays below the 30 s that are promised."""
DRAIN_REPORT_SECONDS: Final = 0.25
FORGET_SECONDS: Final = 1.0
"""For the kernel to forget a name, beyond what it may have to wait for a publish by rename."""

_OPTIONS: Final = frozenset({"allow_other", "allow_root", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec"})


def parse_options(text: str, *, allow_other: bool) -> frozenset[str]:
    """The mount options of `-o`, checked. Raises ConfigError for one that is not known."""
    options = {part.strip() for part in text.split(",") if part.strip()}
    unknown = options - _OPTIONS
    if unknown:
        raise ConfigError(
            f"-o {','.join(sorted(unknown))}: unknown mount option; known are {', '.join(sorted(_OPTIONS))}"
        )
    if allow_other:
        options.add("allow_other")
    # A user's set-uid programs and devices must not come to life on a host that root mounts on.
    for safe, unsafe in (("nosuid", "suid"), ("nodev", "dev")):
        if unsafe not in options:
            options.add(safe)
    return frozenset(options - {"rw"})


class Daemon:
    """One writing mount. A context manager: on entry everything that can fail before mounting has been checked.

    Raises ConfigError, StateError, StateLocked and CatalogTooNew, with nothing changed.
    """

    def __init__(self, config: Config, path: Path, options: frozenset[str]) -> None:
        self._config = config
        self._path = path
        self._options = options
        self._lock: int | None = None
        self._mounted = False
        self._unmounted = False
        self._unmounting = trio.CapacityLimiter(1)
        """Held while `umount` takes the mount away, so that its caller is answered before the daemon ends."""

    def __enter__(self) -> Daemon:
        state_dir = self._config.store.state_dir
        self._config.check_references()
        open_reader(self._config.store.catalog_path).close()
        self._lock = _take_lock(self._config.store.run_dir / "lock", state_dir)
        try:
            self._path = mountpoint.prepare(self._path, state_dir)
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def run(self, on_ready: Any) -> int:
        """Mount, call `on_ready`, serve until the end; returns the exit code."""
        # Each open file of ingest/ takes a descriptor here; what the system allows at most is for its users to use.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        trio.run(self._run, on_ready, strict_exception_groups=True)
        return 0

    async def _run(self, on_ready: Any) -> None:
        config = self._config
        backends = {backend_id: open_backend(settings) for backend_id, settings in config.backends.items()}
        catalog = CatalogReader(config.store.catalog_path)
        writer = CatalogWriter(config.store.catalog_path)
        self._writer = writer
        blobs = BlobReader(catalog, backends, on_bad_location=self._record_failure)
        ingest = Ingest(
            config, catalog=catalog, writer=writer, backends=backends, on_published=self._invalidate_published
        )
        self._ingest = ingest
        self._status = StatusDocument(
            state_dir=config.store.state_dir, mountpoint=self._path, catalog=catalog, ingest=ingest, blobs=blobs
        )
        probes = BackendProbes(backends)
        self._health = HealthDocument(
            catalog_path=config.store.catalog_path, probes=probes, queue=lambda: queue_state(ingest)
        )
        packages = PackagesTree(catalog, blobs, ingest)
        self._operations = CastoreOperations(
            catalog=catalog,
            packages=packages,
            by_digest=ByDigestTree(catalog),
            control=ControlTree(status=self._make_status, health=self._health.make),
            ingest=ingest,
            publish_wait_seconds=config.ingest.publish_wait_seconds,
            sync_wait_seconds=config.ingest.sync_wait_seconds,
        )
        try:
            await ingest.recover()
            async with trio.open_nursery() as nursery:
                await nursery.start(blobs.run)
                await nursery.start(probes.run)
                nursery.start_soon(self._serve_http)
                nursery.start_soon(ingest.run)
                for settings in config.backends.values():
                    nursery.start_soon(sweep_always, settings)
                await nursery.start(serve_control, config.store.control_path, self._handlers())
                self._mount()
                nursery.start_soon(self._stop_on_signal)
                try:
                    await self._serve(on_ready)
                finally:
                    nursery.cancel_scope.deadline = trio.current_time() + STOP_SECONDS
                    nursery.cancel_scope.cancel()
            self._say_what_is_left()
            self._unmount()
        finally:
            self._leave_mounted()
            with trio.CancelScope(shield=True):
                for backend in backends.values():
                    await backend.aclose()
            ingest.close()
            writer.close()
            catalog.close()

    # mounting

    def _mount(self) -> None:
        source = mount_source(self._config.store.state_dir).replace("\\", "\\\\").replace(",", "\\,")
        options = set(pyfuse3.default_options) | {f"fsname={source}", "subtype=castore"} | self._options
        try:
            pyfuse3.init(self._operations, str(self._path), options)
        except RuntimeError as exc:
            raise StateError(
                f"{self._path}: cannot be mounted ({exc}); is there /dev/fuse, and does /etc/fuse.conf allow it?"
            ) from exc
        self._mounted = True

    async def _serve(self, on_ready: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tune_and_tell, on_ready)
            # Never cancelled: it ends by `terminate()`, or when the mount is taken away.
            with trio.CancelScope(shield=True):
                await pyfuse3.main(min_tasks=1, max_tasks=kernel.MAX_TASKS)
                async with self._unmounting:
                    pass
            nursery.cancel_scope.cancel()

    async def _tune_and_tell(self, on_ready: Any) -> None:
        await trio.to_thread.run_sync(kernel.tune, self._path)
        log.info("mounted %s", self._path)
        on_ready()

    async def _stop_on_signal(self) -> None:
        try:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for number in signals:
                    log.info("%s: ending", signal.Signals(number).name)
                    pyfuse3.terminate()
                    waits.end()
        finally:
            # Cancelled because the background work failed: a mount without it takes bytes and never stores them.
            pyfuse3.terminate()
            waits.end()

    def _unmount(self) -> None:
        if self._mounted:
            self._mounted = False
            pyfuse3.close(unmount=not self._unmounted)
            log.info("unmounted %s", self._path)

    def _leave_mounted(self) -> None:
        """After a failure the mount stays, dead: whoever writes to it is told so, instead of to the folder below."""
        if self._mounted:
            self._mounted = False
            pyfuse3.close(unmount=False)
            log.error("%s stays mounted, without a daemon; the next start clears it", self._path)

    def _say_what_is_left(self) -> None:
        files, size_bytes = self._ingest.unfinished()
        if files:
            log.warning(
                "%d files (%d bytes) stay staged in %s; they go on after the next mount",
                files,
                size_bytes,
                self._config.store.state_dir,
            )

    # callbacks of the library

    async def _invalidate_published(self, inodes: list[int]) -> None:
        """Published: mode and owner may differ from what the kernel keeps; the bytes do not."""
        for inode in inodes:
            try:
                pyfuse3.invalidate_inode(inode, attr_only=True)
            except FileNotFoundError:
                continue  # the kernel does not know it
            except OSError as exc:
                log.debug("inode %d is not invalidated: %s", inode, exc)

    async def _record_failure(self, digest: Digest, backend_id: str, reason: FailureReason) -> None:
        """A location gave missing or wrong bytes: it becomes `failed`, with an event."""
        log.error("%s in backend %s: %s", digest, backend_id, reason)
        try:
            await self._writer.run(lambda transaction: record_bad_read(transaction, digest, backend_id, reason))
        except StateError as exc:
            log.error("the failed location could not be recorded: %s", exc)

    async def _serve_http(self) -> None:
        """The HTTP API beside the mount, which does without it when its address is taken."""
        settings = self._config.http
        try:
            listening = await trio.to_thread.run_sync(open_listener, settings.host, settings.port)
        except StateError as exc:
            log.warning("%s; this mount has no HTTP API", exc)
            self._health.notices.append(str(exc))
            return
        api = HttpApi(catalog_path=self._config.store.catalog_path, health=self._health, is_ready=lambda: self._mounted)
        self._status.http_url = url_of(listening)
        log.info("HTTP API at %s", self._status.http_url)
        try:
            await serve_http(listening, api.respond)
        except Exception:
            log.exception("the HTTP API failed unexpectedly; this mount goes on without it")
            self._health.notices.append("the HTTP API failed unexpectedly: the log says more")

    # commands of the control socket

    def _handlers(self) -> dict[str, Any]:
        return {"status": self._answer_status, "publish": self._answer_publish, "umount": self._answer_umount}

    async def _make_status(self) -> dict[str, Any]:
        return self._status.make()

    async def _answer_status(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        return self._status.make()

    async def _answer_publish(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        name, version = parse_ref(str(request.get("ref", "")))
        node = self._ingest.tree.version(name, version)
        parent = self._ingest.tree.parent(node.inode)

        async def tell(progress: PublishProgress) -> None:
            await report(asdict(progress))

        with suppress(NotFound):  # someone else was quicker: publish says so
            await self._ingest.publisher.wait_stored(node.inode, report=tell)
        tree = self._ingest.tree
        if tree.find(node.inode) is not None and tree.version_path(node.inode) != (name, version):
            raise NotFound(f"ingest/{name}/{version} was renamed while it was stored")
        await self._ingest.publisher.publish(
            node.inode,
            name,
            version.encode(),
            wait_seconds=self._config.ingest.publish_wait_seconds,
            report=tell,
        )
        await self._forget_old_name(parent, version.encode())
        self._operations.forget_latest(name)
        return {"ref": f"{name}/{version}"}

    async def _forget_old_name(self, parent: int, version: bytes) -> None:
        """The kernel was not asked, so it still knows a published version under its old name.

        Until it forgets that, it may answer the new name with ESTALE. It waits for whoever holds the old parent, a
        publish by rename at the most.
        """
        with trio.move_on_after(self._config.ingest.publish_wait_seconds + FORGET_SECONDS):
            await trio.to_thread.run_sync(_forget_entry, parent, version, abandon_on_cancel=True)

    async def _answer_umount(self, request: dict[str, Any], report: Report) -> dict[str, Any]:
        if not request.get("force"):
            await self._drain(float(request.get("timeout_seconds", 600.0)), report)
        files, size_bytes = self._ingest.unfinished()
        with trio.CancelScope(shield=True):
            await self._unmounting.acquire()
            try:
                self._unmounted = await trio.to_thread.run_sync(mountpoint.try_unmount, self._path)
                if not self._unmounted:
                    raise StateError(await trio.to_thread.run_sync(mountpoint.busy_message, self._path))
                waits.end()  # those who asked are gone
            finally:
                self._unmounting.release()
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


def _take_lock(path: Path, state_dir: Path) -> int:
    """The descriptor that holds the state directory's lock until it is closed. Raises StateLocked."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise StateLocked(
            f"{state_dir}: another daemon (pid {holder or 'unknown'}) writes there; unmount it or set another state_dir"
        ) from exc
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
