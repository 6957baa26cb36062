"""The probe of a folder: what it finds on real file systems, and what it leaves there."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from castore.config_backends import LocalSettings
from castore.digest import Digest
from castore.errors import StorageUnavailable
from castore.mountinfo import read_mounts
from castore.storage.backends.local import LocalBackend
from castore.storage.open import create_backend, probe_backend
from castore.storage.source import BytesSource

RELIED_ON = {"durable", "sync", "rename", "exclusive", "list-after-write", "large"}


@pytest.fixture
async def settings(tmp_path: Path) -> LocalSettings:
    settings = LocalSettings("disk", tmp_path / "objects")
    await create_backend(settings)
    return settings


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A folder of a file system in memory: every Linux mounts one there."""
    assert any(mount.mountpoint == Path("/dev/shm") and mount.fs_type == "tmpfs" for mount in read_mounts())
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="castore-tests-") as folder:
        yield Path(folder)


async def test_a_disk_gives_all_that_is_relied_on(settings: LocalSettings) -> None:
    report = await probe_backend(settings)
    findings = {finding.name: finding for finding in report.findings}
    assert {name for name, finding in findings.items() if finding.consequence} == RELIED_ON
    # The tests' own folder may lie in memory.
    expected = {"durable"} if report.server in ("tmpfs", "ramfs", "rootfs") else set()
    assert {name for name, finding in findings.items() if finding.severity != "pass"} - {"read-at-once"} == expected
    assert findings["durable"].answer == report.server
    assert findings["exclusive"].answer == "1 of 8 made it"
    assert os.listdir(settings.path) == ["CASTORE-OBJECTS.txt"]


async def test_memory_is_no_place_for_objects(in_memory: Path) -> None:
    settings = LocalSettings("memory", in_memory / "objects")
    await create_backend(settings)
    report = await probe_backend(settings)
    (failed,) = (finding for finding in report.findings if finding.severity == "fail")
    assert (failed.name, failed.answer, report.server) == ("durable", "tmpfs", "tmpfs")
    assert failed.consequence.startswith("everything stored here is lost at the next start of the host")


IN_A_CHROOT = """
import os, sys
from pathlib import Path
import trio
from castore.config_backends import LocalSettings
from castore.storage.open import probe_backend

trio.run(probe_backend, LocalSettings("disk", Path(sys.argv[1], "objects")))  # loads what it needs
os.chroot(sys.argv[1])
report = trio.run(probe_backend, LocalSettings("disk", Path("/objects")))
print(report.server, *(finding.name for finding in report.findings if finding.severity == "fail"))
"""


@pytest.mark.parametrize("memory", [False, True], ids=["on a disk", "in memory"])
async def test_in_a_chroot(tmp_path: Path, in_memory: Path, memory: bool) -> None:
    """Where the kernel does not say what is mounted above."""
    root = in_memory if memory else tmp_path
    await create_backend(LocalSettings("disk", root / "objects"))
    outside = await probe_backend(LocalSettings("disk", root / "objects"))
    (root / "proc").mkdir()
    subprocess.run(["mount", "--bind", "/proc", root / "proc"], check=True)
    try:
        done = subprocess.run([sys.executable, "-c", IN_A_CHROOT, root], capture_output=True, text=True, check=False)
    finally:
        subprocess.run(["umount", root / "proc"], check=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        outside.server,
        *(finding.name for finding in outside.findings if finding.severity == "fail"),
    ]


async def test_objects_are_left_alone(settings: LocalSettings) -> None:
    data = b"an object"
    backend = LocalBackend("disk", settings.path)
    await backend.put(Digest.of(data), BytesSource(data))
    before = sorted(settings.path.rglob("*"))
    await backend.probe()
    assert sorted(settings.path.rglob("*")) == before
    assert await backend.get(Digest.of(data), offset=0, length=len(data)) == data


async def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match="is not there: mount it or run `castore init`"):
        await probe_backend(LocalSettings("disk", tmp_path / "objects"))
    assert not (tmp_path / "objects").exists()


async def test_what_a_killed_probe_left_is_removed(settings: LocalSettings) -> None:
    dead, alive, strange = (settings.path / f".castore-probe-{name}" for name in ("0" * 16, "1" * 16, "of somebody"))
    for folder in (dead, alive, strange):
        folder.mkdir()
        (folder / "left").write_bytes(b"x")
    fd = os.open(alive, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # as a probe holds it
        await probe_backend(settings)
        assert [folder.exists() for folder in (dead, alive, strange)] == [False, True, True]
    finally:
        os.close(fd)
    await probe_backend(settings)
    assert [folder.exists() for folder in (dead, alive, strange)] == [False, False, True]


async def test_a_probe_that_is_cancelled_leaves_nothing(settings: LocalSettings) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe_backend, settings)
        while not list(settings.path.glob(".castore-probe-*")):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    with trio.fail_after(60):
        while os.listdir(settings.path) != ["CASTORE-OBJECTS.txt"]:
            await probe_backend(settings)  # removes what a thread still made after it was abandoned
