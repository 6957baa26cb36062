"""The man page against the commands, and its form."""

from __future__ import annotations

import subprocess
from pathlib import Path

from castore.cli.man_page import man_page

PAGE = Path(__file__).resolve().parents[2] / "docs/man/castore.1"


def test_it_says_what_the_commands_say() -> None:
    assert PAGE.read_text() == man_page(), "run scripts/man-page"


def test_it_is_formatted_without_a_warning() -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-P-cbou", PAGE], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    assert "castore package import" in done.stdout
    assert "OPTIONS OF EVERY COMMAND" in done.stdout
