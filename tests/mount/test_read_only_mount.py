"""Further mounts of a store with `-o ro`, beside the one that writes and without it. Not what a package's files are."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from castore.mountinfo import mount_at
from tests.mount.store import MountedStore, fails, run_tool, wait_until


@pytest.fixture
def second(store: MountedStore) -> Iterator[Path]:
    """Where a second mount of the store may be; it is taken away at the end."""
    path = store.root / "second"
    path.mkdir()
    yield path
    while mount_at(path) is not None:
        run_tool("fusermount3", "-uz", path)


def _mount(store: MountedStore, path: Path) -> int:
    return int(json.loads(store.castore("mount", str(path), "-o", "ro", "--background", "--json"))["pid"])


def test_published_elsewhere_is_seen_within_a_second(store: MountedStore, second: Path) -> None:
    _mount(store, second)
    assert sorted(os.listdir(second)) == [".castore", "by-digest", "packages"]
    assert list((second / "packages").iterdir()) == []
    (store.ingest("one/1") / "file").write_text("first")
    package = store.publish("one/1")
    seen = second / "packages/one/1/file"
    wait_until(seen.exists, "the second mount shows what the first published", seconds=5)
    assert seen.read_text() == "first"
    assert (second / "packages/one/latest").readlink() == Path("1")
    assert seen.stat().st_ino == (package / "file").stat().st_ino
    (store.ingest("one/2") / "file").write_text("second")
    store.publish("one/2")
    wait_until(lambda: (second / "packages/one/latest").readlink() == Path("2"), "the newest version", seconds=5)


def test_nothing_is_written(store: MountedStore, second: Path) -> None:
    (store.ingest("one/1") / "file").write_text("x")
    store.publish("one/1")
    _mount(store, second)
    mount = mount_at(second)
    assert mount is not None
    assert mount.read_only
    file = second / "packages/one/1/file"
    for write in (lambda: (second / "new").mkdir(), lambda: file.write_text("y"), lambda: os.utime(file), file.unlink):
        with fails(errno.EROFS):
            write()
    with fails(errno.ENOENT):
        os.stat(second / "ingest")
    room = os.statvfs(second)
    assert (room.f_blocks, room.f_bavail, room.f_namemax) == (0, 0, 255)
    status = json.loads((second / ".castore/status.json").read_text())
    assert status["read_only"] is True
    assert status["package_count"] == 1
    assert "queue" not in status
    assert json.loads((second / ".castore/health.json").read_text())["status"] == "pass"


def test_it_lives_without_the_writing_mount(store: MountedStore, second: Path) -> None:
    (store.ingest("one/1") / "file").write_text("x" * 1000)
    store.publish("one/1")
    store.castore("umount", str(store.mnt))
    third = store.root / "third"
    third.mkdir()
    for path in (second, third):
        _mount(store, path)
        assert (path / "packages/one/1/file").read_text() == "x" * 1000
    store.castore("umount", str(third))
    store.mount()  # it holds no lock
    (store.ingest("one/2") / "file").write_text("y")
    store.publish("one/2")
    wait_until((second / "packages/one/2/file").exists, "the second mount shows the new version", seconds=5)
    mounts = json.loads(store.castore("status", "--json"))["mounts"]
    assert {(mount["mountpoint"], mount["read_only"]) for mount in mounts} == {
        (str(store.mnt), False),
        (str(second), True),
    }
    store.castore("umount", str(second))
    assert mount_at(second) is None
    assert (store.package("one/2") / "file").read_text() == "y"


def test_set_uid_bits_and_devices_are_nothing_unless_asked_for(store: MountedStore, second: Path) -> None:
    for asked, flags in (("ro", {"nosuid", "nodev"}), ("ro,suid,dev,noexec", {"noexec"})):
        store.castore("mount", str(second), "-o", asked, "--background")
        (line,) = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {second} " in line]
        assert set(line.split()[5].split(",")) & {"nosuid", "nodev", "noexec"} == flags
        store.castore("umount", str(second))


def test_a_dead_one_is_cleared_and_a_living_one_is_not(store: MountedStore, second: Path) -> None:
    pid = _mount(store, second)
    for options in ((), ("-o", "ro")):
        done = store.run("mount", str(second), "--background", *options)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
    assert f"{second}: the store is mounted there already" in done.stderr
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    os.close(descriptor)
    wait_until(lambda: _is_gone(second), "the daemon is gone")
    _mount(store, second)
    assert sorted(os.listdir(second)) == [".castore", "by-digest", "packages"]


def _is_gone(path: Path) -> bool:
    try:
        os.listdir(path)
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


def test_ro_and_rw_together(store: MountedStore, second: Path) -> None:
    done = store.run("mount", str(second), "--background", "-o", "ro,rw")
    assert done.returncode == 2
    assert "-o ro,rw: a mount is read-only or not; give one of them" in done.stderr
