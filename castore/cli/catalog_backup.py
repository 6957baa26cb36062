"""`castore catalog backup`: writes a proved copy of the catalog beside whoever uses it."""

from __future__ import annotations

import signal
from dataclasses import asdict
from pathlib import Path

import click

from castore.cli.output import format_bytes, print_json, printable
from castore.cli.progress import of_pages, progress
from castore.cli.session import Session, common_options, json_option


@click.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@common_options
@click.pass_obj
def backup(session: Session, file: Path, as_json: bool) -> int:
    """Write the catalog to FILE, as of one moment, beside a daemon that writes.

    The copy is read back and checked, then takes the place of FILE at once; until then an older backup stays. It is a
    catalog itself: to restore it, end the daemon and put it in the place of catalog.db.

    Example: castore catalog backup /srv/backup/catalog.db
    """
    from castore.catalog.backup import BackupReader

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with BackupReader(session.config().store.catalog_path) as reader, progress("backing up") as show:
        made = reader.back_up(file.absolute(), of_pages(show))
    if as_json:
        print_json({**asdict(made), "path": str(made.path)})
    else:
        click.echo(
            f"{printable(str(made.path))}: {made.package_count} packages, {format_bytes(made.size_bytes)}, checked"
        )
    return 0
