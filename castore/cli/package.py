"""`castore package`: list and show from the catalog, publish by the daemon. Applies no rule of the registry itself."""

from __future__ import annotations

import stat
import time
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import click

from castore.api.control_client import ControlClient
from castore.cli.completing import REF
from castore.cli.output import format_bytes, format_time_ns, print_columns, print_json, printable, text_fields
from castore.cli.package_compare import diff, sums
from castore.cli.package_delete import delete, deleted, restore
from castore.cli.package_export import export_package
from castore.cli.package_import import import_package
from castore.cli.package_tag import tag
from castore.cli.parameters import DURATION, SIZE
from castore.cli.progress import progress
from castore.cli.session import Session, common_options, json_option
from castore.errors import NotFound
from castore.registry.names import parse_ref

if TYPE_CHECKING:
    from castore.catalog.package_tree import TreeReader
    from castore.catalog.records import Entry, Package


@click.group("package")
@common_options
def command() -> None:
    """List, show and publish packages."""


@command.command("list")
@click.option("--name", metavar="PATTERN", default="*", help="Only packages whose NAME is like that.")
@click.option("--producer", metavar="PATTERN", default="*", help="Only packages of such a producer.")
@click.option("--class", "retention_class", metavar="PATTERN", default="*", help="Only of such a retention class.")
@click.option("--older-than", type=DURATION, help="Published longer ago than that, for example 90d.")
@click.option("--newer-than", type=DURATION, help="Published since.")
@click.option("--larger-than", type=SIZE, help="Of more bytes, for example 1GiB.")
@click.option("--smaller-than", type=SIZE, help="Of fewer bytes.")
@json_option
@common_options
@click.pass_obj
def list_packages(session: Session, /, as_json: bool, **filters: Any) -> None:
    """List published packages, by name and time of publish: all, or those that every filter lets through.

    A PATTERN is shell-style.

    Example: castore package list --class nightly --older-than 30d
    """
    from castore.catalog.reader import CatalogReader

    with CatalogReader.open(session.config().store.catalog_path) as reader:
        found = [package for package in reader.packages() if _is_wanted(package, **filters)]
    if as_json:
        print_json({"packages": [_package_document(package) for package in found]})
        return
    header = ("REF", "FILES", "SIZE", "PUBLISHED", "PRODUCER", "CLASS", "BACKENDS")
    if found:
        print_columns([header, *map(_package_row, found)], right=(1, 2))
    else:
        click.echo("no packages are published" if all(map(_is_unset, filters.values())) else "no such packages")


def _is_unset(value: Any) -> bool:
    return value in (None, "*")


def _is_wanted(
    package: Package,
    *,
    name: str,
    producer: str,
    retention_class: str,
    older_than: float | None,
    newer_than: float | None,
    larger_than: int | None,
    smaller_than: int | None,
) -> bool:
    age = (time.time_ns() - package.published_at_ns) / 1e9
    return (
        fnmatchcase(package.name, name)
        and fnmatchcase(package.producer, producer)
        and fnmatchcase(package.retention_class, retention_class)
        and (older_than is None or age > older_than)
        and (newer_than is None or age < newer_than)
        and (larger_than is None or package.size_bytes > larger_than)
        and (smaller_than is None or package.size_bytes < smaller_than)
    )


@command.command("show")
@click.argument("ref", type=REF)
@click.option("--files", is_flag=True, help="List every entry, too.")
@json_option
@common_options
@click.pass_obj
def show(session: Session, ref: str, files: bool, as_json: bool) -> None:
    """Show the package REF, written NAME/VERSION or NAME/latest: where it is stored, and what it shares with others.

    Example: castore package show zlib/latest --files
    """
    from castore.catalog.package_tree import TreeReader

    name, version = parse_ref(ref, allow_latest=True)
    with TreeReader(session.config().store.catalog_path) as reader:
        package = reader.package(name, version)
        if package is None:
            raise NotFound(f"{ref}: no such package is published")
        document = _package_document(package) | _storage_document(reader, package)
        if as_json:
            if files:
                entries = reader.walk(package.root_id)
                document["entries"] = [_entry_document(path, entry) for path, entry in entries]
            print_json(document)
            return
        _print_package(package, document)
        if files:
            click.echo()
            # Written as they come: a package may have millions.
            for path, entry in reader.walk(package.root_id):
                click.echo(_entry_line(path, entry))


