"""A thousand readers of a backend that hangs: what they leave to all others, and what is left of them when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from castore.blobs.fetch import FILL_SECONDS
from mount.fusectl import connection
from tests.mount.daemons import descriptor, resident_kib
from tests.mount.store import WAIT_SECONDS, MountedStore, wait_until
from tests.mount.test_deadlines import HangingBackend, at_once
from tests.mount.test_disk_cache import configure
from tests.places import Place
from tests.servers.seaweedfs import SeaweedFS

READERS = 1000
SIZE = 150_000
"""Of two blocks."""
WARM_SIZE = 8 << 20
KILLED_READERS = 40

_READ_ALL = """
import sys, threading
folder, first, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
wrong = []
def read(number):
    try:
        with open(f"{folder}/{number}", "rb", buffering=0) as file:
            data = file.read()
        if len(data) != int(sys.argv[4]) or data[:8] != number.to_bytes(8):
            wrong.append(number)
    except OSError as exc:
        wrong.append(exc)
threading.stack_size(1 << 16)
threads = [threading.Thread(target=read, args=(number,)) for number in range(first, end)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(bool(wrong))
"""


def requests_of(store: MountedStore) -> int:
    """That the kernel has sent to the daemon, or will send, and has no answer to."""
    with connection(str(os.minor(store.mnt.stat().st_dev))) as folder:
        file = os.open("waiting", os.O_RDONLY, dir_fd=folder)
        try:
            return int(os.read(file, 100))
        finally:
            os.close(file)


def published(store: MountedStore, count: int) -> Path:
    """A package of so many files that nobody has read; and another one, whose file the daemon has in memory."""
    rest = os.urandom(SIZE - 8)
    box = store.ingest("stall/1")
    for number in range(count):
        (box / str(number)).write_bytes(number.to_bytes(8) + rest)
    (store.ingest("warm/1") / "warm").write_bytes(os.urandom(WARM_SIZE))
    for ref in ("stall/1", "warm/1"):
        store.castore("package", "publish", ref)
    store.umount()
    configure(store, max_bytes=0)
    store.mount()
    (store.package("warm/1") / "warm").read_bytes()
    return store.package("stall/1")


@contextmanager
def readers(package: Path, count: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a thread for each file; killed in the end if it is still there."""
    program: list[str | Path] = [sys.executable, "-c", _READ_ALL, package, "0", str(count), str(SIZE)]
    with subprocess.Popen(program) as process:
        try:
            yield process
        finally:
            process.kill()


def in_time(work: Callable[[], object]) -> None:
    """Do it in a thread, so that a test whose mount hangs fails, and does not hang."""
    thread = threading.Thread(target=work, daemon=True)
    with at_once():
        thread.start()
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def blocks_asked_for_by_a_warm_read(store: MountedStore) -> int:
    """How often the daemon was asked for a block of a file that it has in memory, and the kernel has not."""
    before = store.status()["reads"]

    def read() -> None:
        with descriptor(store.package("warm/1") / "warm", os.O_RDONLY) as file:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            assert len(os.pread(file, WARM_SIZE, 0)) == WARM_SIZE

    in_time(read)
    after = store.status()["reads"]
    assert after["cache_misses"] == before["cache_misses"]
    return int(after["cache_hits"] - before["cache_hits"])


def test_a_thousand_stalled_readers_leave_the_rest_as_it_was(make_store: Callable[..., MountedStore]) -> None:
    """Names and attributes are answered, and what is cached is read in requests as large as before, not page by page.

    Their requests take turns in the daemon, and no memory before their bytes come. Then all of them are right.
    """
    backend = HangingBackend(make_store)
    store = backend.store
    try:
        package = published(store, READERS)
        alone = blocks_asked_for_by_a_warm_read(store)
        before_kib = resident_kib(store.pid)
        with readers(package, READERS) as process:
            with backend.hanging():
                wait_until(lambda: requests_of(store) >= READERS, "all readers stall")
                assert blocks_asked_for_by_a_warm_read(store) <= alone * 2
                in_time(lambda: [os.stat(package / str(number)) for number in range(READERS)])
                in_time(lambda: os.listdir(package))
                in_time(lambda: (store.ingest("stall/2") / "a").write_bytes(b"a"))
                assert requests_of(store) >= READERS, "they still do"
                assert resident_kib(store.pid) < before_kib + READERS * SIZE / 2 / 1024
            assert process.wait(WAIT_SECONDS) == 0, "and read the right bytes in the end"
    finally:
        store.close()  # before the one below it


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_nothing_is_left_of_readers_that_are_killed(
    make_store: Callable[..., MountedStore], place: Place, s3_server: SeaweedFS
) -> None:
    """They go at once; the daemon's requests for them go with the deadline of the backend, while it still hangs."""
    store = make_store(place=place)
    settings = 'type = "s3"\nread_timeout = "1s"\n'
    store.config.write_text(store.config.read_text().replace('type = "s3"\n', settings))
    store.mount()
    package = published(store, KILLED_READERS)
    s3_server.pause()
    try:
        with readers(package, KILLED_READERS) as process:
            wait_until(lambda: requests_of(store) >= KILLED_READERS, "all readers stall")
            process.send_signal(signal.SIGKILL)
            process.wait(WAIT_SECONDS)
            wait_until(lambda: requests_of(store) == 0, "nothing is left of them", FILL_SECONDS + WAIT_SECONDS)
            in_time(lambda: os.listdir(package))
    finally:
        s3_server.resume()
    with readers(package, 1) as process:
        assert process.wait(WAIT_SECONDS) == 0
