"""The daemon: puts the library's parts together, serves one mount, and ends it. The composition root of the mount."""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyfuse3
import trio

from castore.api.control import serve_control
from castore.api.counts import CatalogCounts
from castore.api.deliveries import Deliveries
from castore.api.health import HealthDocument, queue_state
from castore.api.http_api import HttpApi
from castore.api.http_server import open_listener, serve_http, url_of
from castore.api.probes import BackendProbes
from castore.api.sources import Sources
from castore.api.status import StatusDocument
from castore.blobs.disk_cache import DiskCache, open_disk_cache
from castore.blobs.reader import BlobReader
from castore.catalog.condition import ConditionReader
from castore.catalog.connection import open_reader
from castore.catalog.reader import CatalogReader
from castore.catalog.records import FailureReason
from castore.catalog.writer import CatalogWriter
from castore.config import Config
from castore.digest import Digest
from castore.errors import CastoreError, ConfigError, StateError
from castore.ingest.service import Ingest
from castore.mountinfo import mount_source
from castore.registry.locations import record_bad_read
from castore.replica.follower import Follower
from castore.storage.measured import CallStats
from castore.storage.open import load_backend, open_backend
from castore.verify.schedule import scrub_always
from mount import kernel, mountpoint
from mount.by_digest import ByDigestTree
from mount.commands import Commands
from mount.control import ControlTree
from mount.guard import waits
from mount.operations import CastoreOperations
from mount.package_order import PackageOrder
from mount.packages import PackagesTree
from mount.sweeping import sweep_always

log = logging.getLogger(__name__)

STOP_SECONDS: Final = 20.0
"""A signal lets puts go on for so long, unless a second one comes; with the unmount it stays below the 30 s that are
promised. What is not stored by then stays staged."""

_REDELIVER_SECONDS: Final = 60.0
"""After a catalog that cannot be read, or worse."""

_OPTIONS: Final = frozenset(
    {"allow_other", "allow_root", "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec"}
)


def parse_options(text: str, *, allow_other: bool, follow: bool = False) -> frozenset[str]:
    """The mount options of `-o`, checked. Raises ConfigError for one that is not known, or does not go with others."""
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
    if {"ro", "rw"} <= options:
        raise ConfigError("-o ro,rw: a mount is read-only or not; give one of them")
    if follow:
        if "rw" in options:
            raise ConfigError("-o rw: a mount with --follow is read-only: publish on the writer's host; leave it out")
        options.add("ro")
    return frozenset(options - {"rw"})


