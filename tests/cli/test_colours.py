"""Colours: only where a person looks on and did not forbid them. What is drawn is not looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping

from tests.cli.conftest import WAIT_SECONDS, Cli, read_terminal

DRAW = """
from castore.cli.progress import progress
with progress("storing") as show:
    show(done_bytes=1, total_bytes=2, files="1 of 2 files")
    show.say("result")
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|9[0-7]|38;[0-9;]+)m")


def drawn(environ: Mapping[str, str]) -> str:
    """What a command with progress writes to a terminal."""
    terminal, other_end = os.openpty()
    with subprocess.Popen([sys.executable, "-c", DRAW], env=environ, stdout=other_end, stderr=other_end) as process:
        os.close(other_end)
        text = read_terminal(terminal)
        assert process.wait(WAIT_SECONDS) == 0
    return text


def test_no_color_is_respected(cli: Cli) -> None:
    environ = {key: value for key, value in cli.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm-256color"}
    assert COLOUR.search(drawn(environ)), "else this test proves nothing"
    plain = drawn(environ | {"NO_COLOR": "1"})
    assert "1 of 2 files" in plain
    assert COLOUR.search(plain) is None


def test_pipes_get_plain_lines(cli: Cli) -> None:
    environ = cli.environ | {"TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-c", DRAW], env=environ, capture_output=True, text=True, check=True, timeout=WAIT_SECONDS
    )
    assert done.stdout == "result\n"
    assert done.stderr == "storing: 1 B of 2 B, 1 of 2 files\n"
