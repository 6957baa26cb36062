"""What starts at boot or at a first look: the units and the autofs map that are shipped, and a line of fstab."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from castore.mountinfo import mount_at
from tests.mount.daemons import ended_cleanly
from tests.mount.store import WAIT_SECONDS, MountedStore, run_tool, wait_until

ROOT: Final = Path(__file__).parents[2]
UNITS: Final = ROOT / "docs/systemd"
AUTOFS: Final = ROOT / "docs/autofs"
HELPER: Final = Path("/sbin/mount.castore")
"""Where mount(8) looks for what mounts the type."""


def command_of(unit: str, store: MountedStore) -> list[str]:
    """The ExecStart= of a unit, for this store and this installation."""
    [line] = [line for line in (UNITS / unit).read_text().splitlines() if line.startswith("ExecStart=")]
    program, *words = shlex.split(line.removeprefix("ExecStart="))
    assert program == "/usr/local/bin/castore"
    known = {"/etc/castore/%i.toml": str(store.config), "${MOUNTPOINT}": str(store.mnt)}
    return [sys.executable, "-m", "castore.cli", *(known.get(word, word) for word in words)]


@contextmanager
def manager(path: Path) -> Iterator[socket.socket]:
    """The service manager's end of a notification socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
        here.settimeout(WAIT_SECONDS)
        here.bind(str(path))
        yield here


@contextmanager
def service(store: MountedStore, address: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "NOTIFY_SOCKET": address}
    command = command_of("castore@.service", store)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_manager_is_told(make_store: Callable[..., MountedStore], tmp_path: Path) -> None:
    store = make_store()
    with manager(tmp_path / "notify") as here, service(store, str(tmp_path / "notify")) as daemon:
        assert here.recv(100) == b"READY=1"
        assert mount_at(store.mnt) is not None
        daemon.send_signal(signal.SIGTERM)
        assert here.recv(100) == b"STOPPING=1"
        ended_cleanly(daemon, store)


def test_a_manager_that_is_gone(make_store: Callable[..., MountedStore], tmp_path: Path) -> None:
    store = make_store()
    with service(store, str(tmp_path / "nobody")) as daemon:
        wait_until(lambda: mount_at(store.mnt) is not None or daemon.poll() is not None, "the mount is there")
        daemon.send_signal(signal.SIGTERM)
        said = ended_cleanly(daemon, store)
    assert "is not told READY=1: No such file or directory" in said


def test_killed_and_started_again(make_store: Callable[..., MountedStore], tmp_path: Path) -> None:
    """As Restart=on-failure does: the dead mount is cleared, and what was published reads."""
    store = make_store()
    with manager(tmp_path / "notify") as here:
        with service(store, str(tmp_path / "notify")) as daemon:
            assert here.recv(100) == b"READY=1"
            (store.ingest("kept/1") / "file").write_bytes(b"published")
            store.publish("kept/1")
            daemon.kill()
            daemon.wait()
        assert mount_at(store.mnt) is not None, "dead"
        with service(store, str(tmp_path / "notify")) as daemon:
            assert here.recv(100) == b"READY=1"
            assert (store.package("kept/1") / "file").read_bytes() == b"published"
            daemon.send_signal(signal.SIGTERM)
            ended_cleanly(daemon, store)