class Daemon:
    """One mount. A context manager: on entry everything that can fail before mounting has been checked.

    The writing mount of a state directory holds its lock, and alone has ingest/, the control socket and the HTTP API.
    With the option `ro` any number of others shows what is published. With `follow`, the URL of a replica, it shows
    what another host publishes, and holds the lock of a state directory that has nothing of its own.

    Raises ConfigError, StateError, StateLocked and CatalogTooNew, with nothing changed.
    """

    def __init__(self, config: Config, path: Path, options: frozenset[str], follow: str | None = None) -> None:
        self._config = config
        self._follower = None if follow is None else Follower(follow, config.store, config.follow)
        self._path = path
        self._options = options
        self._ingest: Ingest | None = None
        self._lock: int | None = None
        self._mounted = False
        self._unmounted = False
        self._unmounting = trio.CapacityLimiter(1)
        """Held while `umount` takes the mount away, so that its caller is answered before the daemon ends."""

    def __enter__(self) -> Daemon:
        store = self._config.store
        state_dir = store.state_dir
        self._config.check_references()
        if self._follower is None:
            if store.followed_path.exists():
                raise StateError(
                    f"{state_dir}: follows the catalog of another host; give --follow URL, or make this host the "
                    "writer as docs/OPERATOR.md says"
                )
            open_reader(store.catalog_path).close()
        if "ro" not in self._options or self._follower is not None:
            self._lock = mountpoint.take_lock(store.run_dir / "lock", state_dir, read_only=self._follower is not None)
        try:
            self._path = mountpoint.prepare(self._path, state_dir, is_writer=self._lock is not None)
            if self._follower is not None:
                self._follower.begin()
                open_reader(store.catalog_path).close()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._follower is not None:
            self._follower.close()
        if self._lock is not None:
            os.close(self._lock)

    def run(self, on_ready: Any) -> int:
        """Mount, call `on_ready`, serve until the end; returns the exit code."""
        # Each open file of ingest/ takes a descriptor here; what the system allows at most is for its users to use.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        try:
            trio.run(self._run, on_ready, strict_exception_groups=True)
        except BaseExceptionGroup as group:
            raise _lone_error(group) from group
        return 0

    async def _run(self, on_ready: Any) -> None:
        config = self._config
        calls = {backend_id: CallStats() for backend_id in config.backends}
        backends = {
            backend_id: open_backend(settings, calls[backend_id]) for backend_id, settings in config.backends.items()
        }
        catalog = CatalogReader(config.store.catalog_path)
        _say_what_is_not_configured(config)
        follower = self._follower
        writer = CatalogWriter(config.store.catalog_path) if follower is None else None
        self._writer = writer
        notices: list[str] = []
        cache = await _open_cache(config, notices)
        blobs = BlobReader(
            catalog,
            backends,
            on_bad_location=self._record_failure,
            cache=cache,
            following=PackageOrder(catalog).following if config.cache.prefetch_siblings else None,
        )
        self._blobs = blobs
        ingest = None
        if writer is not None and self._lock is not None:
            ingest = Ingest(
                config,
                catalog=catalog,
                writer=writer,
                backends=backends,
                on_published=self._invalidate_published,
                cache=cache,
            )
        self._ingest = ingest
        counts = CatalogCounts(config.store.catalog_path)
        self._status = StatusDocument(
            state_dir=config.store.state_dir,
            mountpoint=self._path,
            counts=counts,
            ingest=ingest,
            blobs=blobs,
            followed=None if follower is None else follower.state,
        )
        probes = BackendProbes(backends)
        self._health = HealthDocument(
            catalog_path=config.store.catalog_path,
            probes=probes,
            queue=lambda: None if ingest is None else queue_state(ingest),
            events=None if follower is not None else config.events,
            followed=None if follower is None else follower.state,
            restore_within_seconds=config.retention.restore_within_seconds,
        )
        self._health.notices += notices
        self._sources = Sources(
            catalog_path=config.store.catalog_path,
            health=self._health,
            probes=probes,
            counts=counts,
            backend_types={backend_id: settings.backend_type for backend_id, settings in config.backends.items()},
            calls=calls,
            blobs=blobs,
            ingest=ingest,
            followed=None if follower is None else follower.state,
            mountpoint=str(self._path),
        )
        packages = PackagesTree(catalog, blobs, ingest)
        self._operations = CastoreOperations(
            packages=packages,
            by_digest=ByDigestTree(catalog),
            control=ControlTree(status=self._make_status, health=self._health.make),
            ingest=ingest,
            publish_wait_seconds=config.ingest.publish_wait_seconds,
            sync_wait_seconds=config.ingest.sync_wait_seconds,
        )
        try:
            for settings in config.backends.values():
                await trio.to_thread.run_sync(load_backend, settings)
            if ingest is not None:
                await ingest.recover()
            # From before the mount is there until it is not: a signal that ends this process leaves it dead.
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async with trio.open_nursery() as nursery:
                    await nursery.start(blobs.run)
                    await nursery.start(probes.run)
                    await nursery.start(counts.run)
                    if ingest is not None and writer is not None:
                        await self._start_writing(nursery, ingest, blobs, writer)
                    if follower is not None:
                        nursery.start_soon(self._serve_http)
                        nursery.start_soon(follower.run, partial(_read_anew, catalog, packages))
                    self._mount()
                    nursery.start_soon(self._stop_on_signal, signals)
                    try:
                        await self._serve(on_ready)
                    finally:
                        nursery.cancel_scope.cancel()
                self._say_what_is_left()
                self._unmount()
        finally:
            self._leave_mounted()
            with trio.CancelScope(shield=True):
                for backend in backends.values():
                    await backend.aclose()
            if ingest is not None:
                ingest.close()
            if cache is not None:
                cache.close()
            if writer is not None:
                writer.close()
            catalog.close()

    async def _start_writing(
        self, nursery: trio.Nursery, ingest: Ingest, blobs: BlobReader, writer: CatalogWriter
    ) -> None:
        """All that only the writing mount of a state directory does."""
        nursery.start_soon(self._serve_http)
        nursery.start_soon(self._deliver_events, writer)
        nursery.start_soon(ingest.run)
        if self._config.verify.every_seconds:
            nursery.start_soon(
                partial(
                    scrub_always,
                    self._config.verify,
                    self._config.store.catalog_path,
                    self._config.backends,
                    is_busy=lambda: blobs.is_fetching,
                )
            )
        first_s = self._config.ingest.sweep_after_seconds
        for settings in self._config.backends.values():
            nursery.start_soon(partial(sweep_always, settings, first_s=first_s, is_wanted=ingest.leftovers.is_wanted))
        commands = Commands(
            self._config.ingest,
            ingest=ingest,
            status=self._status,
            take_away=self._take_away,
            state_dir=self._config.store.state_dir,
            mountpoint=self._path,
            open_digests=self._blobs.open_digests,
        )
        await nursery.start(serve_control, self._config.store.control_path, commands.handlers())

    # mounting

    def _mount(self) -> None:
        source = mount_source(self._config.store.state_dir).replace("\\", "\\\\").replace(",", "\\,")
        options = set(pyfuse3.default_options) | {f"fsname={source}", "subtype=castore"} | self._options
        try:
            pyfuse3.init(self._operations, str(self._path), options)
        except RuntimeError as exc:
            raise StateError(
                f"{self._path}: cannot be mounted ({exc}); is there /dev/fuse, and does /etc/fuse.conf allow it? "
                "`castore doctor` says which"
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
        await self._operations.begun.wait()
        await trio.to_thread.run_sync(kernel.tune, self._path)
        log.info("mounted %s", self._path)
        on_ready()

    async def _stop_on_signal(self, signals: AsyncIterator[int]) -> None:
        try:
            number = await anext(signals)
            log.info("%s: ending", signal.Signals(number).name)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wait_for_puts, nursery.cancel_scope)
                await anext(signals)
                nursery.cancel_scope.cancel()
        finally:
            # Cancelled because the background work failed: a mount without it takes bytes and never stores them.
            pyfuse3.terminate()
            waits.end()

    async def _wait_for_puts(self, scope: trio.CancelScope) -> None:
        """What is closed is put now, within STOP_SECONDS: only `umount` waits as long as it takes."""
        with trio.move_on_after(STOP_SECONDS):
            if self._ingest is not None and (waiting := self._ingest.waiting())[0]:
                log.info("%d files (%d bytes) are not stored yet: waiting, at most %g s", *waiting, STOP_SECONDS)
                while self._ingest.waiting()[0]:
                    with trio.move_on_after(1):
                        await self._ingest.uploader.progress.wait()
        scope.cancel()

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
        files, size_bytes = (0, 0) if self._ingest is None else self._ingest.unfinished()
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
        if self._writer is None:
            return  # the writer's host learns it by its own reads and scrubs
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
        api = HttpApi(self._sources, is_ready=lambda: self._mounted)
        self._status.http_url = url_of(listening)
        log.info("HTTP API at %s", self._status.http_url)
        try:
            await serve_http(listening, api.respond)
        except Exception:
            log.exception("the HTTP API failed unexpectedly; this mount goes on without it")
            self._health.notices.append("the HTTP API failed unexpectedly: the log says more")

    async def _deliver_events(self, writer: CatalogWriter) -> None:
        """Events to whom they are for, and old ones away. The mount does without it when it fails."""
        while True:
            try:
                await Deliveries(self._config, writer).run()
            except StateError as exc:
                log.error("events are not delivered: %s; tried again in %g s", exc, _REDELIVER_SECONDS)
            except Exception:
                log.exception("delivering events failed unexpectedly; tried again in %g s", _REDELIVER_SECONDS)
            await trio.sleep(_REDELIVER_SECONDS)

    async def _make_status(self) -> dict[str, Any]:
        return await self._status.make()

    async def _take_away(self) -> None:
        """Unmount while the daemon serves, so that whoever asked is answered. Raises StateError when it is in use."""
        with trio.CancelScope(shield=True):
            await self._unmounting.acquire()
            try:
                self._unmounted = await trio.to_thread.run_sync(mountpoint.try_unmount, self._path)
                if not self._unmounted:
                    raise StateError(await trio.to_thread.run_sync(mountpoint.busy_message, self._path))
                waits.end()  # those who asked are gone
            finally:
                self._unmounting.release()


