"""Completion as people meet it: real shells on a terminal, with the script that `castore completion` prints."""

from __future__ import annotations

import os
import pty
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from castore.catalog.connection import open_writer
from tests.cli.conftest import WAIT_SECONDS, Cli

READY: Final = "ready-to-type"
SHELLS: Final = {
    "bash": (["bash", "--noprofile", "--norc", "-i"], "PS1={prompt}; source {script}"),
    # As when the script is the file _castore in a folder of fpath.
    "zsh": (["zsh", "-f", "-i"], "PS1={prompt}; fpath=({script.parent} $fpath); autoload -Uz compinit; compinit -u -D"),
    "fish": (["fish", "--no-config", "-i"], "function fish_prompt; echo {prompt}; end; source {script}"),
}
"""How each is started, and what it is told then: a prompt, and where the script is."""

COMPLETED: Final = [
    ("castore sto", "rage"),
    ("castore mount --allow-o", "ther"),
    ("castore package show zli", "b/1.3"),
    ("castore package diff zstd/1.5 zstd/2", ".0"),
    ("castore package restore z", "oo/1"),
    ("castore package tag zlib sta", "ble"),
    ("castore package tag zlib stable 1", ".3"),
    ("castore storage verify --backend lo", "cal"),
    ("castore completion f", "ish"),
    ("castore umount fol", "der"),
]
"""What is typed, and what the shell adds at TAB."""


def fill(cli: Cli, *refs: str) -> None:
    """A store with these packages, below the home."""
    (cli.home / "source").mkdir()
    (cli.home / "source/file").write_text("of a package")
    cli("init", "--state-dir", cli.home / "state")
    for ref in refs:
        cli("package", "import", cli.home / "source", ref)


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """A store with some packages, and a `castore` on the PATH that only completes, and notes what else it is told."""
    tmp_path = tmp_path_factory.mktemp("typed")
    cli = Cli(tmp_path)
    fill(cli, "zlib/1.3", "zstd/1.5", "zstd/2.0", "zoo/1")
    cli("package", "delete", "zoo/1", "--yes")
    cli("package", "tag", "zlib", "stable", "1.3")
    (cli.home / "folder").mkdir()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/castore"
    completes = f'[ -z "$_CASTORE_COMPLETE" ] || exec {" ".join(cli.command)} "$@"'
    program.write_text(f"#!/bin/sh\n{completes}\nprintf '%s\\n' \"$*\" >>$TOLD\n")
    program.chmod(0o755)
    cli.environ |= {"PATH": f"{tmp_path}/bin:{cli.environ['PATH']}", "TERM": "dumb"}
    return cli


@contextmanager
def on_a_terminal(command: list[str], cli: Cli) -> Iterator[int]:
    """A program in a session of its own, and the end of its terminal that a person would sit at."""
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", "--wait", *command]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cli.home, env=cli.environ) as shell:
        os.close(theirs)
        try:
            yield ours
        finally:
            os.close(ours)  # as when the window is closed
            shell.wait(WAIT_SECONDS)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(typed: Cli, tmp_path: Path, shell: str) -> None:
    script, told = tmp_path / "_castore", tmp_path / "told"
    typed.environ["TOLD"] = str(told)
    script.write_text(typed("completion", shell).stdout)
    command, setting = SHELLS[shell]
    with on_a_terminal(command, typed) as terminal:

        def types(keys: str, until: str) -> None:
            said = b""
            os.write(terminal, keys.encode())
            while until.encode() not in said:
                assert select.select([terminal], [], [], WAIT_SECONDS)[0], f"{until!r} did not follow in {said!r}"
                said += os.read(terminal, 65536)

        # Quoted in two, so that the echo of this line is no prompt.
        setting = setting.format(prompt=f"{READY[:5]}''{READY[5:]}", script=script)
        types(f" {setting}\r", READY)
        for keys, rest in COMPLETED:
            types(f"{keys}\t", rest)
            types("\r", READY)
    lines = [line.rstrip(" /") for line in told.read_text().splitlines()]
    assert [f"castore {line}" for line in lines] == [keys + rest for keys, rest in COMPLETED]


def test_of_many_packages_the_names(cli: Cli) -> None:
    """And without a store, or with settings that are wrong, nothing: no shell is told of an error."""
    fill(cli, "zlib/1.3", "zstd/1.5", "zstd/2.0")
    asked = cli.environ | {"_CASTORE_COMPLETE": "bash_complete", "COMP_CWORD": "3"}
    words = {"COMP_WORDS": "castore package show z"}
    assert cli(env=asked | words).stdout.split() == ["plain,zlib/1.3", "plain,zstd/1.5", "plain,zstd/2.0"]
    with open_writer(cli.home / "state/catalog.db") as database:
        same = "producer, retention_class, publisher_uid, published_at_ns, file_count, size_bytes, manifest_blob_id"
        database.execute(
            "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 600) "
            f"INSERT INTO packages (version, root_id, name, {same}, backend_ids) "
            f"SELECT 'v' || n, -n, name, {same}, backend_ids FROM packages, numbers WHERE name = 'zlib'"
        )
    assert cli(env=asked | words).stdout.split() == ["plain,zlib/", "plain,zstd/"]
    assert len(cli(env=asked | {"COMP_WORDS": "castore package show zlib/v"}).stdout.split()) == 500
    (cli.home / ".config/castore/castore.toml").write_text("[store]\nstate_dir = 1\n")
    done = cli(env=asked | words)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_an_unknown_shell(cli: Cli) -> None:
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in cli("completion", "tcsh", code=2).stderr
