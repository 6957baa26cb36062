"""`castore cache`: what the disk cache holds, filling it ahead of readers, emptying it. Needs no daemon."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.completing import REF
from castore.cli.long_run import INTERRUPTED, LongRun, Snapshot
from castore.cli.output import format_bytes, format_time_ns, print_columns, print_json, printable
from castore.cli.session import Session, common_options, json_option
from castore.errors import ConfigError, NotFound, StateError
from castore.registry.names import parse_ref

if TYPE_CHECKING:
    from castore.blobs.disk_cache import DiskCache
    from castore.blobs.warm import Warmer
    from castore.catalog.reader import CatalogReader
    from castore.catalog.records import Entry
    from castore.config import Config
    from castore.digest import Digest

FOUND_SOMETHING_BAD: Final = 1
_PAGE_ENTRIES: Final = 1000
"""Entries fetched by one query."""
_DISK_UNIT: Final = 4096
"""What the smallest file takes on common file systems: for the estimate whether all fits."""


@click.group("cache")
@common_options
def command() -> None:
    """Look after the disk cache, which all mounts that name its folder share."""


@command.command("show")
@json_option
@common_options
@click.pass_obj
def show(session: Session, as_json: bool) -> None:
    """Show where the cache is, what it holds and what it may hold.

    Example: castore cache show
    """
    from castore.blobs.cache_files import CacheFiles
    from castore.blobs.disk_cache import same_disk_backends
    from castore.catalog.tiny import TinyBlobs

    config = session.config()
    settings = config.cache
    used, count, oldest = 0, 0, 0
    for file in CacheFiles(settings.dir).walk():
        used += file.disk_bytes
        count += bool(file.path)
        oldest = min(oldest or file.used_ns, file.used_ns or oldest)
    tiny_used = 0
    if config.store.tiny_path.exists():
        tiny_used = TinyBlobs(config.store.tiny_path, settings.tiny_max_bytes).look_and_close()
    document: dict[str, Any] = {
        "dir": str(settings.dir),
        "max_bytes": settings.max_bytes,
        "used_bytes": used,
        "file_count": count,
        "oldest_use_ns": oldest,
        "tiny_bytes": settings.tiny_bytes,
        "tiny_used_bytes": tiny_used,
        "tiny_max_bytes": settings.tiny_max_bytes,
        "not_kept_backend_ids": sorted(same_disk_backends(config)),
    }
    if as_json:
        print_json(document)
        return
    rows = [
        ("folder", printable(str(settings.dir))),
        ("used", f"{format_bytes(used)} in {count} files"),
        ("at most", format_bytes(settings.max_bytes) if settings.max_bytes else "0 B: nothing is cached"),
        ("oldest use", format_time_ns(oldest)),
        ("small blobs", f"{format_bytes(tiny_used)} of {format_bytes(settings.tiny_max_bytes)} in a database"),
    ]
    if document["not_kept_backend_ids"]:
        names = printable(", ".join(document["not_kept_backend_ids"]))
        rows.append(("not kept", f"what readers get from {names}, on the same disk (cache.same_disk)"))
    print_columns(rows)


@command.command("clear")
@json_option
@common_options
@click.pass_obj
def clear(session: Session, as_json: bool) -> None:
    """Remove all that is cached, and nothing else. Mounts go on, and fetch again what is read.

    Example: castore cache clear
    """
    from castore.blobs.cache_files import CacheFiles
    from castore.catalog.tiny import TinyBlobs

    config = session.config()
    file_count, size_bytes = CacheFiles(config.cache.dir).clear()
    tiny_count = 0
    if config.store.tiny_path.exists():
        tiny_count = TinyBlobs(config.store.tiny_path, config.cache.tiny_max_bytes).clear_and_close()
    if as_json:
        print_json(
            {"removed_file_count": file_count, "removed_bytes": size_bytes, "removed_small_blob_count": tiny_count}
        )
    else:
        click.echo(f"removed {file_count} files, {format_bytes(size_bytes)}, and {tiny_count} small blobs")


@command.command("warm")
@click.argument("ref", type=REF)
@click.option("--path", "inside", metavar="P", help="Only the file or directory P of the package.")
@json_option
@common_options
@click.pass_obj
def warm(session: Session, ref: str, inside: str | None, as_json: bool) -> int:
    """Fetch all of the package REF that the cache lacks, so that reading it needs no backend.

    Exits with 1 when some file has no good copy of its bytes left, and with 2 when it does not fit.

    Example: castore cache warm zlib/1.3 --path lib
    """
    from castore.blobs.disk_cache import open_disk_cache
    from castore.catalog.reader import CatalogReader

    config = session.config()
    name, version = parse_ref(ref, allow_latest=True)
    with CatalogReader.open(config.store.catalog_path) as reader:
        package = reader.package(name, version)
        if package is None:
            raise NotFound(f"{ref}: no such package is published")
        sizes, paths = _files(reader, package.root_id, inside, ref)
        cache = open_disk_cache(config)
        if cache is None:
            raise ConfigError("cache.max_bytes = 0: nothing is cached; give the cache room first")
        _check_fit(config, cache, ref, sum(-(-size // _DISK_UNIT) * _DISK_UNIT for size in sizes.values()))
        started = time.monotonic()
        try:
            warmer = _warm(config, reader, cache, sizes, package.ref)
        except KeyboardInterrupt:
            click.echo("interrupted; what was fetched stays cached", err=True)
            return INTERRUPTED
    done, bad = warmer.warmed, sorted(os.fsdecode(paths[blob_id]) for blob_id in warmer.unreadable)
    size_bytes = sum(sizes.values())
    document = {
        "ref": package.ref,
        "blob_count": len(sizes),
        "size_bytes": size_bytes,
        "fetched_bytes": done.fetched_bytes,
        "seconds": round(time.monotonic() - started, 3),
        "unreadable": [printable(path) for path in bad],
    }
    if as_json:
        print_json(document)
    else:
        for path in bad:
            click.echo(f"unreadable: {printable(path)}")
        click.echo(
            f"{package.ref}: {format_bytes(done.done_bytes)} of {format_bytes(size_bytes)} are cached, "
            f"{format_bytes(done.fetched_bytes)} of that fetched in {document['seconds']:.1f} s"
        )
    return FOUND_SOMETHING_BAD if bad else 0


def _files(
    reader: CatalogReader, root_id: int, inside: str | None, ref: str
) -> tuple[dict[int, int], dict[int, bytes]]:
    """The size and one path of each blob below a package's root, or below a path in it, by number, in tree order."""
    from castore.catalog.records import Kind

    root = reader.entry(root_id)
    assert root is not None
    parts = [os.fsencode(part) for part in (inside or "").split("/") if part not in ("", ".")]
    entry: Entry | None = root
    for part in parts:
        entry = reader.lookup(entry.inode, part) if entry is not None else None
    if entry is None or entry.kind is Kind.SYMLINK:
        raise NotFound(f"{ref}: no file or directory {inside!r} in it")
    sizes: dict[int, int] = {}
    paths: dict[int, bytes] = {}
    for path, file in _walk(reader, entry, b"/".join(parts)):
        if file.size_bytes:
            sizes[file.blob_id] = file.size_bytes
            paths.setdefault(file.blob_id, path)
    return sizes, paths


