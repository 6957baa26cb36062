"""`castore package`: list and show from the catalog, publish by the daemon. Applies no rule of the registry itself."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from castore.api.control_client import ControlClient
from castore.cli.output import format_bytes, format_time_ns, print_columns, print_json, printable, text_fields
from castore.cli.package_import import import_package
from castore.cli.progress import progress
from castore.cli.session import Session, common_options, json_option
from castore.errors import NotFound
from castore.registry.names import parse_ref

if TYPE_CHECKING:
    from castore.catalog.reader import CatalogReader
    from castore.catalog.records import Entry, Package

_PAGE_ENTRIES: Final = 1000
"""Entries fetched by one query: keeps memory flat in a directory of any size."""


@click.group("package")
@common_options
def command() -> None:
    """List, show and publish packages."""


@command.command("list")
@json_option
@common_options
@click.pass_obj
def list_packages(session: Session, as_json: bool) -> None:
    """List all published packages, by name and time of publish."""
    from castore.catalog.reader import CatalogReader

    with CatalogReader.open(session.config().store.catalog_path) as reader:
        if as_json:
            print_json({"packages": [_package_document(package) for package in reader.packages()]})
            return
        rows = [_package_row(package) for package in reader.packages()]
    header = ("REF", "FILES", "SIZE", "PUBLISHED", "PRODUCER", "CLASS", "BACKENDS")
    if rows:
        print_columns([header, *rows], right=(1, 2))
    else:
        click.echo("no packages are published")


@command.command("show")
@click.argument("ref")
@click.option("--files", is_flag=True, help="List every entry, too.")
@json_option
@common_options
@click.pass_obj
def show(session: Session, ref: str, files: bool, as_json: bool) -> None:
    """Show the package REF, written NAME/VERSION or NAME/latest."""
    from castore.catalog.reader import CatalogReader

    name, version = parse_ref(ref, allow_latest=True)
    with CatalogReader.open(session.config().store.catalog_path) as reader:
        package = reader.package(name, version)
        if package is None:
            raise NotFound(f"{ref}: no such package is published")
        document = _package_document(package)
        if as_json:
            if files:
                document["entries"] = [_entry_document(path, entry) for path, entry in _walk(reader, package.root_id)]
            print_json(document)
            return
        _print_package(package)
        if files:
            click.echo()
            # Written as they come: a package may have millions.
            for path, entry in _walk(reader, package.root_id):
                click.echo(_entry_line(path, entry))


@command.command("publish")
@click.argument("ref")
@json_option
@common_options
@click.pass_obj
def publish(session: Session, ref: str, as_json: bool) -> None:
    """Wait until all of ingest/REF is stored, then publish it."""
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


command.add_command(import_package)


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


def _print_package(package: Package) -> None:
    print_columns(
        [
            ("ref", package.ref),
            ("producer", printable(package.producer)),
            ("retention class", printable(package.retention_class)),
            ("published", f"{format_time_ns(package.published_at_ns)} by uid {package.publisher_uid}"),
            ("files", str(package.file_count)),
            ("size", format_bytes(package.size_bytes)),
            ("manifest", str(package.manifest_digest)),
            ("backends", printable(", ".join(package.backend_ids))),
        ]
    )


def _walk(reader: CatalogReader, root_id: int) -> Iterator[tuple[bytes, Entry]]:
    """Every entry below a package's root with its path, a directory before what is in it. Memory grows with depth."""
    from castore.catalog.records import Kind

    # One page of children for each directory on the way down.
    pending = [(b"", _children(reader, root_id))]
    while pending:
        prefix, children = pending[-1]
        entry = next(children, None)
        if entry is None:
            pending.pop()
            continue
        yield prefix + entry.name, entry
        if entry.kind is Kind.DIRECTORY:
            pending.append((prefix + entry.name + b"/", _children(reader, entry.inode)))


def _children(reader: CatalogReader, parent_id: int) -> Iterator[Entry]:
    after = 0
    while page := reader.children(parent_id, after, _PAGE_ENTRIES):
        yield from page
        after = page[-1].entry_id


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
