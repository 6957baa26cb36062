"""Full disks under workspace, catalog, local backend and disk cache: what was closed is whole, and work goes on."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mount.small_disk import MB, SmallDisk, small_disk
from tests.mount.store import MountedStore, fails, wait_until

Make = Callable[..., MountedStore]


@pytest.fixture
def disks(make_store: Make) -> Iterator[ExitStack]:
    """Unmounts small disks before the stores above them are cleared away, but after their daemons."""
    with ExitStack() as stack:
        yield stack


def store_on(make_store: Make, disks: ExitStack, folder: str, kind: str = "tmpfs") -> tuple[MountedStore, SmallDisk]:
    """A store of which one folder is a small disk: mounted."""
    store = make_store()
    disk = disks.enter_context(small_disk(store.root / folder, kind))
    disks.callback(store.close)
    store.castore("init")
    store.mount()
    return store, disk


def data_of(number: int) -> bytes:
    return random.Random(number).randbytes(4 * MB)


def write_until_full(box: Path) -> list[Path]:
    """Files of 4 MiB, until there is no room; those that were closed without an error."""
    closed: list[Path] = []
    while len(closed) < 100:
        path = box / f"{len(closed)}"
        try:
            path.write_bytes(data_of(len(closed)))
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            return closed
        closed.append(path)
    raise AssertionError("400 MiB fit on a small disk")


def check(folder: Path, count: int) -> None:
    for number in range(count):
        assert (folder / f"{number}").read_bytes() == data_of(number), number


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_staging(make_store: Make, disks: ExitStack, kind: str) -> None:
    store, _ = store_on(make_store, disks, "state", kind)
    box = store.ingest("full/1")
    closed = write_until_full(box)
    assert len(closed) >= 8
    with fails(errno.ENOSPC), open(closed[0], "ab", buffering=0) as file:
        while True:
            file.write(bytes(MB))
    os.truncate(closed[0], 4 * MB)
    (box / f"{len(closed)}").unlink()
    check(box, len(closed))
    room = os.statvfs(store.mnt)
    assert room.f_bavail * room.f_frsize < 8 * MB
    store.kill()
    store.mount()
    check(box, len(closed))
    check(store.publish("full/1"), len(closed))
    wait_until(lambda: store.status()["staged_bytes"] == 0, "staging is empty")
    more = store.ingest("full/2")
    for number in range(8):
        (more / f"{number}").write_bytes(data_of(number))
    check(store.publish("full/2"), 8)


def test_the_disk_of_the_catalog(make_store: Make, disks: ExitStack) -> None:
    """Somebody else takes the very last byte: nothing can be committed, and what is published reads on."""
    store, disk = store_on(make_store, disks, "state")
    (store.ingest("before/1") / "0").write_bytes(data_of(0))
    package = store.publish("before/1")
    box = store.ingest("full/1")
    (box / "0").write_bytes(data_of(0))
    disk.fill()
    with fails(errno.ENOSPC):
        for number in range(2000):
            (box / f"more {number}").write_bytes(b"more" * 2000)
    check(package, 1)
    check(box, 1)
    made = {path.name for path in box.iterdir()}
    with fails(errno.ENOSPC):
        box.rename(store.package("full/1"))
    store.kill()
    assert store.run("mount", str(store.mnt), "--background").returncode in (0, 2)
    disk.empty()
    store.close()
    store.mount()
    check(package, 1)
    check(box, 1)
    assert {path.name for path in box.iterdir()} == made
    check(store.publish("full/1"), 1)


def test_a_local_backend(make_store: Make, disks: ExitStack) -> None:
    """Closed files stay staged, whoever waits for them is told, and they are stored once there is room."""
    store, disk = store_on(make_store, disks, "objects")
    (store.ingest("before/1") / "0").write_bytes(data_of(0))
    package = store.publish("before/1")
    disk.fill(but_bytes=10 * MB)
    box = store.ingest("full/1")
    for number in range(6):
        (box / f"{number}").write_bytes(data_of(number))
    wait_until(lambda: store.status()["queue"]["failed"]["file_count"], "puts fail")
    with fails(errno.ENOSPC):
        os.fsync(descriptor := os.open(box, os.O_RDONLY))
    os.close(descriptor)
    with fails(errno.EBUSY):
        box.rename(store.package("full/1"))
    assert b"No space left on device" in os.getxattr(box, "user.castore.error")
    assert "No space left on device" in store.castore("status")
    check(box, 6)
    check(package, 1)
    disk.empty()
    check(store.publish("full/1"), 6)
    assert list(store.objects.rglob(".castore-put-*")) == []


def test_the_disk_cache(make_store: Make, disks: ExitStack) -> None:
    """A full one makes no close, no publish and no read fail, and is used again when there is room."""
    store = make_store()
    store.config.write_text(store.config.read_text().replace("seed = false", "seed = true"))
    disk = disks.enter_context(small_disk(store.root / "cache"))
    disks.callback(store.close)
    store.mount()
    disk.fill()
    box = store.ingest("full/1")
    for number in range(20):
        (box / f"{number}").write_bytes(data_of(number))
    package = store.publish("full/1")
    check(package, 20)
    disk.empty()
    store.umount()
    store.mount()
    wait_until(lambda: read_all(package) and disk.free_bytes() < 62 * MB, "the cache is used again", seconds=90)
    assert disk.free_bytes() > 0
    check(package, 20)


def read_all(package: Path) -> bool:
    check(package, 4)
    return True