def _storage_document(reader: TreeReader, package: Package) -> dict[str, Any]:
    shared = reader.shared(package.root_id)
    manifest = reader.blob_by_digest(package.manifest_digest)
    states = reader.location_states(package.root_id, manifest.blob_id if manifest else 0)
    return {
        "blob_count": shared.blob_count,
        "blob_bytes": shared.blob_bytes,
        "shared_blob_count": shared.shared_count,
        "shared_blob_bytes": shared.shared_bytes,
        "locations": [
            {"backend_id": backend_id, "status": str(status), "location_count": count, "size_bytes": size_bytes}
            for backend_id, status, count, size_bytes in states
        ],
    }


@command.command("publish")
@click.argument("ref")
@json_option
@common_options
@click.pass_obj
def publish(session: Session, ref: str, as_json: bool) -> None:
    """Wait until all of ingest/REF is stored, then publish it.

    Example: castore package publish zlib/1.3
    """
    name, version = parse_ref(ref)
    client = ControlClient(session.config().store.control_path)
    with progress(f"storing {ref}") as show_progress:

        def on_progress(snapshot: dict[str, Any]) -> None:
            if snapshot.get("total_files"):
                show_progress(
                    done_bytes=int(snapshot.get("stored_bytes", 0)),
                    total_bytes=int(snapshot.get("total_bytes", 0)),
                    files=f"{snapshot.get('stored_files', 0)} of {snapshot['total_files']} files",
                )

        result = client.call("publish", on_progress, ref=f"{name}/{version}")
    if as_json:
        print_json(result)
    else:
        click.echo(f"published {ref}")


for _part in (import_package, export_package, sums, diff, delete, restore, deleted, tag):
    command.add_command(_part)


def _package_document(package: Package) -> dict[str, Any]:
    return {
        "ref": package.ref,
        "name": package.name,
        "version": package.version,
        "producer": package.producer,
        "retention_class": package.retention_class,
        "publisher_uid": package.publisher_uid,
        "published_at_ns": package.published_at_ns,
        "file_count": package.file_count,
        "size_bytes": package.size_bytes,
        "manifest_digest": str(package.manifest_digest),
        "backend_ids": list(package.backend_ids),
    }


def _package_row(package: Package) -> tuple[str, ...]:
    return (
        package.ref,
        str(package.file_count),
        format_bytes(package.size_bytes),
        format_time_ns(package.published_at_ns),
        printable(package.producer),
        printable(package.retention_class),
        printable(",".join(package.backend_ids)),
    )


def _print_package(package: Package, document: dict[str, Any]) -> None:
    blobs = f"{document['blob_count']} blobs, {format_bytes(document['blob_bytes'])}"
    shared = f"{document['shared_blob_count']}, {format_bytes(document['shared_blob_bytes'])}"
    rows = [
        ("ref", package.ref),
        ("producer", printable(package.producer)),
        ("retention class", printable(package.retention_class)),
        ("published", f"{format_time_ns(package.published_at_ns)} by uid {package.publisher_uid}"),
        ("files", str(package.file_count)),
        ("size", format_bytes(package.size_bytes)),
        ("stored as", f"{blobs}; shared with other packages: {shared}"),
        ("manifest", str(package.manifest_digest)),
        ("backends", printable(", ".join(package.backend_ids))),
    ]
    for state in document["locations"]:
        count = f"{state['location_count']} objects, {format_bytes(state['size_bytes'])}"
        rows.append((f"in {printable(state['backend_id'])}", f"{state['status']}: {count}"))
    print_columns(rows)


def _entry_document(path: bytes, entry: Entry) -> dict[str, Any]:
    document: dict[str, Any] = {
        **text_fields("path", path),
        "kind": entry.kind.name.lower(),
        "mode": f"{entry.mode:04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "mtime_ns": entry.mtime_ns,
        "size_bytes": entry.size_bytes,
    }
    if entry.target:
        document |= text_fields("target", entry.target)
    return document


def _entry_line(path: bytes, entry: Entry) -> str:
    from castore.catalog.records import Kind

    kind = {Kind.DIRECTORY: stat.S_IFDIR, Kind.FILE: stat.S_IFREG, Kind.SYMLINK: stat.S_IFLNK}[entry.kind]
    target = f" -> {printable(entry.target)}" if entry.kind is Kind.SYMLINK else ""
    return (
        f"{stat.filemode(kind | entry.mode)}  {format_bytes(entry.size_bytes):>9}  "
        f"{format_time_ns(entry.mtime_ns)}  {printable(path)}{target}"
    )
