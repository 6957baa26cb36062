"""Small files fetched ahead under a real mount of a real server: what the server is asked for, and when."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from castore.blobs.sibling_flights import SIBLING_GETS
from castore.blobs.siblings import WINDOW_MIN_FILES
from tests.mount.store import WAIT_SECONDS, MountedStore, run_tool, wait_until
from tests.mount.test_disk_cache import configure
from tests.places import S3Place
from tests.servers.fault_proxy import Exchange, FaultProxy
from tests.servers.seaweedfs import SeaweedFS

FOLDERS, FILES = 5, 20
SIZE = 32 * 1024


class Gate:
    """Lets the gets of objects through, all of them or so many; the others wait until it is opened."""

    def __init__(self) -> None:
        self.gets: list[str] = []
        """The digests that were asked for."""
        self.most = 0
        """Gets that were under way at a time."""
        self._through = 1 << 30
        self.under_way = 0
        self._changed = threading.Condition()

    def close_after(self, count: int) -> None:
        with self._changed:
            self._through = count
            self._changed.notify_all()

    def open(self) -> None:
        self.close_after(1 << 30)

    def __call__(self, exchange: Exchange) -> bool:
        if "/sha256/" not in exchange.request.target:
            exchange.answer(exchange.ask())
            return True
        with self._changed:
            self.gets.append(exchange.request.target.partition("?")[0].rsplit("/", 1)[1])
            number = len(self.gets)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            assert self._changed.wait_for(lambda: number <= self._through, timeout=WAIT_SECONDS)
        exchange.answer(exchange.ask())
        with self._changed:
            self.under_way -= 1
        return True


@pytest.fixture
def proxy(s3_server: SeaweedFS) -> Iterator[FaultProxy]:
    with FaultProxy(int(s3_server.endpoint_url.rsplit(":", 1)[1])) as made:
        yield made


@pytest.fixture
def make_cold(
    make_store: Callable[..., MountedStore], s3_server: SeaweedFS, proxy: FaultProxy, tmp_path: Path
) -> Callable[[str], list[Path]]:
    """Publishes a package of small files and mounts it with nothing in any cache; the files, in order."""

    def make(prefetch: str) -> list[Path]:
        store = make_store(place=S3Place(tmp_path, s3_server, None))
        store.config.write_text(store.config.read_text().replace(s3_server.endpoint_url, proxy.endpoint_url))
        configure(store, seed="false", tiny_bytes=0, prefetch_siblings=prefetch)
        store.mount()
        box = store.ingest("lib/1")
        names = [f"d{folder}/f{number:02}" for folder in range(FOLDERS) for number in range(FILES)]
        for name in names:
            (box / name).parent.mkdir(exist_ok=True)
            (box / name).write_bytes(data_of(name))
        package = store.publish("lib/1")
        store.umount()
        store.mount()
        return [package / name for name in names]

    return make


def data_of(name: str) -> bytes:
    return hashlib.shake_256(name.encode()).digest(SIZE)


def digest_of(path: Path) -> str:
    return hashlib.sha256(data_of("/".join(path.parts[-2:]))).hexdigest()


def test_the_next_files_are_fetched_together(make_cold: Callable[[str], list[Path]], proxy: FaultProxy) -> None:
    files = make_cold("true")
    gate = Gate()
    gate.close_after(3)
    proxy.break_with(gate, method="GET")
    for path in files[:3]:
        assert path.read_bytes() == data_of("/".join(path.parts[-2:]))
    wait_until(lambda: len(gate.gets) == 3 + WINDOW_MIN_FILES, "the next files are asked for")
    assert gate.most == WINDOW_MIN_FILES
    assert set(gate.gets) == {digest_of(path) for path in files[: 3 + WINDOW_MIN_FILES]}
    gate.close_after(40)
    with ThreadPoolExecutor() as pool:
        said = pool.submit(run_tool, "sha256sum", *files)
        wait_until(lambda: gate.under_way >= SIBLING_GETS, "more and more are under way")
        gate.open()
        assert [line.split()[0] for line in said.result().splitlines()] == [digest_of(path) for path in files]
    assert sorted(gate.gets) == sorted(digest_of(path) for path in files)  # each once


def test_several_processes_that_read_a_list(make_cold: Callable[[str], list[Path]], proxy: FaultProxy) -> None:
    files = make_cold("true")
    gate = Gate()
    gate.close_after(40)
    proxy.break_with(gate, method="GET")
    with ThreadPoolExecutor() as pool:
        said = pool.submit(run_tool, "xargs", "-P", "4", "-n", "25", "sha256sum", input="\n".join(map(str, files)))
        wait_until(lambda: gate.under_way > 4, "more are under way than there are processes")
        gate.open()
        digests = sorted(line.split()[0] for line in said.result().splitlines())
    assert digests == sorted(digest_of(path) for path in files)
    assert sorted(gate.gets) == digests  # each once


def test_switched_off_each_file_is_fetched_when_it_is_read(
    make_cold: Callable[[str], list[Path]], proxy: FaultProxy
) -> None:
    files = make_cold("false")
    gate = Gate()
    proxy.break_with(gate, method="GET")
    for path in files:
        assert path.read_bytes() == data_of("/".join(path.parts[-2:]))
        assert gate.gets[-1] == digest_of(path)
    assert gate.most == 1
    assert len(gate.gets) == len(files)
