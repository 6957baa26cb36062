"""`castore package import`: has the daemon import a directory, or does it here. How, castore.ingest knows."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from castore.cli.long_run import INTERRUPTED, LongRun, Snapshot
from castore.cli.output import format_bytes, print_json
from castore.cli.progress import progress
from castore.cli.session import Session, common_options, json_option
from castore.cli.status import STATUS_SECONDS
from castore.errors import CastoreError, StateError, StateLocked
from castore.registry.names import parse_ref

if TYPE_CHECKING:
    from castore.api.control_client import ControlClient
    from castore.config import Config
    from castore.ingest.bulk import BulkImport
    from castore.ingest.bulk_order import ImportOrder
    from castore.ingest.service import Ingest
    from castore.storage.spi import StorageBackend


@click.command("import")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("ref")
@click.option("--producer", metavar="P", help="Who made it.  [default: your login name]")
@click.option("--retention-class", metavar="C", help="Which retention class it has.  [default: the configured one]")
@click.option("--resume", is_flag=True, help="Go on in an ingest/REF that was made by hand: make it like DIR.")
@json_option
@common_options
@click.pass_obj
def import_package(
    session: Session,
    directory: Path,
    ref: str,
    producer: str | None,
    retention_class: str | None,
    resume: bool,
    as_json: bool,
) -> int:
    """Publish the directory DIR as REF, written NAME/VERSION, without a mount.

    What was interrupted goes on with the same command: what is staged already, by size and time, is not copied again.

    Example: castore package import /srv/zlib-1.3 zlib/1.3 --producer ci-7
    """
    from castore.ingest.bulk_order import ImportOrder

    name, version = parse_ref(ref)
    mask = os.umask(0o077)
    os.umask(mask)
    order = ImportOrder(
        directory=os.fsencode(directory.absolute()),
        name=name,
        version=version,
        uid=os.geteuid(),
        gid=os.getegid(),
        name_mode=0o777 & ~mask,
        producer=producer,
        retention_class=retention_class,
        resume=resume,
    )
    run = _Run(session.config(), order)
    run.run()
    run.sum_up(as_json)
    return INTERRUPTED if run.is_interrupted else 0


class _Run:
    """One import on the command line."""

    def __init__(self, config: Config, order: ImportOrder) -> None:
        self.is_interrupted = False
        self._config = config
        self._order = order
        self.title = f"importing {order.ref}"
        self._started = time.monotonic()
        self._last: dict[str, Any] = {}
        """The last progress, as of ImportProgress."""
        self.left = (0, 0)
        """Files and bytes that stay staged after an interruption."""

    def run(self) -> None:
        """Here, if nobody else writes to the state directory; else by the daemon that does."""
        import trio

        from castore.catalog.connection import open_reader
        from castore.state_lock import take_lock

        store = self._config.store
        open_reader(store.catalog_path).close()
        try:
            lock = take_lock(store.run_dir / "lock", store.state_dir, holder="import")
        except StateLocked as exc:
            self._by_daemon(exc)
            return
        try:
            self._config.check_references()
            trio.run(_Here(self._config, self._order, self).main)
        finally:
            os.close(lock)

    # by a daemon

    def _by_daemon(self, locked: StateLocked) -> None:
        from castore.api.control_client import ControlClient
        from castore.ingest.bulk_source import mapped

        client = ControlClient(self._config.store.control_path)
        try:
            client.daemon_pid()
        except StateError:
            raise locked from None
        try:
            status = os.stat(self._order.directory)
        except OSError as exc:
            raise mapped(exc, self._order.directory) from exc
        request = self._order.to_request() | {"device": status.st_dev, "inode": status.st_ino}
        try:
            with progress(self.title) as show:

                def on_progress(snapshot: dict[str, Any]) -> None:
                    self.tell(snapshot)
                    now = self.look()
                    if now is not None:
                        show(done_bytes=now.done_bytes, total_bytes=now.total_bytes, files=now.files)

                self._last = client.call("import", on_progress, **request)
        except KeyboardInterrupt:
            self.is_interrupted = True
            self.left = self._staged_in(client)

    def _staged_in(self, client: ControlClient) -> tuple[int, int]:
        """Files and bytes of the version; what was told last when the daemon does not say."""
        now = self._last
        with contextlib.suppress(CastoreError):
            versions = client.call("status", within=STATUS_SECONDS)["versions"]
            now = next((each for each in versions if each["ref"] == self._order.ref), {})
            return int(now.get("total_files", 0)), int(now.get("total_bytes", 0))
        return (
            int(now.get("copied_files", 0)) + int(now.get("kept_files", 0)),
            int(now.get("copied_bytes", 0)) + int(now.get("kept_bytes", 0)),
        )

    # how far it is

    def tell(self, now: dict[str, Any]) -> None:
        """How far it is now, as of ImportProgress."""
        self._last = now or self._last

    def look(self) -> Snapshot | None:
        """As it is shown; None while the directory is walked."""
        now = self._last
        if not now.get("total_files"):
            return None
        staged = int(now["copied_files"]) + int(now["kept_files"])
        return Snapshot(
            done_bytes=int(now["stored_bytes"]),
            total_bytes=int(now["total_bytes"]),
            files=f"{staged} of {now['total_files']} files copied, {now['stored_files']} stored",
        )

    # results

    def sum_up(self, as_json: bool) -> None:
        """The last words: what is published to standard output, that it was interrupted to standard error."""
        ref, seconds = self._order.ref, time.monotonic() - self._started
        if as_json:
            print_json(self._document(seconds))
        elif not self.is_interrupted:
            now = self._last
            kept = f", {now['kept_files']} of them staged before" if now["kept_files"] else ""
            size = format_bytes(int(now["total_bytes"]))
            click.echo(f"published {ref}: {now['total_names']} files, {size} in {seconds:.1f} s{kept}")
        if self.is_interrupted:
            left = f"{self.left[0]} files ({format_bytes(self.left[1])}) stay staged in ingest/{ref}"
            print(f"castore: interrupted: {left}; the same command goes on from there", file=sys.stderr)

    def _document(self, seconds: float) -> dict[str, Any]:
        now = self._last
        return {
            "ref": self._order.ref,
            "file_count": now.get("total_names", 0),
            "size_bytes": now.get("total_bytes", 0),
            **{key: now.get(key, 0) for key in ("copied_files", "copied_bytes", "kept_files", "kept_bytes")},
            "duration_s": round(seconds, 3),
            "interrupted": self.is_interrupted,
            "staged_files": self.left[0],
            "staged_bytes": self.left[1],
        }


class _Here:
    """An import in this process, which holds the state directory's lock: a daemon's ingest without a mount."""

    def __init__(self, config: Config, order: ImportOrder, run: _Run) -> None:
        self._config = config
        self._order = order
        self._run = run
        self._backends: dict[str, StorageBackend] = {}
        self._bulk: BulkImport | None = None
        self._is_done = False

    async def main(self) -> None:
        """Recover, stage, store, publish. Raises CastoreError."""
        from castore.storage.open import open_backend

        self._backends = {backend_id: open_backend(each) for backend_id, each in self._config.backends.items()}
        long = LongRun(self._run.title, self._backends.values())
        await long.main(self._work, self._look)
        self._run.is_interrupted = long.is_interrupted and not self._is_done

    def _look(self) -> Snapshot | None:
        if self._bulk is not None:
            self._run.tell(asdict(self._bulk.progress()))
        return self._run.look()

    async def _work(self) -> None:
        from castore.catalog.reader import CatalogReader
        from castore.catalog.writer import CatalogWriter
        from castore.ingest.bulk import BulkImport
        from castore.ingest.service import Ingest

        config = self._config
        state = os.stat(config.store.state_dir)
        catalog = CatalogReader(config.store.catalog_path)
        writer = CatalogWriter(config.store.catalog_path)
        ingest = Ingest(config, catalog=catalog, writer=writer, backends=self._backends, on_published=_no_kernel)
        try:
            await ingest.recover()
            self._bulk = BulkImport(ingest, self._order, avoid=frozenset({(state.st_dev, state.st_ino)}))
            await self._import(ingest, self._bulk)
        finally:
            if self._bulk is not None:
                self._run.tell(asdict(self._bulk.progress()))
                self._run.left = self._bulk.staged()
                self._bulk = None
            ingest.close()
            writer.close()
            catalog.close()

    async def _import(self, ingest: Ingest, bulk: BulkImport) -> None:
        import trio

        error: CastoreError | None = None

        async def publish(version_inode: int) -> None:
            await bulk.publish(version_inode, wait_seconds=self._config.ingest.publish_wait_seconds)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ingest.run)
            try:
                await bulk.run(publish)
                self._is_done = True
            except CastoreError as exc:
                error = exc
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error


async def _no_kernel(_: list[int]) -> None:
    """Nothing is mounted, so nobody keeps attributes."""
