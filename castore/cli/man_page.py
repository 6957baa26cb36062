"""The man page castore(1), made from the commands' own help. `scripts/man-page` writes it; no command of castore's."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Final

import click

from castore.cli.main import root

_OF_EVERY_COMMAND: Final = frozenset({"--help", "--config", "--log-level", "--debug"})
_END: Final = r"""
.SH EXIT STATUS
0: done. 1: found something bad. 2: could not run. 130: interrupted. 141: the reader of the output went away.
.SH ENVIRONMENT
.TP
CASTORE_CONFIG
The file of settings, where no \fB\-\-config\fR is given.
.TP
NO_COLOR
Progress is shown without colours when this is set.
.SH SEE ALSO
mount(8), fusermount3(1)
"""


def man_page() -> str:
    """The page in the language of man(7)."""
    parts = [
        '.TH CASTORE 1 "" "castore" "User Commands"',
        ".SH NAME",
        r"castore \- " + _text(_help(root)[0].rstrip(".")),
    ]
    parts += [".SH SYNOPSIS", r"\fBcastore\fR [OPTIONS] COMMAND [ARGS]...", ".SH COMMANDS"]
    for words, command in _leaves(root, ("castore",)):
        context = click.Context(command, info_name=" ".join(words))
        usage = " ".join(piece for piece in command.collect_usage_pieces(context))
        parts += [rf".SS \fB{_text(' '.join(words))}\fR {_text(usage)}"]
        for index, paragraph in enumerate(_help(command)):
            parts += [".PP"] if index else []
            parts.append(_text(paragraph))
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if (
                record is not None
                and record[1]
                and not {"--help", "--config", "--log-level", "--debug"} & set(parameter.opts)
            ):
                parts += [".TP", rf"\fB{_text(record[0])}\fR", _text(record[1])]
    parts.append(".SH OPTIONS OF EVERY COMMAND")
    for parameter in root.get_params(click.Context(root, info_name="castore")):
        record = parameter.get_help_record(click.Context(root, info_name="castore"))
        if record is not None:
            parts += [".TP", rf"\fB{_text(record[0])}\fR", _text(record[1])]
    return "\n".join(parts) + _END


def _leaves(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        yield words, command
        return
    context = click.Context(command, info_name=words[-1])
    for name in sorted(command.list_commands(context)):
        found = command.get_command(context, name)
        if found is not None:
            yield from _leaves(found, (*words, name))


def _help(command: click.Command) -> list[str]:
    """The paragraphs of a command's help, each in one line."""
    paragraphs = inspect.cleandoc(command.help or "").replace("\b", "").split("\n\n")
    return [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]


def _text(text: str) -> str:
    """Text that means itself: no request of the formatter's, no escape, one line."""
    safe = " ".join(text.split()).replace("\\", r"\e").replace("-", r"\-").replace("`", r"\(ga")
    return re.sub(r"^([.'])", r"\\&\1", safe)


if __name__ == "__main__":
    sys.stdout.write(man_page())
