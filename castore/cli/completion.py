"""`castore completion`: prints what makes a shell complete castore's commands and options. Installs nothing."""

from __future__ import annotations

from typing import Final

import click

from castore.cli.session import common_options

_SHELLS: Final = ("bash", "zsh", "fish")
PROGRAM: Final = "castore"
VARIABLE: Final = "_CASTORE_COMPLETE"
"""What the printed script sets when it asks for completions; `click` looks for it by the program's name."""


@click.command("completion")
@click.argument("shell", type=click.Choice(_SHELLS))
@common_options
def command(shell: str) -> None:
    """Print what completes commands and options in SHELL: put it where the shell reads it.

    Example: castore completion bash >~/.local/share/bash-completion/completions/castore
    """
    from click.shell_completion import get_completion_class

    from castore.cli.main import root

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root, {}, PROGRAM, VARIABLE).source())
