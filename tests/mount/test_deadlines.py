"""A backend that hangs, for real: its folder lies in the mount of another store, whose daemon is stopped.

Deadlines themselves take minutes here; that they end what hangs is shown in tests/storage/test_deadline.py.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from castore.mountinfo import mount_at
from tests.mount.daemons import STOP_SECONDS, descriptor
from tests.mount.store import MountedStore, fails, wait_until

SOON_SECONDS = 15.0
"""For what does not need the backend: far above what it takes even on a busy host, below any deadline of a backend."""


class HangingBackend:
    """A store whose backend can be made to hang, and to go on."""

    def __init__(self, make_store: Callable[..., MountedStore]) -> None:
        self.below = make_store()
        self.below.mount()
        self.store = make_store()
        objects = self.below.ingest("objects/1") / "o"
        text = self.store.config.read_text().replace(str(self.store.objects), str(objects))
        self.store.config.write_text(text)
        self.store.castore("init")
        self.store.mount()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        os.kill(self.below.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.below.pid, signal.SIGCONT)

    def published(self, version: str, data: bytes) -> Path:
        """A published file that nobody has read."""
        (self.store.ingest(f"hang/{version}") / "a").write_bytes(data)
        return self.store.publish(f"hang/{version}") / "a"


@pytest.fixture
def backend(make_store: Callable[..., MountedStore]) -> Iterator[HangingBackend]:
    made = HangingBackend(make_store)
    yield made
    made.store.close()  # before the one below it


@contextmanager
def at_once() -> Iterator[None]:
    """The block takes no longer than what needs no backend."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SOON_SECONDS


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run what will hang, in a thread that it may keep; what it gives, or raises, comes to the list."""
    answers: list[object] = []

    def run() -> None:
        try:
            answers.append(work())
        except OSError as exc:
            answers.append(exc.errno)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, answers


def test_only_what_needs_the_backend_waits_for_it(backend: HangingBackend) -> None:
    store = backend.store
    unread, read = os.urandom(300_000), os.urandom(300_000)
    cold, warm = backend.published("1", unread), backend.published("2", read)
    assert warm.read_bytes() == read
    with backend.hanging():
        threads = [in_thread(cold.read_bytes) for _ in range(4)]
        box = store.ingest("hang/3")
        with at_once():
            (box / "a").write_bytes(unread)
            assert (box / "a").read_bytes() == unread
            assert {path.name for path in (store.mnt / "packages/hang").iterdir()} == {"1", "2", "latest"}
            assert cold.stat().st_size == len(unread)
            assert warm.read_bytes() == read
            status = json.loads(store.castore("status", "--json"))["daemon"]
            assert status["package_count"] == 2
        assert not any(answers for _, answers in threads)
    for thread, answers in threads:
        thread.join(SOON_SECONDS)
        assert answers == [unread]
    assert (store.publish("hang/3") / "a").read_bytes() == unread


def test_publish_waits_no_longer_than_it_may(backend: HangingBackend) -> None:
    box = backend.store.ingest("hang/1")
    with backend.hanging():
        (box / "a").write_bytes(os.urandom(300_000))
        started = time.monotonic()
        with fails(errno.EBUSY):
            box.rename(backend.store.package("hang/1"))
        assert 5 <= time.monotonic() - started < 6 + 1
        reason = os.getxattr(box, "user.castore.error").decode()
        assert reason == "1 of 1 files (300000 bytes) are not stored yet; try again"
    backend.store.publish("hang/1")


def test_many_reads_that_hang_do_not_keep_those_that_do_not(backend: HangingBackend) -> None:
    """More of them than the kernel sends at a time by default, and than there are threads for reading."""
    data = [os.urandom(200_000) for _ in range(40)]
    box = backend.store.ingest("hang/1")
    for number, content in enumerate(data):
        (box / f"{number}").write_bytes(content)
    package = backend.store.publish("hang/1")
    warm = backend.published("2", data[0])
    assert warm.read_bytes() == data[0]
    with backend.hanging():
        threads = [in_thread((package / f"{number}").read_bytes) for number in range(1, 40)]
        with at_once(), descriptor(warm, os.O_RDONLY) as file:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file, len(data[0]), 0) == data[0]
        assert not any(answers for _, answers in threads)
    for number, (thread, answers) in enumerate(threads, 1):
        thread.join(SOON_SECONDS)
        assert answers == [data[number]]


@pytest.mark.parametrize("how", ["signal", "umount"])
def test_it_ends_all_the_same(backend: HangingBackend, how: str) -> None:
    store = backend.store
    cold = backend.published("1", os.urandom(300_000))
    with backend.hanging():
        (store.ingest("hang/2") / "a").write_bytes(b"not stored")
        program = "import sys; open(sys.argv[1], 'rb').read()"
        reader = subprocess.Popen([sys.executable, "-c", program, cold], stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: store.status()["reads"]["gets"], "the read hangs")
            started = time.monotonic()
            if how == "signal":
                store.kill(signal.SIGTERM)
            else:
                reader.kill()
                reader.wait(SOON_SECONDS)
                store.castore("umount", "--force", str(store.mnt))
                store.pid = 0
            assert time.monotonic() - started < STOP_SECONDS
            assert mount_at(store.mnt) is None
        finally:
            reader.kill()
            reader.wait(SOON_SECONDS)
    assert "1 files (10 bytes) stay staged" in store.log()
    store.mount()
    assert (store.publish("hang/2") / "a").read_bytes() == b"not stored"


def test_a_signal_lets_puts_go_on(backend: HangingBackend) -> None:
    store = backend.store
    with backend.hanging():
        (store.ingest("hang/1") / "a").write_bytes(b"stored in time")
        os.kill(store.pid, signal.SIGTERM)
        wait_until(lambda: "1 files (14 bytes) are not stored yet: waiting, at most 20 s" in store.log(), "it waits")
    wait_until(lambda: mount_at(store.mnt) is None, "the daemon has ended")
    assert "stay staged" not in store.log()
    wait_until(lambda: not Path(f"/proc/{store.pid}").exists(), "the process has ended")
    store.mount()
    assert store.status()["queue"]["stored"] == {"file_count": 1, "size_bytes": 14}


def test_a_second_signal_ends_it_at_once(backend: HangingBackend) -> None:
    store = backend.store
    with backend.hanging():
        (store.ingest("hang/1") / "a").write_bytes(b"not stored")
        os.kill(store.pid, signal.SIGTERM)
        wait_until(lambda: "are not stored yet: waiting" in store.log(), "it waits")
        with at_once():
            store.kill(signal.SIGTERM)
    assert "1 files (10 bytes) stay staged" in store.log()