def test_the_verify_unit(store: MountedStore) -> None:
    (store.ingest("kept/1") / "file").write_bytes(b"published")
    store.publish("kept/1")
    done = subprocess.run(command_of("castore-verify@.service", store), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("unit", sorted(path.name for path in UNITS.iterdir()))
def test_the_units_are_sound(unit: str, tmp_path: Path) -> None:
    """By systemd's own reading of them, for a host that has castore where they expect it."""
    instances = {}
    for path in UNITS.iterdir():
        name = path.name.replace("@.", "@store.")
        instances[path.name] = tmp_path / name
        text = path.read_text().replace("/usr/local/bin/castore", sys.executable)
        (tmp_path / name).write_text(text.replace("/usr/local/bin/litestream", sys.executable))
    command = ["systemd-analyze", "verify", "--man=no", str(instances[unit])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# mount -t castore


@pytest.fixture
def helper() -> Iterator[Path]:
    """The installed helper, found by mount(8) for as long as the test runs."""
    installed = Path(sysconfig.get_path("scripts")) / "mount.castore"
    was_there = shutil.which(HELPER) is not None
    if not was_there:
        HELPER.symlink_to(installed)
    yield installed
    if not was_there:
        HELPER.unlink()


def test_as_a_line_of_fstab(make_store: Callable[..., MountedStore], helper: Path, tmp_path: Path) -> None:
    store = make_store()
    line = f"{store.config} {store.mnt} castore rw,allow_other,_netdev,nofail,x-systemd.automount 0 0\n"
    (tmp_path / "fstab").write_text(line)
    run_tool("mount", "--fstab", tmp_path / "fstab", store.mnt)
    try:
        (store.ingest("by-mount/1") / "file").write_bytes(b"there")
        assert (store.publish("by-mount/1") / "file").read_bytes() == b"there"
        assert run_tool("findmnt", "-n", "-o", "FSTYPE", store.mnt).strip() == "fuse.castore"
    finally:
        run_tool("umount", store.mnt)
    wait_until(lambda: not (store.state / "run/control.sock").exists(), "the daemon has ended")


def test_mounted_again_at_once(make_store: Callable[..., MountedStore], helper: Path) -> None:
    """umount(8) does not wait for the daemon; the next one waits for its end, for as long as END_SECONDS."""
    store = make_store()
    mount = ("mount", "-t", "castore", store.config, store.mnt)
    run_tool(*mount)
    (store.ingest("kept/1") / "file").write_bytes(b"staged")
    pid = store.status()["pid"]
    os.kill(pid, signal.SIGSTOP)
    run_tool("fusermount3", "-uz", store.mnt)  # umount(8) waits for an answer of the daemon
    refused = subprocess.run(mount, capture_output=True, text=True, check=False)
    os.kill(pid, signal.SIGCONT)
    assert (refused.returncode, refused.stderr.count("\n")) == (32, 1)
    assert f"another daemon (pid {pid}) writes there" in refused.stderr
    run_tool(*mount)
    try:
        assert (store.publish("kept/1") / "file").read_bytes() == b"staged"
    finally:
        run_tool("umount", store.mnt)


def test_read_only(store: MountedStore, helper: Path, tmp_path: Path) -> None:
    """A second mount, by a line that says ro."""
    (store.ingest("kept/1") / "file").write_bytes(b"published")
    store.publish("kept/1")
    place = tmp_path / "second"
    place.mkdir()
    run_tool("mount", "-t", "castore", "-o", "ro", store.config, place)
    try:
        assert (place / "packages/kept/1/file").read_bytes() == b"published"
        assert not (place / "ingest").exists()
    finally:
        run_tool("umount", place)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 1, "a source and a mountpoint are needed"),
        (["none"], 1, "a source and a mountpoint are needed"),
        (["none", "/mnt", "-o"], 1, "-o needs a value"),
        (["none", "/mnt", "-x"], 1, "-x: unknown option"),
        (["none", "/mnt", "-N", "1"], 1, "another namespace"),
        (["/nowhere/castore.toml", "/mnt"], 32, "/nowhere/castore.toml"),
        (["none", "/mnt", "-f", "-o", "strange"], 0, ""),
    ],
)
def test_the_helper_used_wrongly(helper: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    done = subprocess.run([helper, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("\n") == (1 if said else 0)


def test_an_option_that_is_none(make_store: Callable[..., MountedStore], helper: Path) -> None:
    store = make_store()
    command = [str(helper), str(store.config), str(store.mnt), "-o", "rw,strange"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 32
    assert "-o strange: unknown mount option" in done.stderr
    assert mount_at(store.mnt) is None


# autofs


@contextmanager
def automounted(tmp_path: Path) -> Iterator[Path]:
    """The folder that a real automount serves by the map and the line of auto.master that are shipped."""
    folder, name_map = tmp_path / "auto", tmp_path / "auto.castore"
    name_map.write_text((AUTOFS / "auto.castore").read_text().replace("/etc/castore/", f"{tmp_path}/"))
    line = (AUTOFS / "castore.autofs").read_text()
    for shipped, here in (("/mnt/castore", folder), ("/etc/auto.castore", name_map), ("=600", "=1")):
        assert line.count(shipped) == 1
        line = line.replace(shipped, str(here))
    (tmp_path / "auto.master").write_text(line)
    command: list[str | Path] = [
        "automount",
        "--foreground",
        "--verbose",
        "--dont-check-daemon",
        "--pid-file",
        tmp_path / "pid",
    ]
    with (tmp_path / "log").open("wb") as log:
        # A group of its own: to the processes of its group the kernel shows the folder as it is.
        command.append(tmp_path / "auto.master")
        with subprocess.Popen(command, stdout=log, stderr=log, process_group=0) as daemon:
            try:
                wait_until(lambda: mount_at(folder) or daemon.poll() is not None, "autofs watches the folder")
                assert daemon.poll() is None, (tmp_path / "log").read_text()
                yield folder
            finally:
                daemon.terminate()
                daemon.wait(WAIT_SECONDS)
    assert mount_at(folder) is None


def test_an_autofs_map(store: MountedStore, helper: Path, tmp_path: Path) -> None:
    """Mounted at the first look, beside the writing mount, unmounted when it is not used, and mounted again."""
    (store.ingest("kept/1") / "file").write_bytes(b"published")
    store.publish("kept/1")
    (tmp_path / "artifacts.toml").symlink_to(store.config)
    with automounted(tmp_path) as folder:
        place = folder / "artifacts"
        assert list(folder.iterdir()) == []
        assert (place / "packages/kept/1/file").read_bytes() == b"published"
        there = mount_at(place)
        assert there is not None
        assert (there.state_dir, there.read_only) == (store.state, True)
        assert not (folder / "absent").exists()
        wait_until(lambda: mount_at(place) is None, "it has expired")
        assert (place / "packages/kept/1/file").read_bytes() == b"published"
    assert mount_at(store.mnt) is not None
