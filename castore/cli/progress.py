"""Progress of a long command on standard error: a bar on a terminal, plain lines elsewhere. Results go elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import click

from castore.cli.output import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

_LINE_SECONDS: Final = 2.0
"""Between plain lines: a log of an hour's upload stays readable."""


class ShowProgress(Protocol):
    """Takes a snapshot of how far a command is."""

    def __call__(self, *, done_bytes: int, total_bytes: int, files: str) -> None:
        """`files` is the part of the line that counts files, in words."""

    def say(self, line: str) -> None:
        """Write a line of the result to standard output now, whole, wherever the progress is shown."""


_PAGE_BYTES: Final = 4096


def of_pages(show: ShowProgress) -> Callable[[int, int], None]:
    """What takes the reports of a copy of a database."""
    return lambda done, total: show(
        done_bytes=done * _PAGE_BYTES, total_bytes=total * _PAGE_BYTES, files=f"{total} pages"
    )


@contextmanager
def progress(title: str) -> Iterator[ShowProgress]:
    """Show snapshots under a title while inside. Nothing is shown before the first one."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        with _bar(title) as show:
            yield show
    else:
        yield _Lines(title)


class _Lines:
    """A line for each snapshot that differs from the last one, some seconds apart."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._last_line = ""
        self._next_time = 0.0

    def __call__(self, *, done_bytes: int, total_bytes: int, files: str) -> None:
        line = f"{self._title}: {format_bytes(done_bytes)} of {format_bytes(total_bytes)}, {files}"
        now = time.monotonic()
        if line != self._last_line and now >= self._next_time:
            print(line, file=sys.stderr, flush=True)
            self._last_line, self._next_time = line, now + _LINE_SECONDS

    def say(self, line: str) -> None:
        click.echo(line)


@contextmanager
def _bar(title: str) -> Iterator[ShowProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[files]}", markup=False),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # Not redirected: rich would send standard output to where the bar is, also when it is a file.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        yield _Bar(bar, title)


class _Bar:
    """A bar, with lines above it."""

    def __init__(self, bar: Progress, title: str) -> None:
        self._bar = bar
        self._task = bar.add_task(title, total=None, visible=False, files="")

    def __call__(self, *, done_bytes: int, total_bytes: int, files: str) -> None:
        self._bar.update(self._task, completed=done_bytes, total=total_bytes, files=files, visible=True)

    def say(self, line: str) -> None:
        if sys.stdout.isatty():
            self._bar.console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            click.echo(line)
