"""Runs the shell blocks of a document as its reader would: in order, in one shell, in a home that is empty.

The shell has mounts and processes of its own: when it ends, or fails, nothing that it started or mounted is left.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.namespaces import PRIVATE, UNSHARE

ROOT: Final = Path(__file__).resolve().parents[2]
WAIT_SECONDS: Final = 600.0
_BLOCK: Final = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_END: Final = "\x1e"
"""Printed after each block, so that what it said is known."""
# Code and Python are seen at paths that everybody can reach. The device is for everybody, as Debian's udev makes it.
_ENTER: Final = (
    PRIVATE
    + """\
mount --bind "$1" "$2"
mount --bind "$3" "$4"
[ "$(stat -c %a /dev/fuse)" = 666 ] || { mknod -m 666 "$5/fuse" c 10 229; mount --bind "$5/fuse" /dev/fuse; }
cd "$6"
shift 6
exec "$@"
"""
)


@dataclass(frozen=True, slots=True)
class Block:
    """Commands, and what the document says they print: '' where it says nothing, `...` for anything in a line."""

    commands: str
    says: str = ""


def blocks_of(document: Path) -> list[Block]:
    """Every `sh` block, with the `text` block that follows it."""
    found: list[Block] = []
    for language, text in _BLOCK.findall(document.read_text()):
        if language == "sh":
            found.append(Block(text))
        else:
            assert found, f"{document}: the output of nothing"
            assert not found[-1].says, f"{document}: two outputs of one block"
            found[-1] = Block(found[-1].commands, text)
    return found


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads a document: a folder of their own, their user, and what the document's placeholders are for them."""

    folder: Path
    uid: int = 0
    environ: Mapping[str, str] | None = None
    instead: Mapping[str, str] | None = None
    """What stands in the document -> what this reader writes."""

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def run(self, blocks: list[Block], *, cwd: Path | None = None) -> None:
        """All of them must succeed and say what they should."""
        code, python, commands = (self.folder / name for name in ("code", "python", "bin"))
        script = self.folder / "script"
        for path in (code, python, commands, self.home):
            path.mkdir()
        os.chown(self.home, self.uid, self.uid)
        libraries = sysconfig.get_path("purelib").replace(str(ROOT), str(code))
        castore = commands / "castore"
        interpreter = python / Path(os.path.realpath(sys.executable)).relative_to(sys.base_prefix)
        castore.write_text(f'#!/bin/sh\nexec {interpreter} -m castore.cli "$@"\n')
        castore.chmod(0o755)
        (commands / "litestream").symlink_to(Path(sys.executable).with_name("litestream"))
        script.write_text("".join(f"{self._written(block.commands)}\nprintf '{_END}'\n" for block in blocks))
        environ = {
            "HOME": str(self.home),
            "PATH": f"{commands}:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": f"{code}:{libraries}",
            "LD_LIBRARY_PATH": str(python / "lib"),
            **(self.environ or {}),
        }
        namespaces = [*UNSHARE, "--pid", "--fork", "--kill-child", "--mount-proc"]
        user = ["setpriv", "--reuid", str(self.uid), "--regid", str(self.uid), "--clear-groups"] if self.uid else []
        shell = ["bash", "-euo", "pipefail", str(script)]
        seen = [*map(str, (ROOT, code, sys.base_prefix, python, self.folder))]
        entered = ["sh", "-euc", _ENTER, "sh", *seen, str(cwd or self.home), *user, *shell]
        done = subprocess.run(
            [*namespaces, *entered],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=WAIT_SECONDS,
        )
        said = done.stdout.split(_END)
        for block, output in zip(blocks, said, strict=False):
            assert lacks(output, block.says) == [], f"{block.commands}\nsaid:\n{output}"
        assert (done.returncode, len(said)) == (0, len(blocks) + 1), f"{blocks[len(said) - 1].commands}\n{said[-1]}"

    def _written(self, commands: str) -> str:
        for placeholder, own in (self.instead or {}).items():
            commands = commands.replace(placeholder, own)
        return commands


def lacks(output: str, says: str) -> list[str]:
    """The lines that should be there, in this order, from the first one on that is not."""
    lines = iter(output.splitlines())
    wanted = says.splitlines()
    for number, line in enumerate(wanted):
        pattern: Callable[[str], object] = re.compile(".*".join(map(re.escape, line.split("...")))).fullmatch
        if not any(map(pattern, lines)):
            return wanted[number:]
    return []