async def _open_cache(config: Config, notices: list[str]) -> DiskCache | None:
    """The disk cache, or None: a mount does without one that is broken."""
    try:
        return await trio.to_thread.run_sync(open_disk_cache, config)
    except StateError as exc:
        log.warning("%s; this mount has no disk cache", exc)
        notices.append(f"{exc}; this mount has no disk cache")
        return None


def _read_anew(catalog: CatalogReader, packages: PackagesTree) -> None:
    """Another catalog has taken the place of the one that is read."""
    try:
        catalog.reopen()
        packages.forget()
    except StateError as exc:
        log.error("the catalog that came cannot be read, the one before is: %s", exc)


def _lone_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What a nursery ended with, when that is one error and for people to read; the whole group otherwise."""
    lone: BaseException = group
    while isinstance(lone, BaseExceptionGroup) and len(lone.exceptions) == 1:
        lone = lone.exceptions[0]
    return lone if isinstance(lone, CastoreError) else group


def _say_what_is_not_configured(config: Config) -> None:
    """Once, at the start: every read of such a location would have to say it."""
    with ConditionReader(config.store.catalog_path) as reader:
        for backend_id in sorted(reader.backend_ids() - config.backends.keys()):
            log.error(
                "the catalog has locations in backend %s, which is not configured: what is stored there alone cannot "
                "be read; configure it, or have it forgotten by `castore storage retire --backend %s`",
                backend_id,
                backend_id,
            )
