"""`castore mount`: start the daemon, in this process or in the background. Checks no mountpoint: the daemon does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click

from castore.cli.output import print_json, printable
from castore.cli.session import Session, common_options, json_option, mountpoint_argument
from castore.errors import StateError

if TYPE_CHECKING:
    from castore.config import Config

READY_SECONDS: Final = 60.0
"""For a start that took 0.25 s when measured: a catalog to recover or a slow disk may take long, but not for ever."""
_END_SECONDS: Final = 2.0
"""For a daemon that said that it cannot start; all that is left to do for it is to exit."""
_STOP_SECONDS: Final = 5.0
"""From SIGTERM to SIGKILL for a daemon that did not start in time."""
_READY_LINE_MAX_BYTES: Final = 64 * 1024


@click.command("mount")
@mountpoint_argument
@click.option("-o", "options", metavar="OPTS", multiple=True, help="Mount options, separated by commas.")
@click.option("--allow-other", is_flag=True, help="Let all users of this host use the mount.")
@click.option(
    "--follow",
    metavar="URL",
    help="Show what another host publishes: the URL of a replica that litestream keeps of its catalog.",
)
@click.option("--background", is_flag=True, help="Return once it is mounted; the daemon lives on.")
@click.option(
    "--wait",
    "wait_seconds",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=READY_SECONDS,
    show_default=True,
    help="With --background: how long the daemon may take to start.",
)
@json_option
@common_options
@click.pass_obj
def command(
    session: Session,
    mountpoint: Path,
    options: tuple[str, ...],
    allow_other: bool,
    follow: str | None,
    background: bool,
    wait_seconds: float,
    as_json: bool,
) -> None:
    """Mount the store at MNT, an empty directory. Stays in the foreground unless told.

    Without any configuration, the first time, it makes a store in your data folder, and MNT.

    With --follow, the state directory is for that alone, and the program litestream is needed; for a replica in a
    folder the URL is file:///PATH.

    Example: castore mount ~/store --background
    """
    config = session.config()
    state_dir = config.store.state_dir
    mountpoint = mountpoint.absolute()
    if not state_dir.is_dir():
        if follow is not None:
            _make_state_dir(state_dir)
        # A configured place that is not there may be a disk that is not mounted: nothing is made in its stead.
        elif config.source is not None or "ro" in ",".join(options).split(","):
            raise StateError(f"{state_dir}: there is no store; run `castore init`")
        else:
            _make_first_store(config, mountpoint)
    # -P: the working directory must not decide what the module `mount` is.
    arguments = [sys.executable, "-P", "-m", "mount"]
    if config.source is not None:
        arguments += ["--config", str(config.source)]
    arguments.append(str(mountpoint))
    if options:
        arguments += ["-o", ",".join(options)]
    if allow_other:
        arguments.append("--allow-other")
    if follow is not None:
        arguments += ["--follow", follow]
    if session.log_level is not None:
        arguments += ["--log-level", session.log_level]
    if not background:
        sys.stdout.flush()
        os.execv(sys.executable, arguments)
    log_path = state_dir / "log" / "mount.log"
    pid = start_in_background(arguments, log_path, wait_seconds)
    if as_json:
        print_json({"mountpoint": str(mountpoint), "pid": pid, "log": str(log_path)})
    else:
        click.echo(f"mounted {printable(str(mountpoint))} (pid {pid})")


def _make_first_store(config: Config, mountpoint: Path) -> None:
    """What somebody needs who has only just installed castore. Says so in a line."""
    from castore.cli.init import make_store

    if not mountpoint.parent.is_dir():
        raise StateError(
            f"{mountpoint}: cannot be made, {mountpoint.parent} is no directory; make that with `mkdir -p`"
        )
    mountpoint.mkdir(exist_ok=True)
    _, errors = make_store(config)
    if errors:
        raise errors[0]
    click.echo(
        f"made a new store in {printable(str(config.store.state_dir))}; `castore init` writes settings to change",
        err=True,
    )


def _make_state_dir(state_dir: Path) -> None:
    """Of a mount that follows: nothing but copies will be in it."""
    try:
        state_dir.mkdir(mode=0o700)
    except OSError as exc:
        raise StateError(f"{state_dir}: cannot be made ({exc.strerror}); make the folder around it") from exc


def start_in_background(arguments: list[str], log_path: Path, wait_seconds: float) -> int:
    """Start a daemon detached from this terminal, its output appended to `log_path`, and return its process id.

    `--ready-fd N` is added to its arguments: into that pipe it writes one line, `{"ready": true, "pid": N}` or
    `{"error": "..."}`. It leaves this session by itself, once it is mounted. Raises StateError when it reports an
    error, ends before, or is not ready in time; then it no longer runs.
    """
    log_path.parent.mkdir(mode=0o700, exist_ok=True)
    ready_read, ready_write = os.pipe()
    with open(ready_read, "rb", buffering=0) as ready, open(log_path, "ab", opener=_private) as log:
        log_start = log.tell()
        try:
            process = subprocess.Popen(
                [*arguments, "--ready-fd", str(ready_write)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(ready_write,),
            )
        finally:
            os.close(ready_write)
        try:
            answer = _read_answer(ready, wait_seconds)
        except BaseException:
            _stop(process)
            raise
    if answer is None:
        _stop(process)
        raise StateError(
            f"the daemon was not ready within {wait_seconds:g} seconds and was stopped; its log is {log_path}"
        )
    if answer.get("ready") is not True:
        # It ends by itself, and may still have something to write to its log.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        _stop(process)
    if "error" in answer:
        raise StateError(str(answer["error"]))
    if answer.get("ready") is not True:
        raise StateError(
            f"the daemon ended before it was ready, with exit status {process.returncode}: "
            f"{_last_line(log_path, log_start)}; its log is {log_path}"
        )
    process.returncode = 0  # Not ours to wait for any more: it lives on.
    return int(answer.get("pid", process.pid))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _read_answer(ready: BinaryIO, seconds: float) -> dict[str, Any] | None:
    """The daemon's line; empty when it closed the pipe without one, None when nothing came in time."""
    deadline = time.monotonic() + seconds
    received = b""
    while b"\n" not in received and len(received) < _READY_LINE_MAX_BYTES:
        readable, _, _ = select.select([ready], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return None
        data = ready.read(_READY_LINE_MAX_BYTES)
        if not data:
            break
        received += data
    try:
        answer = json.loads(received.partition(b"\n")[0])
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {}


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log_path: Path, start: int) -> str:
    """The last line written to the log since `start`, as a hint."""
    with log_path.open("rb") as log:
        log.seek(max(start, log.seek(0, os.SEEK_END) - _READY_LINE_MAX_BYTES))
        # What draws the frame of a traceback says nothing.
        lines = [line.strip(b" |+-") for line in log.read().split(b"\n")]
    return next((printable(line) for line in reversed(lines) if line), "it wrote nothing")
