"""`castore completion`: prints what makes a shell complete castore's commands and options. Installs nothing."""

from __future__ import annotations

from typing import Final

import click

from castore.cli.session import common_options

_SHELLS: Final = ("bash", "zsh", "fish")
PROGRAM: Final = "castore"
VARIABLE: Final = "_CASTORE_COMPLETE"
"""What the printed script sets when it asks for completions; `click` looks for it by the program's name."""

_ONCE_ONLY: Final = "[[ $zsh_eval_context[-1] == loadautofunc ]]"
_WHILE_COMPLETING: Final = "(( ${+compstate} ))"
"""Whether a file of zsh's fpath is asked for completions, or read by `source`. What click writes holds when the file is
loaded, so only the first time: the second TAB of a shell would do nothing. zshcompwid(1) has `compstate` while a widget
completes."""


@click.command("completion")
@click.argument("shell", type=click.Choice(_SHELLS))
@common_options
def command(shell: str) -> None:
    """Print what completes commands, options, packages and backends in SHELL: put it where the shell reads it.

    That is ~/.config/fish/completions/castore.fish for fish, and for zsh a file _castore in a folder of its fpath, read
    by compinit.

    Example: castore completion bash >~/.local/share/bash-completion/completions/castore
    """
    from click.shell_completion import get_completion_class

    from castore.cli.main import root

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(root, {}, PROGRAM, VARIABLE).source().replace(_ONCE_ONLY, _WHILE_COMPLETING))
