"""Completion in shells, as people meet it: the printed script in a real bash."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import WAIT_SECONDS, Cli

# As readline calls it: the words, which of them the cursor is in, and then the function that was registered.
ASK = """
source "$1"
words=$(complete -p castore) && words=${words#*-F } && function=${words%% *}
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
$function castore "${@: -1}" ""
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def bash(cli: Cli, tmp_path: Path) -> Path:
    """The folder with the script, and with a `castore` that a shell finds."""
    (tmp_path / "script").write_text(cli("completion", "bash").stdout)
    (tmp_path / "castore").write_text(f'#!/bin/sh\nexec {" ".join(cli.command)} "$@"\n')
    (tmp_path / "castore").chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mo", {"mount"}),
        ("package ex", {"export"}),
        ("completion f", {"fish"}),
        ("mount --allow", {"--allow-other"}),
    ],
)
def test_bash_completes(cli: Cli, bash: Path, words: str, expected: set[str]) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", bash / "script", "castore", *words.split()],
        env=cli.environ | {"PATH": f"{bash}:{cli.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_SECONDS,
    )
    assert (set(done.stdout.split()), done.stderr) == (expected, "")


@pytest.mark.parametrize(("shell", "word"), [("zsh", "#compdef castore"), ("fish", "--command castore")])
def test_other_shells_get_their_script(cli: Cli, shell: str, word: str) -> None:
    assert word in cli("completion", shell).stdout


def test_an_unknown_shell(cli: Cli) -> None:
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in cli("completion", "tcsh", code=2).stderr
