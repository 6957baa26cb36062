"""`castore package export`: a published package as an ordinary directory. Needs no mount and no daemon."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from castore.cli.completing import REF
from castore.cli.long_run import INTERRUPTED, LongRun, Snapshot
from castore.cli.output import format_bytes, print_json, printable
from castore.cli.session import Session, common_options, json_option
from castore.errors import NotFound
from castore.registry.names import parse_ref

if TYPE_CHECKING:
    from castore.blobs.export import Exported
    from castore.catalog.package_tree import TreeReader
    from castore.catalog.records import FailureReason, Package
    from castore.config import Config
    from castore.digest import Digest


@click.command("export")
@click.argument("ref", type=REF)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@common_options
@click.pass_obj
def export_package(session: Session, ref: str, directory: Path, as_json: bool) -> int:
    """Write the package REF to DIR, which is empty or not there yet: all of it, or nothing.

    Every byte is checked. Modes, times, links and attributes are kept; owners only by root.

    Example: castore package export zlib/1.3 /srv/zlib-1.3
    """
    from castore.blobs.export import check_target
    from castore.catalog.package_tree import TreeReader

    config = session.config()
    name, version = parse_ref(ref, allow_latest=True)
    target = directory.absolute()
    with TreeReader(config.store.catalog_path) as reader:
        package = reader.package(name, version)
        if package is None:
            raise NotFound(f"{ref}: no such package is published")
        check_target(target)
        started = time.monotonic()
        done, run = _export(config, reader, package, target)
    if run.is_interrupted:
        click.echo("interrupted; nothing is left of it", err=True)
        return INTERRUPTED
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        print_json(
            {
                "ref": package.ref,
                "directory": str(target),
                "file_count": done.file_count,
                "size_bytes": done.size_bytes,
                "seconds": seconds,
            }
        )
    else:
        what = f"{done.file_count} files, {format_bytes(done.size_bytes)}"
        click.echo(f"exported {package.ref} to {printable(str(target))}: {what} in {seconds:.1f} s")
    return 0


def _export(config: Config, reader: TreeReader, package: Package, target: Path) -> tuple[Exported, LongRun]:
    """The export, with progress, until it is done or interrupted. Raises what `Export.run` does."""
    import trio

    from castore.blobs.disk_cache import open_disk_cache
    from castore.blobs.export import Export
    from castore.blobs.reader import BlobReader
    from castore.catalog.writer import CatalogWriter
    from castore.registry.locations import record_bad_read
    from castore.storage.open import open_backend

    writer = CatalogWriter(config.store.catalog_path)

    async def record(digest: Digest, backend_id: str, reason: FailureReason) -> None:
        await writer.run(lambda transaction: record_bad_read(transaction, digest, backend_id, reason))

    root = reader.entry(package.root_id)
    if root is None:
        raise NotFound(f"{package.ref}: no such package is published")
    cache = open_disk_cache(config)
    try:
        backends = {backend_id: open_backend(settings) for backend_id, settings in config.backends.items()}
        blobs = BlobReader(reader, backends, on_bad_location=record, cache=cache)
        export = Export(reader, blobs, root, reader.walk(package.root_id), target)
        run = LongRun(f"exporting {package.ref}", backends.values())

        async def work() -> None:
            error: Exception | None = None
            async with trio.open_nursery() as nursery:
                await nursery.start(blobs.run)
                try:
                    await export.run()
                except Exception as exc:
                    error = exc  # raised outside, so that it is not part of a group
                nursery.cancel_scope.cancel()
            if error is not None:
                raise error

        def look() -> Snapshot:
            done = export.done
            return Snapshot(done.size_bytes, package.size_bytes, f"{done.file_count} of {package.file_count} files")

        trio.run(run.main, work, look)
    finally:
        writer.close()
        if cache is not None:
            cache.close()
    return export.done, run
