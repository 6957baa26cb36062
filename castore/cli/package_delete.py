"""`castore package delete`, `restore` and `deleted`: packages that go for good only with a later garbage collection."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from castore.cli.completing import DELETED_REF, REF
from castore.cli.output import format_bytes, format_seconds, format_time_ns, print_columns, print_json, printable
from castore.cli.session import Session, common_options, json_option
from castore.errors import NotFound
from castore.registry.names import parse_ref

if TYPE_CHECKING:
    from castore.catalog.deleting import DeletedPackage
    from castore.catalog.records import Package
    from castore.config import Config

_NOT_AGREED = 1


@click.command("delete")
@click.argument("refs", metavar="REF...", type=REF, nargs=-1, required=True)
@click.option("--yes", "is_sure", is_flag=True, help="Do not ask.")
@json_option
@common_options
@click.pass_obj
def delete(session: Session, refs: tuple[str, ...], is_sure: bool, as_json: bool) -> int:
    """Delete packages. They can be restored until a garbage collection after `retention.restore_within`.

    Every mount stops showing them within a second; files that are open read on.

    Example: castore package delete zlib/1.2 zlib/1.3-rc1
    """
    from castore.catalog.reader import CatalogReader
    from castore.catalog.writer import CatalogWriter
    from castore.registry.deletion import delete_package

    config = session.config()
    names = [parse_ref(ref) for ref in refs]
    with CatalogReader.open(config.store.catalog_path) as reader:
        packages = [_package(reader.package(*name), ref) for name, ref in zip(names, refs, strict=True)]
    if not (is_sure or _agrees(packages)):
        return _NOT_AGREED
    seconds = config.retention.restore_within_seconds
    with contextlib.closing(CatalogWriter(config.store.catalog_path)) as writer:
        for name, version in dict.fromkeys(names):
            writer.run_sync(
                partial(
                    delete_package,
                    name=name,
                    version=version,
                    uid=os.getuid(),
                    restore_within_seconds=seconds,
                    reason="request",
                )
            )
            if not as_json:
                mend = f"castore package restore {name}/{version}"
                click.echo(f"deleted {name}/{version}; for {format_seconds(seconds)} at least, this undoes it: {mend}")
    if as_json:
        print_json({"deleted": [package.ref for package in packages], "restore_within_seconds": seconds})
    return 0


def _package(package: Package | None, ref: str) -> Package:
    if package is None:
        raise NotFound(f"{ref}: no such package is published")
    if package.ref != ref:
        raise NotFound(f"{ref}: a tag of {package.ref}, and no version; `castore package tag --remove` removes tags")
    return package


def _agrees(packages: list[Package]) -> bool:
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask at: give --yes")
    for package in packages:
        click.echo(f"{package.ref}: {package.file_count} files, {format_bytes(package.size_bytes)}", err=True)
    which = packages[0].ref if len(packages) == 1 else f"these {len(packages)} packages"
    return click.confirm(f"Delete {which}?", err=True)


@click.command("restore")
@click.argument("ref", type=DELETED_REF)
@json_option
@common_options
@click.pass_obj
def restore(session: Session, ref: str, as_json: bool) -> None:
    """Show a deleted package again, as it was: the one of that name that was deleted last.

    Example: castore package restore zlib/1.2
    """
    from castore.catalog.writer import CatalogWriter
    from castore.registry.deletion import restore_package

    name, version = parse_ref(ref)
    with contextlib.closing(CatalogWriter(session.config().store.catalog_path)) as writer:
        writer.run_sync(partial(restore_package, name=name, version=version, uid=os.getuid()))
    if as_json:
        print_json({"restored": ref})
    else:
        click.echo(f"restored {ref}")


@click.command("deleted")
@json_option
@common_options
@click.pass_obj
def deleted(session: Session, as_json: bool) -> None:
    """List the deleted packages that are not gone yet, in the order of their deletion.

    Example: castore package deleted
    """
    from castore.catalog.deleting import DeletedReader

    config = session.config()
    with DeletedReader(config.store.catalog_path) as reader:
        found = reader.deleted_packages(time.time_ns() + 1)
    if as_json:
        print_json({"deleted": [_document(config, one) for one in found]})
    elif found:
        header = ("REF", "SIZE", "DELETED", "BY UID", "RESTORABLE")
        print_columns([header, *(_row(config, one) for one in found)], right=(1,))
    else:
        click.echo("no deleted packages")


def _until_ns(config: Config, one: DeletedPackage) -> int:
    return one.deleted_at_ns + int(config.retention.restore_within_seconds * 1e9)


def _row(config: Config, one: DeletedPackage) -> tuple[str, ...]:
    until_ns = _until_ns(config, one)
    if one.is_purging:
        restorable = "no: it is being removed"
    elif until_ns < time.time_ns():
        restorable = "until the next garbage collection"
    else:
        restorable = f"until {format_time_ns(until_ns)}"
    size = format_bytes(one.package.size_bytes)
    return printable(one.package.ref), size, format_time_ns(one.deleted_at_ns), str(one.deleted_by_uid), restorable


def _document(config: Config, one: DeletedPackage) -> dict[str, Any]:
    return {
        "ref": one.package.ref,
        "size_bytes": one.package.size_bytes,
        "retention_class": one.package.retention_class,
        "published_at_ns": one.package.published_at_ns,
        "deleted_at_ns": one.deleted_at_ns,
        "deleted_by_uid": one.deleted_by_uid,
        "restorable_until_ns": _until_ns(config, one),
        "is_restorable": not one.is_purging,
    }
