"""`castore umount`, on real mounts: drained, forced, dead, hanging, not ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from castore.mountinfo import mount_at
from tests.cli.conftest import Cli
from tests.mount.store import MountedStore, wait_until


def test_it_needs_no_configuration(cli: Cli, store: MountedStore) -> None:
    """The kernel says which store is mounted there. And when it returns, the daemon is gone: the next one can start."""
    pid, store.pid = store.pid, 0
    done = cli("umount", store.mnt)
    assert (done.stdout, done.stderr) == (f"unmounted {store.mnt}\n", "")
    assert not Path(f"/proc/{pid}/fd/0").exists()
    assert mount_at(store.mnt) is None
    store.mount()
    link = cli.home / "link"
    link.symlink_to("../mnt")
    pid, store.pid = store.pid, 0
    document = json.loads(cli("umount", "link", "--json").stdout)
    assert document == {
        "mountpoint": str(store.mnt),
        "state_dir": str(store.state),
        "staged_files": 0,
        "staged_bytes": 0,
        "dead": False,
    }


@pytest.mark.parametrize("name", ["with space", "comma,comma", "back\\slash", "caf\xe9#1", "100%41"])
def test_odd_paths(cli: Cli, tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    root.mkdir()
    cli("init", "--config", root / "castore.toml", "--state-dir", root / "state")
    (root / "mnt").mkdir()
    answer = json.loads(cli("mount", root / "mnt", "--background", "--json", "--config", root / "castore.toml").stdout)
    assert answer["mountpoint"] == str(root / "mnt")
    cli("umount", root / "mnt")
    assert mount_at(root / "mnt") is None


def test_what_is_not_mounted(cli: Cli, tmp_path: Path) -> None:
    assert cli.error("umount", tmp_path) == f"{tmp_path}: nothing is mounted there"
    assert cli.error("umount", tmp_path / "missing") == f"{tmp_path}/missing: nothing is mounted there"
    line = cli.error("umount", "/proc")
    assert line == "/proc: what is mounted there is not castore's but of type proc"


def test_a_bad_timeout(cli: Cli, store: MountedStore) -> None:
    line = cli.error("umount", store.mnt, "--timeout", "5")
    assert line.startswith("--timeout = '5': expected a duration")
    assert mount_at(store.mnt) is not None


def test_a_dead_mount(cli: Cli, store: MountedStore) -> None:
    store.kill()
    with pytest.raises(OSError, match="not connected"):
        os.listdir(store.mnt)
    assert cli("umount", store.mnt).stdout == f"unmounted {store.mnt} (its daemon was dead)\n"
    assert os.listdir(store.mnt) == []


def test_a_dead_mount_whose_store_is_mounted_elsewhere(cli: Cli, store: MountedStore, tmp_path: Path) -> None:
    dead = store.mnt
    store.kill()
    store.mnt = tmp_path / "other"
    store.mnt.mkdir()
    store.mount()
    assert cli("umount", dead).stdout == f"unmounted {dead} (its daemon was dead)\n"
    assert (store.mnt / "packages").is_dir()
    pid, store.pid = store.pid, 0
    cli("umount", store.mnt)
    assert not Path(f"/proc/{pid}/fd/0").exists()


def test_a_daemon_that_hangs(cli: Cli, store: MountedStore) -> None:
    os.kill(store.pid, signal.SIGSTOP)
    line = cli.error("umount", store.mnt)
    assert line.endswith("does not answer in time; `castore umount --force` unmounts without it")
    assert mount_at(store.mnt) is not None
    cli("umount", "--force", store.mnt)
    assert mount_at(store.mnt) is None


def test_a_mount_in_use(cli: Cli, store: MountedStore) -> None:
    with os.scandir(store.mnt / "packages"):
        line = cli.error("umount", store.mnt)
    assert f"is in use by {Path('/proc/self/comm').read_text().strip()} " in line
    assert f"pid {os.getpid()}" in line
    store.pid = 0
    cli("umount", store.mnt)


def test_a_mount_that_no_control_socket_serves(cli: Cli, store: MountedStore) -> None:
    """As a read-only one: nothing to drain, but it is unmounted only when nobody uses it."""
    (store.state / "run/control.sock").unlink()
    with os.scandir(store.mnt / "packages"):
        assert "busy" in cli.error("umount", store.mnt).lower()
    done = cli("umount", store.mnt)
    assert done.stdout == f"unmounted {store.mnt}\n"
    wait_until(lambda: not Path(f"/proc/{store.pid}/fd/0").exists(), "the daemon's end")


def test_what_cannot_be_stored_stays_staged(cli: Cli, store: MountedStore) -> None:
    shutil.rmtree(store.objects)
    store.objects.write_text("a backend that fails")
    (store.ingest("zlib/1.3") / "file").write_text("content")
    done = cli("umount", store.mnt, "--timeout", "1s", code=2)
    assert "castore: error: " in done.stderr
    assert "not stored after 1 s" in done.stderr
    assert "draining" in done.stderr
    assert mount_at(store.mnt) is not None
    store.pid = 0
    done = cli("umount", store.mnt, "--force")
    assert done.stdout.splitlines() == [
        f"unmounted {store.mnt}",
        f"1 staged files (7 B) are not stored yet: they stay in {store.state}, and go on after the next mount",
    ]
