"""The `castore` command: finds commands, and turns every error into one line and an exit code. Does no work itself.

Exit codes: 0 done, 1 found something bad, 2 could not run, 130 interrupted, 141 the reader of the output went away.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from castore import __version__
from castore.cli.session import Session, common_options
from castore.errors import CastoreError

COULD_NOT_RUN: Final = 2
_INTERRUPTED: Final = 128 + 2
_OUTPUT_CLOSED: Final = 128 + 13
"""As a shell reports a process that SIGINT or SIGPIPE ended."""

_COMMANDS: Final = (
    *("init", "mount", "umount", "status", "doctor"),
    *("package", "storage", "retention", "events", "cache", "catalog", "serve", "completion"),
)
"""Each is the object `command` of the module of that name, imported when it is needed."""


class _OutputClosedError(Exception):
    """Standard output or error is a pipe that nobody reads any more."""


class _Root(click.Group):
    """Imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command = importlib.import_module(f"castore.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:
            # click would exit with 1, which here means "found something bad".
            raise _OutputClosedError from exc


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="castore", message="%(prog)s %(version)s")
@common_options
def root() -> None:
    """A content-addressed file system: published packages as read-only directories."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of the process, and return its exit code."""
    session = Session()
    try:
        code = root.main(args=arguments, prog_name="castore", standalone_mode=False, obj=session)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.Abort:
        return _INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        return COULD_NOT_RUN
    except click.UsageError as exc:
        command = exc.ctx.command_path if exc.ctx is not None else "castore"
        _fail(f"{exc.format_message().rstrip('.')}; see `{command} --help`", exc, session)
        return COULD_NOT_RUN
    except click.ClickException as exc:
        _fail(exc.format_message(), exc, session)
        return COULD_NOT_RUN
    except (_OutputClosedError, BrokenPipeError):
        # The interpreter flushes at exit: let it flush to where that cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _OUTPUT_CLOSED
    except CastoreError as exc:
        _fail(str(exc), exc, session)
        return COULD_NOT_RUN
    except OSError as exc:
        _fail(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc), exc, session)
        return COULD_NOT_RUN
    except Exception as exc:
        import traceback

        traceback.print_exc()
        _fail(f"failed unexpectedly, which is a defect of castore: {type(exc).__name__}: {exc}", exc, Session())
        return COULD_NOT_RUN


def _fail(message: str, error: Exception, session: Session) -> None:
    if session.log_level == "debug":
        import traceback

        traceback.print_exception(error)
    print("castore: error:", " ".join(message.split("\n")), file=sys.stderr)
