"""Faults that were found in use, on real mounts: each test failed before its fault was mended."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from castore.api.control_client import ControlClient
from castore.errors import CastoreError
from tests.mount.daemons import descriptor
from tests.mount.store import MountedStore, fails, wait_until


@contextmanager
def limited(store: MountedStore, what: int, most: int) -> Iterator[None]:
    """The daemon may use no more of a resource inside the block: as on a full disk, or with too many files open."""
    before = resource.prlimit(store.pid, what)
    resource.prlimit(store.pid, what, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(store.pid, what, before)


@contextmanager
def full_workspace(store: MountedStore) -> Iterator[None]:
    """The workspace's log cannot grow inside the block, so nothing can be committed; smaller files can be written."""
    log = store.state / "staging/workspace.db-wal"
    with limited(store, resource.RLIMIT_FSIZE, log.stat().st_size):
        yield


def _into_another_version(store: MountedStore) -> Path:
    (store.mnt / "ingest/moved/1").rename(store.ingest("other/1") / "inside")
    return store.mnt / "ingest/other/1/inside"


def _to_another_version(store: MountedStore) -> Path:
    (store.mnt / "ingest/moved/1").rename(store.mnt / "ingest/moved/2")
    return store.mnt / "ingest/moved/2"


def _under_another_name(store: MountedStore) -> Path:
    (store.mnt / "ingest/moved").rename(store.mnt / "ingest/renamed")
    (store.mnt / "ingest/moved").mkdir()
    (store.mnt / "ingest/moved").rmdir()
    return store.mnt / "ingest/renamed/1"


@pytest.mark.parametrize("move", [_into_another_version, _to_another_version, _under_another_name])
def test_a_version_that_is_moved_while_a_command_publishes_it(
    store: MountedStore, move: Callable[[MountedStore], Path]
) -> None:
    box = store.ingest("moved/1")
    (box / "precious").write_text("precious")
    waited_for = os.open(box / "open", os.O_WRONLY | os.O_CREAT)
    os.write(waited_for, b"closed once")
    with fails(errno.EBUSY):
        box.rename(store.package("moved/1"))
    os.close(os.dup(waited_for))

    def publish() -> str:
        try:
            ControlClient(store.state / "run/control.sock").call("publish", ref="moved/1")
        except CastoreError as exc:
            return str(exc)
        return ""

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(publish)
        # A publish that begins forgets why the last one failed.
        wait_until(lambda: not store.status()["versions"][0]["error"], "the publish waits")
        moved = move(store)
        os.close(waited_for)
        assert "ingest/moved/1 was" in answer.result(60) or "moved into another" in answer.result(60)
    assert (moved / "precious").read_text() == "precious"
    assert os.listdir(store.mnt / "packages") == []


def test_a_full_workspace_ends_nothing(store: MountedStore) -> None:
    box = store.ingest("full/1")
    (box / "cut").write_text("old")
    store.wait_stored(box / "cut")
    for number in range(10):
        (box / f"{number}").write_bytes(b"%d" % number)
    late = os.open(box / "late", os.O_WRONLY | os.O_CREAT)
    os.pwrite(late, b"not front to back", 5)
    with full_workspace(store):
        with fails(errno.EIO):
            os.close(late)
        with fails(errno.EIO):
            os.open(box / "cut", os.O_WRONLY | os.O_TRUNC)
        wait_until(lambda: "has no digest yet" in store.log(), "the daemon met the full workspace")
    for path in box.iterdir():
        store.wait_stored(path)
    package = store.publish("full/1")
    assert (package / "cut").read_text() == "old"
    assert (package / "late").read_bytes() == b"\0" * 5 + b"not front to back"
    assert all((package / f"{number}").read_bytes() == b"%d" % number for number in range(10))


def test_a_file_that_cannot_be_made_leaves_no_name(store: MountedStore) -> None:
    box = store.ingest("descriptors/1")
    with limited(store, resource.RLIMIT_NOFILE, 3), fails(errno.ENFILE):
        (box / "file").touch()
    assert os.listdir(box) == []
    (box / "file").write_text("made later")
    assert (store.publish("descriptors/1") / "file").read_text() == "made later"


def test_bytes_that_were_not_written_are_not_counted(store: MountedStore) -> None:
    with open(store.ingest("short/1") / "file", "wb", buffering=0) as file:
        file.write(b"x" * 1000)
        with limited(store, resource.RLIMIT_FSIZE, 1500):
            assert os.pwrite(file.fileno(), b"y" * 1000, 1000) == 500
            for _ in range(3):
                with fails(errno.EFBIG):
                    os.pwrite(file.fileno(), b"y" * 1000, 1500)
            with fails(errno.EFBIG):
                os.truncate(file.fileno(), 5000)
        assert store.status()["staged_bytes"] == 1500


@pytest.mark.parametrize("order", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_a_file_that_is_opened_with_o_trunc_is_cut_however_it_is_opened(store: MountedStore, order: int) -> None:
    path = store.ingest("cut/1") / "file"
    path.write_bytes(b"old" * 50_000)
    os.close(os.open(path, order | os.O_TRUNC))
    assert path.read_bytes() == b""
    assert (store.publish("cut/1") / "file").read_bytes() == b""


@pytest.mark.parametrize("seconds", [2**34, 2**62, -(2**34), -(2**62)])
def test_a_time_that_no_column_holds_becomes_the_nearest(store: MountedStore, seconds: int) -> None:
    path = store.ingest("far/1") / "file"
    with path.open("w") as file:
        for place in (path, file.fileno(), path.parent):
            os.utime(place, (seconds, seconds))
            assert abs(os.stat(place).st_mtime_ns) == 2**63 - 1
    status = (store.publish("far/1") / "file").stat()
    assert status.st_mtime_ns == (2**63 - 1) * (1 if seconds > 0 else -1)


def test_an_attribute_without_a_name_is_refused(store: MountedStore) -> None:
    path = store.ingest("attribute/1") / "file"
    path.write_text("x")
    for flags in (0, os.XATTR_CREATE, os.XATTR_REPLACE):
        with fails(errno.EINVAL):
            os.setxattr(path, "user.", b"x", flags)
    for refused in (os.getxattr, os.removexattr):
        with fails(errno.EINVAL):
            refused(path, "user.")
    assert os.listxattr(path) == []


def test_a_file_that_was_made_for_reading_holds_up_no_publish(store: MountedStore) -> None:
    path = store.ingest("reader/1") / "file"
    with descriptor(path, os.O_RDONLY | os.O_CREAT) as reader:
        path.write_bytes(b"by another handle")
        store.wait_stored(path)
        path.parent.rename(store.package("reader/1"))
        assert os.read(reader, 100) == b"by another handle"
