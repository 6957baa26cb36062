"""`castore catalog`: the database of facts. The group; each command is a module of its own."""

from __future__ import annotations

import click

from castore.cli.catalog_backup import backup
from castore.cli.catalog_check import check
from castore.cli.catalog_rebuild import rebuild
from castore.cli.session import common_options


@click.group("catalog")
@common_options
def command() -> None:
    """Prove the catalog, back it up, or rebuild it from a backend."""


command.add_command(check)
command.add_command(backup)
command.add_command(rebuild)