def _walk(reader: CatalogReader, entry: Entry, path: bytes) -> Iterator[tuple[bytes, Entry]]:
    from castore.catalog.records import Kind

    pending = [(path, entry)]
    while pending:
        above, entry = pending.pop()
        if entry.kind is Kind.FILE:
            yield above, entry
            continue
        folders: list[tuple[bytes, Entry]] = []
        after = 0
        while page := reader.children(entry.inode, after, _PAGE_ENTRIES):
            after = page[-1].entry_id
            for child in page:
                below = (above + b"/" if above else b"") + child.name
                if child.kind is Kind.FILE:
                    yield below, child
                elif child.kind is Kind.DIRECTORY:
                    folders.append((below, child))
        pending += reversed(folders)


def _check_fit(config: Config, cache: DiskCache, ref: str, size_bytes: int) -> None:
    try:
        room = cache.room_bytes()
    except OSError as exc:
        raise StateError(f"{config.cache.dir}: cannot be read: {exc.strerror}") from exc
    if size_bytes > room:
        raise ConfigError(
            f"{ref} takes {format_bytes(size_bytes)}, and the cache in {config.cache.dir} keeps {format_bytes(room)}: "
            "raise cache.max_bytes, make room on its disk, or warm a part with --path"
        )


def _warm(config: Config, reader: CatalogReader, cache: DiskCache, sizes: dict[int, int], ref: str) -> Warmer:
    """Warm blobs with progress. Raises what the warmer raises, and KeyboardInterrupt."""
    import trio

    from castore.blobs.fetch import BlockFetcher
    from castore.blobs.warm import Warmer
    from castore.catalog.records import FailureReason
    from castore.catalog.writer import CatalogWriter
    from castore.registry.locations import record_bad_read
    from castore.storage.open import open_backend

    writer = CatalogWriter(config.store.catalog_path)

    async def record(digest: Digest, backend_id: str, reason: FailureReason) -> None:
        await writer.run(lambda transaction: record_bad_read(transaction, digest, backend_id, reason))

    try:
        backends = {backend_id: open_backend(settings) for backend_id, settings in config.backends.items()}
        fetcher = BlockFetcher(reader, backends, stats=cache.stats, on_bad_location=record)
        warmer = Warmer(reader, fetcher, cache)
        run = LongRun(f"warming {ref}", backends.values())
        look = _snapshots(warmer, len(sizes), sum(sizes.values()))
        trio.run(run.main, partial(warmer.run, sizes), look)
    finally:
        writer.close()
        cache.close()
    if run.is_interrupted:
        raise KeyboardInterrupt
    return warmer


def _snapshots(warmer: Warmer, blob_count: int, total_bytes: int) -> Callable[[], Snapshot]:
    started = time.monotonic()

    def look() -> Snapshot:
        done = warmer.warmed
        files = f"{done.done_blobs} of {blob_count} blobs"
        if done.done_bytes and not sys.stderr.isatty():  # a bar shows it by itself
            left = (time.monotonic() - started) * (total_bytes - done.done_bytes) / done.done_bytes
            files += f", about {left:.0f} s left"
        return Snapshot(done.done_bytes, total_bytes, files)

    return look
