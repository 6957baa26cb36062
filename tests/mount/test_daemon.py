"""The daemon's life: how it starts over dead mounts, how it ends, what it takes while it idles, what it survives."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from castore.mountinfo import read_mounts
from mount.kernel import READ_AHEAD_KIB, tune
from tests.mount.daemons import cpu_ticks, descriptor, ended_cleanly, foreground, resident_kib, state_of
from tests.mount.store import WAIT_SECONDS, MountedStore, fails, run_tool, wait_until

SYNC = """
import os, sys
folder = os.open(sys.argv[1], os.O_RDONLY)
print("about to wait", flush=True)
try:
    os.fsync(folder)
except OSError:
    sys.exit(1)
"""

IDLE_SECONDS = 3.0
IDLE_TICKS = 2
RESIDENT_KIB = 80 * 1024
"""Of a daemon that idles, well below the 120 MB that are promised. While it reads, it keeps 64 MiB more."""


def test_the_kernel_reads_ahead_as_it_is_told(make_store: Callable[..., MountedStore]) -> None:
    """At every mount: what is set before the kernel has the answer to its first request is lost."""
    store = make_store()
    for _ in range(4):
        store.mount()
        device = store.mnt.stat().st_dev
        read_ahead = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()
        assert int(read_ahead) == READ_AHEAD_KIB or "large reads are slower" in store.log()
        store.umount()


def test_what_may_not_be_raised_is_one_line_of_log(store: MountedStore, caplog: pytest.LogCaptureFixture) -> None:
    """As somebody who may not write to /sys."""
    caplog.set_level(logging.INFO, "mount.kernel")
    mine = os.geteuid()
    os.seteuid(65534 if mine == 0 else mine)
    try:
        tune(store.mnt)
    finally:
        os.seteuid(mine)
    ahead, background = [record.getMessage() for record in caplog.records if record.name == "mount.kernel"]
    assert ahead.endswith("/read_ahead_kb stays as it is (Permission denied): large reads are slower")
    assert background.startswith("max_background stays as it is (")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it(make_store: Callable[..., MountedStore], number: signal.Signals) -> None:
    """With open files and a working directory inside, and with files that are not stored."""
    store = make_store()
    with foreground(store) as daemon:
        (store.ingest("open/1") / "a").write_bytes(b"published")
        package = store.publish("open/1")
        box = store.ingest("open/2")
        store.objects.rename(store.root / "elsewhere")
        (box / "not stored").write_bytes(b"staged")
        with descriptor(package / "a", os.O_RDONLY) as reading, descriptor(box / "written") as writing:
            with contextlib.chdir(package):
                os.write(writing, b"open")
                daemon.send_signal(number)
                said = ended_cleanly(daemon, store)
            with fails(errno.ENOTCONN):
                os.read(reading, 1)
    # Sizes are those of the last close.
    assert f"2 files (6 bytes) stay staged in {store.state}" in said
    (store.root / "elsewhere").rename(store.objects)
    store.mount()
    assert (box / "written").read_bytes() == b"open"
    assert (store.publish("open/2") / "not stored").read_bytes() == b"staged"


def test_it_ends_while_someone_waits(make_store: Callable[..., MountedStore]) -> None:
    """A sync of a version whose file takes minutes to be hashed."""
    store = make_store()
    with foreground(store) as daemon:
        box = store.ingest("long/1")
        store.objects.rename(store.root / "elsewhere")  # should it ever be hashed, it must not be stored
        (box / "huge").touch()
        os.truncate(box / "huge", 90 << 30)
        with subprocess.Popen([sys.executable, "-c", SYNC, box], stdout=subprocess.PIPE) as sync:
            try:
                assert sync.stdout is not None
                sync.stdout.read(1)
                wait_until(lambda: state_of(sync.pid) in "SD", "sync waits")
                daemon.send_signal(signal.SIGTERM)
                said = ended_cleanly(daemon, store)
                assert sync.wait(WAIT_SECONDS) == 1
            finally:
                sync.kill()
    assert "1 files (96636764160 bytes) stay staged" in said
    store.mount()
    (box / "huge").unlink()


def test_two_dead_mounts_are_cleared(store: MountedStore) -> None:
    (store.ingest("demo/1") / "a").write_text("a")
    run_tool("mount", "--bind", store.mnt, store.mnt)
    store.kill()
    assert [mount.mountpoint for mount in read_mounts()].count(store.mnt) == 2
    store.mount()
    assert [mount.mountpoint for mount in read_mounts()].count(store.mnt) == 1
    assert (store.publish("demo/1") / "a").read_text() == "a"


@contextmanager
def user_of(store: MountedStore, how: str) -> Iterator[tuple[int, str]]:
    """A process that keeps the mount busy: its id, and what it has in use."""
    (store.ingest("used/1") / "file").write_text("x")
    path = store.mnt / "ingest/used/1"
    if how == "file":
        path /= "file"
    command = ["sleep", "1000"] if how == "directory" else ["tail", "-f", str(path)]
    with subprocess.Popen(command, cwd=path if how == "directory" else "/", stdout=subprocess.PIPE) as process:
        try:
            if process.stdout and how == "file":
                process.stdout.read(1)
            yield process.pid, str(path)
        finally:
            process.kill()


@pytest.mark.parametrize("how", ["directory", "file"])
def test_a_busy_mount_names_who_uses_it(store: MountedStore, how: str) -> None:
    with user_of(store, how) as (pid, path):
        done = store.run("umount", str(store.mnt))
        command = "sleep" if how == "directory" else "tail"
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == (
            f"castore: error: {store.mnt}: is in use by {command} (pid {pid}: {path}); "
            "end them or leave the directory, then unmount again"
        )
        assert (store.mnt / "ingest/used/1/file").read_text() == "x"
    store.umount()


def test_umount_from_inside(store: MountedStore) -> None:
    """The command itself is none of those who use it."""
    done = store.run("umount", str(store.mnt), cwd=store.mnt / "packages")
    assert (done.returncode, done.stderr) == (0, "")


def test_umount_waits_until_all_is_stored(store: MountedStore) -> None:
    box = store.ingest("drain/1")
    for number in range(100):
        (box / f"{number}").write_bytes(os.urandom(20_000))
    store.umount()
    objects = [path for path in (store.objects / "sha256").rglob("*") if path.is_file()]
    assert len(objects) == 100
    store.mount()
    assert store.status()["queue"]["stored"]["file_count"] == 100


def test_what_nobody_changes_is_reported_and_stays(make_store: Callable[..., MountedStore]) -> None:
    store = make_store('expire_after = "1s"')
    store.mount()
    (store.ingest("old/1") / "file").write_text("left behind")
    (store.ingest("young/1") / "file").write_text("in work")
    with (store.mnt / "ingest/young/1/file").open("a") as file:
        file.write("still")
        file.flush()
        wait_until(lambda: store.status()["expired"], "a version expires")
        assert [each["ref"] for each in store.status()["expired"]] == ["old/1"]
    health = json.loads((store.mnt / ".castore/health.json").read_text())
    (check,) = health["checks"]["ingest:expired"]
    assert check["status"] == "warn"
    assert check["output"] == "nothing changed in them for ingest.expire_after: old/1"
    assert "old/1" in store.castore("status")
    wait_until(lambda: len(store.status()["expired"]) == 2, "the other one expires, too")
    assert store.log().count("nothing in ingest/old/1 changed") == 1
    (store.ingest("old/1") / "file").touch()
    wait_until(lambda: [each["ref"] for each in store.status()["expired"]] == ["young/1"], "it is in work again")
    assert (store.publish("old/1") / "file").read_text() == "left behind"


def test_the_unforeseen_is_eio_and_the_mount_lives_on(store: MountedStore) -> None:
    """A row that no code writes: an owner whose number the kernel has no room for."""
    for name in ("a", "b"):
        (store.ingest("odd/1") / name).write_text(name)
    package = store.publish("odd/1")
    with closing(sqlite3.connect(store.state / "catalog.db")) as catalog, catalog:
        catalog.execute("UPDATE entries SET uid = 1 << 40 WHERE name = x'61'")
    store.umount()
    store.mount()  # the kernel knows nothing of the file
    for _ in range(3):
        with fails(errno.EIO):
            (package / "a").read_text()
    assert (package / "b").read_text() == "b"
    log = store.state / "log/mount.log"
    assert log.read_text().count("Traceback") == log.read_text().count("lookup: unforeseen OverflowError") >= 3
    store.umount()
    log.unlink()  # it was foreseen here


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("checksum_algorithm = 'md5'", "block checksums of an unknown algorithm 'md5'"),
        ("checksums = x''", "block checksums of 0 bytes instead of 8"),
    ],
)
def test_block_checksums_that_cannot_be_are_told_in_a_line(store: MountedStore, damage: str, said: str) -> None:
    """They say nothing of the object: it is no reason to call it bad, and verify, which needs none, finds it good."""
    for name in ("a", "b"):
        (store.ingest("odd/1") / name).write_text(name)
    package = store.publish("odd/1")
    raw = bytes.fromhex(os.getxattr(package / "a", "user.hash.sha256").decode())
    with closing(sqlite3.connect(store.state / "catalog.db")) as catalog, catalog:
        catalog.execute(f"UPDATE blobs SET {damage} WHERE digest = ?", (raw,))
    for _ in range(3):
        with fails(errno.EIO):
            (package / "a").read_text()
    assert (package / "b").read_text() == "b"
    assert said in store.log()
    assert "`castore catalog check` names all of them" in store.log()
    assert "failed: 0, changed: 0, unreachable: 0" in store.castore("storage", "verify")


def test_an_attribute_of_another_kind_is_eio_and_the_mount_lives_on(store: MountedStore) -> None:
    """Text where bytes belong ended the daemon: what is answered is beyond all guards."""
    (store.ingest("odd/1") / "a").write_text("a")
    os.setxattr(store.mnt / "ingest/odd/1/a", "user.note", b"b")
    package = store.publish("odd/1")
    with closing(sqlite3.connect(store.state / "catalog.db")) as catalog, catalog:
        catalog.execute("UPDATE entry_attributes SET value = 'text'")
    with fails(errno.EIO):
        os.getxattr(package / "a", "user.note")
    assert (package / "a").read_text() == "a"
    assert "getxattr: the catalog has a row that no castore writes" in store.log()


def test_it_idles_in_little_memory(store: MountedStore) -> None:
    """After a copy, a publish and a read of Python's standard library."""
    box = store.ingest("stdlib/1")
    library = sysconfig.get_path("stdlib")
    left_out = [f"--exclude={name}" for name in ("site-packages", "test", "__pycache__")]
    run_tool("tar", "-C", library, *left_out, "-cf", store.root / "library.tar", ".")
    run_tool("tar", "-C", box, "-xf", store.root / "library.tar")
    package = store.publish("stdlib/1")
    run_tool("tar", "-C", package, "-cf", store.root / "copy.tar", ".")
    wait_until(lambda: resident_kib(store.pid) < RESIDENT_KIB, "what was kept for the next read is given back")

    def idled() -> bool:
        ticks, end = cpu_ticks(store.pid), time.monotonic() + IDLE_SECONDS
        wait_until(lambda: time.monotonic() > end, "some time passes")
        return cpu_ticks(store.pid) - ticks <= IDLE_TICKS

    wait_until(idled, "the daemon idles")
