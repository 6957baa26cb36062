"""Full disks under workspace, catalog, local backend and disk cache: what was closed is whole, and work goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mount.small_disk import MB, SmallDisk, small_disk
from tests.mount.store import MountedStore, fails, wait_until
from tests.mount.trees import assert_same
from tests.mount.waiting import WaitingPublish

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


@pytest.mark.parametrize("full", ["bound", "disk"])
def test_a_writer_waits_for_a_publish_that_makes_room(make_store: Make, disks: ExitStack, full: str) -> None:
    """And for nothing else: when the publish fails, or there is none, it is ENOSPC. Nobody else waits with it."""
    store = make_store('publish_wait = "20s"' + ('\nstaging_max_bytes = "40MiB"' if full == "bound" else ""))
    if full == "disk":
        disks.enter_context(small_disk(store.root / "state"))
        disks.callback(store.close)
        store.castore("init")
    store.mount()
    old, new, apart = store.ingest("old/1"), store.ingest("new/1"), store.ingest("apart/1")
    (apart / "small").write_bytes(b"before")
    for number in range(8):
        (old / f"{number}").write_bytes(data_of(number))
        store.wait_stored(old / f"{number}")
    with fails(errno.ENOSPC):
        write_megabytes(new / "alone", 60)
    (new / "alone").unlink()
    with ThreadPoolExecutor(2) as pool:
        publish = WaitingPublish(store, "old/1", pool)
        waiting = pool.submit(write_megabytes, new / "waits", 60)
        wait_until(lambda: is_full(new / "waits"), "the writer waits")
        assert not waiting.done()
        publish.fail()
        with fails(errno.EBUSY):
            publish.publish.result(60)
        with fails(errno.ENOSPC):
            waiting.result(60)
        publish.release()
        publish.close()
        (new / "waits").unlink()

        publish = WaitingPublish(store, "old/1", pool)
        waiting = pool.submit(write_megabytes, new / "waits", 36)
        wait_until(lambda: is_full(new / "waits"), "the writer waits")
        with (apart / "small").open("r+b") as file:
            file.write(b"behind")
        assert os.listdir(new) == ["waits"]
        assert store.status()["queue"]["receiving"]["file_count"] == 2
        assert (apart / "small").read_bytes() == b"behind"
        assert not waiting.done()
        publish.release()
        publish.publish.result(60)
        waiting.result(60)
        publish.close()
    check(store.package("old/1"), 8)
    assert (store.publish("new/1") / "waits").read_bytes() == bytes(36 * MB)


def write_megabytes(path: Path, count: int) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(bytes(MB))


def is_full(path: Path) -> bool:
    """Whether the next megabyte of a file that is being written does not fit."""
    if not path.exists() or not path.stat().st_size:
        return False
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize < MB


@pytest.mark.parametrize("daemon", [False, True], ids=["alone", "daemon"])
def test_an_import(make_store: Make, disks: ExitStack, tmp_path: Path, daemon: bool) -> None:
    """Exit 2 and one line that says what to do; nothing is published, and with room the same command goes on."""
    store, disk = store_on(make_store, disks, "state")
    if not daemon:
        store.umount()
    source = tmp_path / "source"
    source.mkdir()
    for number in range(8):
        (source / f"{number}").write_bytes(data_of(number))
    disk.fill(but_bytes=24 * MB)
    done = store.run("package", "import", str(source), "full/1")
    assert (done.returncode, done.stdout) == (2, "")
    line = done.stderr.splitlines()[-1]
    # What was being copied just then is not kept, and with nothing else that is nothing.
    kept = re.fullmatch(
        "castore: error: the disk of the staging folder is full"
        "(?:; ([1-7]) files stay staged in ingest/full/1, and the same command goes on from there)?",
        line,
    )
    assert kept, line
    assert json.loads(store.castore("package", "list", "--json"))["packages"] == []
    disk.empty()
    answer = json.loads(store.castore("package", "import", str(source), "full/1", "--json"))
    assert answer["kept_files"] == int(kept[1] or 0)
    assert answer["kept_files"] + answer["copied_files"] == 8
    if not daemon:
        store.mount()
    assert_same(store.package("full/1"), source)
    assert store.status()["staged_bytes"] == 0


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
