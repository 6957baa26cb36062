"""What every command shares: the options that are allowed everywhere, and the configuration they select."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from castore.config import Config

LOG_LEVELS: Final = ("debug", "info", "warning", "error")

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(slots=True)
class Session:
    """One run of the command line: what was given before or after the command's name; the last one counts."""

    config_path: Path | None = None
    log_level: str | None = None

    def config(self) -> Config:
        """The configuration that is in effect. Raises ConfigError."""
        from castore.config import load_config

        return load_config(self.config_path, os.environ)


def _keep_config(context: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.ensure_object(Session).config_path = value


def _keep_log_level(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        import logging

        context.ensure_object(Session).log_level = value
        logging.basicConfig(
            stream=sys.stderr, level=value.upper(), format="%(levelname)s %(name)s: %(message)s", force=True
        )


def _keep_debug(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    _keep_log_level(context, parameter, "debug" if value else None)


def common_options(command: _Command) -> _Command:
    """Give a command `--config`, `--log-level` and `--debug`; their values go to the session."""
    config = click.option(
        "--config",
        metavar="PATH",
        type=click.Path(path_type=Path),
        callback=_keep_config,
        expose_value=False,
        help="The castore.toml to use.  [default: $CASTORE_CONFIG, the user's, /etc/castore's, else built in]",
    )
    log_level = click.option(
        "--log-level",
        type=click.Choice(LOG_LEVELS),
        callback=_keep_log_level,
        expose_value=False,
        help="Log to standard error from this level on; debug adds a traceback to errors.",
    )
    debug = click.option(
        "--debug",
        is_flag=True,
        callback=_keep_debug,
        expose_value=False,
        help="The same as --log-level debug.",
    )
    return config(log_level(debug(command)))


def json_option(command: _Command) -> _Command:
    """Give a command `--json`, passed on as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


class _Folder(click.ParamType[Any]):
    """A path that nothing here looks at; the shell completes it."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="dir")]


def mountpoint_argument(command: _Command) -> _Command:
    """Give a command the argument MNT, passed on as `mountpoint`, a path.

    It is taken as it is: `click.Path` would `stat` it, and a mount whose daemon hangs never answers that.
    """
    return click.argument(
        "mountpoint", metavar="MNT", type=_Folder(), callback=lambda _context, _parameter, value: Path(value)
    )(command)
