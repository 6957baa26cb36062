"""The command line as such: help, usage, options that are allowed everywhere, errors and exit codes."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import trio

from castore import __version__
from castore.api.control import Report
from castore.cli.main import root
from castore.errors import PublishBusy
from tests.cli.conftest import WAIT_SECONDS, Cli, Serve
from tests.test_docs import parse_command

COMMANDS: list[tuple[str, ...]] = [("init",), ("mount",), ("umount",), ("status",), ("package",)]
COMMANDS += [("package", "list"), ("package", "show"), ("package", "publish")]
COMMANDS += [
    ("storage",),
    ("storage", "backends"),
    ("storage", "verify"),
    ("storage", "probe"),
    ("storage", "replicate"),
    ("storage", "retire"),
    ("events",),
    ("serve",),
]


def test_help_names_all_commands(cli: Cli) -> None:
    for option in ("--help", "-h"):
        text = cli(option).stdout
        assert text.startswith("Usage: castore [OPTIONS] COMMAND")
        for name in ("init", "mount", "umount", "status", "package", "storage", "events", "serve"):
            assert f"\n  {name} " in text


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_a_command(cli: Cli, command: tuple[str, ...]) -> None:
    text = cli(*command, "--help").stdout
    assert text.startswith(f"Usage: castore {' '.join(command)} ")
    assert "--config PATH" in text
    assert ("--json" in text) == (command not in (("package",), ("storage",)))


def leaves(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with its words."""
    if not isinstance(command, click.Group):
        yield words, command
        return
    context = click.Context(command, info_name=words[-1])
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from leaves(found, (*words, name))


LEAVES = [pytest.param(*leaf, id=" ".join(leaf[0])) for leaf in leaves(root, ("castore",))]


@pytest.mark.parametrize(("words", "command"), LEAVES)
def test_help_has_an_example_that_is_real(words: tuple[str, ...], command: click.Command) -> None:
    (example,) = re.findall(r"^Example: (.*)$", inspect.cleandoc(command.help or ""), flags=re.MULTILINE)
    for line in example.split(", then "):
        arguments = shlex.split(re.split(r" [|>]", line)[0])  # up to what is the shell's own
        assert tuple(arguments[: len(words)]) == words
        parse_command(arguments)


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"castore {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mounts",), "No such command 'mounts'"),
        (("package", "ls"), "No such command 'ls'"),
        (("mount",), "Missing argument 'MNT'"),
        (("mount", "a", "b"), "unexpected extra argument"),
        (("package", "show"), "Missing argument 'REF'"),
        (("status", "--verbose"), "No such option"),
        (("--log-level", "loud", "status"), "'loud' is not one of"),
    ],
)
def test_usage_errors(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    said = cli.error(*arguments)
    assert words in said
    assert re.search(r"; see `castore[a-z ]* --help`$", said), said


def test_no_command_shows_help(cli: Cli) -> None:
    done = cli(code=2)
    assert "Usage: castore [OPTIONS] COMMAND" in done.stdout + done.stderr


def test_config_is_an_option_everywhere(cli: Cli, tmp_path: Path) -> None:
    wrong, right = tmp_path / "wrong.toml", tmp_path / "right.toml"
    wrong.write_text("nonsense = 1\n")
    cli("init", "--config", right, "--state-dir", tmp_path / "state")
    cli("--config", right, "package", "list")
    cli("package", "--config", right, "list")
    # The last one counts, and any one counts for more than the variable.
    cli("--config", wrong, "package", "list", "--config", right, env={**cli.environ, "CASTORE_CONFIG": str(wrong)})
    cli("package", "list", env={**cli.environ, "CASTORE_CONFIG": str(right)})
    assert cli.error("package", "list", "--config", wrong).startswith(f"{wrong}: nonsense = 1: unknown key")


def test_an_error_is_one_line_and_a_traceback_only_for_debug(cli: Cli, tmp_path: Path) -> None:
    missing = tmp_path / "a\nb.toml"
    line = cli.error("status", "--config", missing)
    assert line == f"{tmp_path}/a b.toml: cannot be read: No such file or directory"
    for arguments in (("--log-level", "debug", "status"), ("status", "--log-level", "debug"), ("status", "--debug")):
        done = cli("--config", missing, *arguments, code=2)
        assert "Traceback" in done.stderr
        assert done.stderr.endswith(f"castore: error: {line}\n")


def test_errors_of_the_operating_system_are_one_line_too(cli: Cli, tmp_path: Path) -> None:
    cli("init", "--state-dir", tmp_path / "state")
    (tmp_path / "state/log").write_text("")
    assert cli.error("mount", tmp_path, "--background") == f"{tmp_path}/state/log: File exists"


def test_errors_of_the_daemon(cli: Cli, serve: Serve, tmp_path: Path) -> None:
    async def publish(params: dict[str, Any], report: Report) -> dict[str, Any]:
        raise PublishBusy(f"{params['ref']}: 3 files are open for writing")

    cli("init", "--state-dir", tmp_path / "state")
    serve(tmp_path / "state/run/control.sock", {"publish": publish})
    assert cli.error("package", "publish", "zlib/1.3") == "zlib/1.3: 3 files are open for writing"
    assert cli.error("status").startswith("unknown command 'status'; this daemon knows: publish")


def test_interrupt(cli: Cli, serve: Serve, tmp_path: Path) -> None:
    entered, cancelled = threading.Event(), threading.Event()

    async def publish(params: dict[str, Any], report: Report) -> dict[str, Any]:
        entered.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()

    cli("init", "--state-dir", tmp_path / "state")
    serve(tmp_path / "state/run/control.sock", {"publish": publish})
    with cli.start("package", "publish", "zlib/1.3", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert entered.wait(WAIT_SECONDS)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130
    assert (stdout, stderr.strip()) == ("", "")
    assert cancelled.wait(WAIT_SECONDS)


def test_a_reader_that_goes_away(cli: Cli, tmp_path: Path) -> None:
    cli("init", "--state-dir", tmp_path / "state")
    for arguments in (("package", "list"), ("package", "list", "--json"), ("init",)):
        read_end, write_end = os.pipe()
        os.close(read_end)
        with cli.start(*arguments, stdout=write_end, stderr=subprocess.PIPE) as process:
            os.close(write_end)
            _, stderr = process.communicate(timeout=WAIT_SECONDS)
        assert (process.returncode, stderr) == (141, "")


def test_it_runs_without_a_home_of_configuration(cli: Cli) -> None:
    """The built-in defaults: nothing is there, nothing is made, and the line says what to do."""
    line = cli.error("status")
    assert "run `castore init`" in line
    assert list(cli.home.iterdir()) == []
