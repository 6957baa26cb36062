"""`castore umount`: let the daemon drain and unmount, or clear away a dead mount. Stops no process itself."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import click

from castore.api.control_client import ControlClient
from castore.cli.output import eta, format_bytes, print_json, printable
from castore.cli.progress import progress
from castore.cli.session import common_options, json_option, mountpoint_argument
from castore.errors import ConfigError, DeadlineExceeded, StateError
from castore.mountinfo import Mount, is_dead, mount_at, resolve_mountpoint, wait_unmounted

STATUS_SECONDS: Final = 5.0
"""For the question which mount a daemon serves, that it answers from memory."""
END_SECONDS: Final = 40.0
"""From the end of the drain until the daemon is gone; it promises 30."""


@click.command("umount")
@mountpoint_argument
@click.option("--force", is_flag=True, help="Do not wait for uploads: what is staged stays staged.")
@click.option(
    "--timeout", metavar="DURATION", default="10min", show_default=True, help='How long to drain, such as "90s".'
)
@json_option
@common_options
def command(mountpoint: Path, force: bool, timeout: str, as_json: bool) -> None:
    """Wait until all that is staged is stored, then unmount MNT.

    Example: castore umount ~/store
    """
    drain_seconds = _seconds(timeout)
    mount = _castore_mount(mountpoint)
    os.chdir("/")  # whoever calls this from inside of the mount: this process at least does not keep it busy
    client = ControlClient(_control_path(mount))
    if _is_served_by(client, mount, force):
        outcome = _drain(client, mount, force, drain_seconds)
    else:
        outcome = _clear(mount, force)
    if as_json:
        print_json({"mountpoint": str(mount.mountpoint), "state_dir": str(mount.state_dir), **outcome})
        return
    click.echo(f"unmounted {printable(str(mount.mountpoint))}{' (its daemon was dead)' if outcome['dead'] else ''}")
    if outcome["staged_files"]:
        click.echo(
            f"{outcome['staged_files']} staged files ({format_bytes(outcome['staged_bytes'])}) are not stored yet: "
            f"they stay in {mount.state_dir}, "
            "and go on after the next mount"
        )


def _seconds(timeout: str) -> float:
    from castore.config_values import DURATION_RULE, parse_duration

    try:
        return parse_duration(timeout)
    except ValueError as exc:
        raise ConfigError(f"--timeout = {timeout!r}: expected {DURATION_RULE}") from exc


def _castore_mount(mountpoint: Path) -> Mount:
    """The castore mount at a path. Raises StateError when there is none."""
    resolved = resolve_mountpoint(mountpoint)
    mount = mount_at(resolved)
    if mount is None:
        raise StateError(f"{resolved}: nothing is mounted there")
    if mount.state_dir is None:
        raise StateError(f"{resolved}: what is mounted there is not castore's but of type {mount.fs_type}")
    return mount


def _control_path(mount: Mount) -> Path:
    from castore.config import StoreSettings

    assert mount.state_dir is not None
    return StoreSettings(mount.state_dir).control_path


def _is_served_by(client: ControlClient, mount: Mount, force: bool) -> bool:
    """Whether the daemon that writes to the state directory serves this mount, and not another one of it."""
    try:
        status = client.call("status", within=STATUS_SECONDS)
    except StateError:
        return False
    except DeadlineExceeded as exc:
        if force:
            return False
        raise DeadlineExceeded(f"{exc}; `castore umount --force` unmounts without it") from exc
    served = status.get("mountpoint")
    return not isinstance(served, str) or resolve_mountpoint(Path(served)) == mount.mountpoint


def _drain(client: ControlClient, mount: Mount, force: bool, seconds: float) -> dict[str, Any]:
    pid = client.daemon_pid()
    with contextlib.ExitStack() as stack:
        daemon = _open_process(pid, stack)
        most_bytes = 0
        with progress(f"draining {printable(str(mount.mountpoint))}") as show:

            def on_progress(snapshot: dict[str, Any]) -> None:
                nonlocal most_bytes
                left_bytes = int(snapshot.get("staged_bytes", 0))
                most_bytes = max(most_bytes, left_bytes)
                if most_bytes:
                    files = f"{snapshot.get('staged_files', 0)} files to go{eta(snapshot.get('eta_s'))}"
                    show(done_bytes=most_bytes - left_bytes, total_bytes=most_bytes, files=files)

            result = client.call("umount", on_progress, force=force, timeout_seconds=seconds)
        started = time.monotonic()
        wait_unmounted(mount, END_SECONDS)
        if daemon is not None:
            _wait_process(daemon, END_SECONDS - (time.monotonic() - started), mount)
    return {
        "staged_files": int(result.get("staged_files", 0)),
        "staged_bytes": int(result.get("staged_bytes", 0)),
        "dead": False,
    }


def _open_process(pid: int, stack: contextlib.ExitStack) -> int | None:
    """A descriptor of a process, so that its end can be waited for; None when it cannot be seen from here."""
    with contextlib.suppress(OSError):
        if pid > 0:
            descriptor = os.pidfd_open(pid)
            stack.callback(os.close, descriptor)
            return descriptor
    return None


def _wait_process(descriptor: int, seconds: float, mount: Mount) -> None:
    """Until the daemon has ended, so that the next mount finds the state directory unlocked."""
    if not select.select([descriptor], [], [], max(0.0, seconds))[0]:
        raise DeadlineExceeded(f"{mount.mountpoint} is unmounted, but its daemon still runs after {END_SECONDS:g} s")


def _clear(mount: Mount, force: bool) -> dict[str, Any]:
    """Unmount what no writing daemon serves: a dead mount at once, a read-only one as long as nobody uses it."""
    dead = is_dead(mount.mountpoint)
    if dead is None and not force:
        raise DeadlineExceeded(
            f"{mount.mountpoint}: its daemon does not answer; `castore umount --force` unmounts without it"
        )
    # A daemon that was started again over a dead mount leaves several of them.
    current: Mount | None = mount
    while current is not None and current.state_dir == mount.state_dir:
        if dead is not False:
            _free_those_who_wait(current.mountpoint)
        _fusermount(current.mountpoint, lazily=dead is not False)
        wait_unmounted(current, END_SECONDS)
        if dead is False:
            break
        current = mount_at(mount.mountpoint)
        if current is not None and is_dead(current.mountpoint) is False:
            break
    return {"staged_files": 0, "staged_bytes": 0, "dead": dead is not False}


def _free_those_who_wait(mountpoint: Path) -> None:
    """Whoever waits for an answer of a daemon that hangs, or was killed and cannot end, gets an error now."""
    from mount import kernel

    with contextlib.suppress(OSError):  # it may be root's alone
        kernel.abort(mountpoint)


def _fusermount(mountpoint: Path, *, lazily: bool) -> None:
    try:
        done = subprocess.run(
            ["fusermount3", "-uz" if lazily else "-u", os.fspath(mountpoint)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError as exc:
        raise StateError("fusermount3 is not installed; it comes with Debian's package fuse3") from exc
    if done.returncode != 0:
        raise StateError(f"{mountpoint}: {printable(done.stderr.strip()) or 'fusermount3 failed'}")
