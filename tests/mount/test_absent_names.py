"""Names that are not there: how soon they are when another process publishes them, and where the kernel may keep it."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from castore.mountinfo import mount_at
from tests.mount.store import MountedStore, fails, run_tool, wait_until

ANSWER_SECONDS = 20.0
"""For what the kernel knows by itself, which takes microseconds."""


@pytest.fixture
def second(store: MountedStore) -> Iterator[Path]:
    """A read-only mount of the same store."""
    path = store.root / "second"
    path.mkdir()
    store.castore("mount", str(path), "-o", "ro", "--background")
    yield path
    while mount_at(path) is not None:
        run_tool("fusermount3", "-uz", path)


def ask_in_vain(*paths: Path) -> None:
    """As tools do that look at the same name over and over."""
    for _ in range(3):
        for path in paths:
            with fails(errno.ENOENT):
                os.stat(path)


def test_a_version_of_another_mount_is_there_at_once(store: MountedStore, second: Path) -> None:
    one, two = second / "packages/one/1", second / "packages/two/1"
    ask_in_vain(one, one / "file", one.parent, one.parent / "latest")
    (store.ingest("one/1") / "file").write_text("first")
    ask_in_vain(one, one.parent)
    store.publish("one/1")
    assert (one / "file").read_text() == "first"
    assert (one.parent / "latest").readlink() == Path("1")
    newer = second / "packages/one/2"
    ask_in_vain(newer, newer / "file", two)
    (store.ingest("one/2") / "file").write_text("second")
    store.publish("one/2")
    assert (newer / "file").read_text() == "second"  # in a NAME that is known
    ask_in_vain(two)


@pytest.mark.parametrize("writing", [True, False], ids=["by the daemon", "by the command"])
def test_what_a_command_publishes_is_there_at_once(
    store: MountedStore, second: Path, tmp_path: Path, writing: bool
) -> None:
    mounts = [store.mnt, second] if writing else [second]
    if not writing:
        store.umount()
    (tmp_path / "box").mkdir()
    (tmp_path / "box/file").write_text("bytes")
    for version in ("1", "2"):
        packages = [mount / "packages/lib" / version for mount in mounts]
        ask_in_vain(*packages, *(package / "file" for package in packages))
        store.castore("package", "import", str(tmp_path / "box"), f"lib/{version}")
        for package in packages:
            assert (package / "file").read_text() == "bytes"


def test_a_name_that_came_and_went_keeps_nothing_absent(store: MountedStore) -> None:
    """`packages/NAME` is another directory when `ingest/NAME` is made again, which is noticed within a second."""
    for _ in range(2):
        store.ingest("lib/1")
        assert store.package("lib").is_dir()
        ask_in_vain(store.package("lib/1"))
        (store.mnt / "ingest/lib/1").rmdir()
        (store.mnt / "ingest/lib").rmdir()
        ask_in_vain(store.package("lib/1"))
    (store.ingest("lib/1") / "file").write_text("bytes")
    store.castore("package", "publish", "lib/1")
    file = store.package("lib/1") / "file"
    wait_until(file.exists, "the version is there", seconds=5)
    assert file.read_text() == "bytes"


def test_below_a_version_the_kernel_keeps_what_is_absent(store: MountedStore) -> None:
    """Who looks for headers in many folders asks the daemon once for each."""
    box = store.ingest("lib/1") / "include"
    box.mkdir()
    (box / "there.h").write_text("x")
    folder = os.open(store.publish("lib/1") / "include", os.O_RDONLY)

    def look(name: str) -> int:
        try:
            os.stat(name, dir_fd=folder)
        except OSError as exc:
            return exc.errno or 0
        return 0

    asked = {"there.h": 0, "absent.h": errno.ENOENT}
    try:
        assert {name: look(name) for name in asked} == asked
        os.kill(store.pid, signal.SIGSTOP)
        try:
            assert in_time(lambda: {name: look(name) for name in asked}) == asked
        finally:
            os.kill(store.pid, signal.SIGCONT)
    finally:
        os.close(folder)


def in_time(work: Callable[[], object]) -> object:
    """What it gives; None when somebody has to be asked who does not answer."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(work()), daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] if answers else None
