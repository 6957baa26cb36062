"""`castore retention apply`: shows what the rules of retention let go, and with `--delete` deletes it. Has no rules."""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from castore.cli.output import format_bytes, format_seconds, print_columns, print_json, printable
from castore.cli.session import Session, common_options, json_option

if TYPE_CHECKING:
    from castore.registry.retention import Expired


@click.group("retention")
@common_options
def command() -> None:
    """Apply the rules of [[retention.rules]]."""


@command.command("apply")
@click.option("--delete", "--yes", "deletes", is_flag=True, help="Do it, instead of showing what would be done.")
@json_option
@common_options
@click.pass_obj
def apply(session: Session, deletes: bool, as_json: bool) -> None:
    """Delete the packages that the rules do not keep. Dry by default.

    They can be restored as any deleted package can, and go for good with `castore storage gc`.

    Example: castore retention apply, then castore retention apply --delete
    """
    from castore.catalog.reader import CatalogReader
    from castore.catalog.writer import CatalogWriter
    from castore.registry.retention import delete_expired, expired_packages

    config = session.config()
    settings = config.retention
    with CatalogReader.open(config.store.catalog_path) as reader:
        found = list(expired_packages(reader, settings))
    if deletes:
        names = list(dict.fromkeys(one.package.name for one in found))
        found = []
        # A transaction for each NAME: what is kept of it is decided by what is there then.
        with contextlib.closing(CatalogWriter(config.store.catalog_path)) as writer:
            for name in names:
                work = partial(delete_expired, name=name, settings=settings, uid=os.getuid())
                found += writer.run_sync(work)
    if as_json:
        print_json({"deletes": deletes, "packages": [_document(one) for one in found]})
        return
    if found:
        print_columns([("REF", "SIZE", "AGE", "CLASS", "RULE"), *map(_row, found)], right=(1,))
    size = format_bytes(sum(one.package.size_bytes for one in found))
    if not settings.rules:
        click.echo("no [[retention.rules]] are configured: all packages are kept")
    elif deletes:
        click.echo(f"deleted {len(found)} packages, {size}; castore package restore undoes it")
    else:
        click.echo(f"{len(found)} packages, {size}; nothing is deleted: give --delete")


def _age_seconds(one: Expired) -> float:
    return (time.time_ns() - one.package.published_at_ns) / 1e9


def _row(one: Expired) -> tuple[str, ...]:
    package = one.package
    age = _age_seconds(one)
    shown = f"{age / 86400:.0f} d" if age > 2 * 86400 else format_seconds(age)
    return package.ref, format_bytes(package.size_bytes), shown, printable(package.retention_class), str(one.rule + 1)


def _document(one: Expired) -> dict[str, Any]:
    package = one.package
    return {
        "ref": package.ref,
        "size_bytes": package.size_bytes,
        "retention_class": package.retention_class,
        "producer": package.producer,
        "published_at_ns": package.published_at_ns,
        "rule": one.rule + 1,
    }
