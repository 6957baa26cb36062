"""Each row of the table of faults of reads, on a real mount before a real server; and the table in docs/."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from castore.config import BackendSettings, load_config
from castore.digest import Digest
from castore.events import LOCATION_FAILED
from tests.damage import cut_short, flip_a_bit, remove
from tests.mount.crash_round import rows
from tests.mount.daemons import descriptor
from tests.mount.read_fault_table import (
    DOCUMENT,
    DOWN,
    DOWN_CACHED,
    FLIPPED,
    FLIPPED_EVERYWHERE,
    FLIPPED_IN_BOTH,
    FLIPPED_IN_CACHE,
    FLIPPED_ON_THE_WAY,
    HANGS,
    MISSING,
    ROWS,
    SLOW,
    TRUNCATED,
    Row,
    table,
    with_table,
)
from tests.mount.store import MountedStore
from tests.mount.test_disk_cache import cached_files, wait_kept
from tests.places import S3Place
from tests.servers.fault_proxy import Exchange, FaultProxy
from tests.servers.seaweedfs import SeaweedFS

SIZE: Final = 100_000
"""Of one block, and too large for the database of small blobs."""
FIRST, SECOND = "main", "second"
CACHED: Final = (FLIPPED_IN_CACHE, FLIPPED_IN_BOTH, FLIPPED_EVERYWHERE, DOWN_CACHED)


class ProxiedPlace(S3Place):
    """A bucket, each backend of it behind a proxy of its own."""

    def __init__(self, root: Path, server: SeaweedFS, proxies: ExitStack) -> None:
        super().__init__(root, server, None)
        self.proxies: dict[str, FaultProxy] = {}
        self._stack = proxies

    def _endpoint_url(self, backend_id: str) -> str:
        if backend_id not in self.proxies:
            port = urlsplit(self._server.endpoint_url).port
            assert port is not None
            self.proxies[backend_id] = self._stack.enter_context(FaultProxy(port))
        return self.proxies[backend_id].endpoint_url


class FaultyStore:
    """A mounted store with a package of one file for each row, none of which the kernel or the daemon's memory has.

    Some are in the disk cache, the others are not. Files of one package would be fetched together.
    """

    def __init__(self, root: Path, server: SeaweedFS, proxies: ExitStack, locations: int) -> None:
        self.place = ProxiedPlace(root, server, proxies)
        self.store = MountedStore(root, place=self.place)
        self._configure(locations)
        self.settings: dict[str, BackendSettings] = dict(load_config(self.store.config).backends)
        self.data = {row.fault: os.urandom(SIZE) for row in ROWS if row.locations == locations}
        self.store.castore("init")
        self._fill()

    def _configure(self, locations: int) -> None:
        text = self.store.config.read_text()
        if locations == 1:
            # A server that hangs is silent for as long in each try: four of them take 8 s instead of three 30 s.
            text = text.replace('type = "s3"\n', 'type = "s3"\nread_timeout = "2s"\n')
        else:
            rule = f'[[routing.rules]]\nbackend = "{FIRST}"\ncopies = ["{SECOND}"]\n'
            text = text.replace("[routing]", f"{self.place.section(SECOND)}[routing]").replace(
                "[http]", f"{rule}[http]"
            )
        self.store.config.write_text(text)

    def _fill(self) -> None:
        self.store.mount()
        for number, data in enumerate(self.data.values()):
            (self.store.ingest(f"faults/{number}") / "a").write_bytes(data)
            self.store.publish(f"faults/{number}")
        self.store.umount()
        shutil.rmtree(self.store.root / "cache", ignore_errors=True)
        self.store.mount()
        for fault in self.data:
            if fault in CACHED:
                assert self.read(fault) == self.data[fault]
        wait_kept(self.store)
        self.store.umount()
        self.store.mount()

    def path(self, fault: str) -> Path:
        return self.store.package(f"faults/{[*self.data].index(fault)}") / "a"

    def read(self, fault: str) -> bytes:
        """All of a file, by one request to the daemon, whose answer the kernel does not keep."""
        with descriptor(self.path(fault), os.O_RDONLY | os.O_DIRECT) as file:
            return os.pread(file, SIZE, 0)

    def digest(self, fault: str) -> Digest:
        return Digest.of(self.data[fault])

    def flip_in_cache(self, fault: str) -> None:
        name = f"{self.digest(fault).hex}.0"
        [path] = (path for path in cached_files(self.store.root / "cache") if path.name == name)
        with path.open("r+b") as file:
            file.seek(SIZE - 1)
            byte = file.read(1)[0]
            file.seek(SIZE - 1)
            file.write(bytes([byte ^ 1]))

    def gets(self, fault: str) -> tuple[int, ...]:
        """Of the file's object, since the proxies' last change: for each location."""
        return tuple(
            sum(request.method == "GET" and self.digest(fault).hex in request.target for request in proxy.requests)
            for proxy in self.place.proxies.values()
        )


@pytest.fixture(scope="module")
def stores(s3_server: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], FaultyStore]]:
    """The store whose blobs have so many locations; each is made when it is needed."""
    made: dict[int, FaultyStore] = {}
    with ExitStack() as proxies:

        def store(locations: int) -> FaultyStore:
            if locations not in made:
                made[locations] = FaultyStore(tmp_path_factory.mktemp("faults"), s3_server, proxies, locations)
                proxies.callback(made[locations].store.close)
            return made[locations]

        yield store
    for each in made.values():
        assert "Traceback" not in each.store.log(), each.store.log()


def flip(exchange: Exchange) -> bool:
    answer = exchange.ask()
    exchange.answer(answer.but(body=bytes([answer.body[0] ^ 1]) + answer.body[1:]))
    return True


def answer_late(exchange: Exchange) -> bool:
    answer = exchange.ask()
    threading.Event().wait(1)
    exchange.answer(answer)
    return True


def hang(exchange: Exchange) -> None:
    exchange.hang()


@contextmanager
def broken(faulty: FaultyStore, fault: str) -> Iterator[None]:
    """What is stored stays damaged; a server, or the way to it, is mended in the end."""
    first, digest = faulty.settings[FIRST], faulty.digest(fault)
    proxy = faulty.place.proxies[FIRST]
    if fault in CACHED and fault != DOWN_CACHED:
        faulty.flip_in_cache(fault)
    if fault in (FLIPPED, FLIPPED_IN_BOTH, FLIPPED_EVERYWHERE):
        flip_a_bit(first, digest)
    if fault == FLIPPED_EVERYWHERE:
        flip_a_bit(faulty.settings[SECOND], digest)
    if fault == TRUNCATED:
        cut_short(first, digest)
    if fault == MISSING:
        remove(first, digest)
    for each in faulty.place.proxies.values():
        each.break_with(flip, method="none")  # counts anew
    on_the_way = {FLIPPED_ON_THE_WAY: (flip, 1), SLOW: (answer_late, 1), HANGS: (hang, 1 << 30)}
    if fault in on_the_way:
        harm, times = on_the_way[fault]
        proxy.break_with(harm, method="GET", times=times)
    if fault in (DOWN, DOWN_CACHED):
        proxy.cut()
    yield
    if fault in (DOWN, DOWN_CACHED):
        proxy.restore()
    proxy.mend()


def location_events(faulty: FaultyStore, fault: str) -> list[tuple[str, str]]:
    query = f"SELECT data FROM events WHERE type = '{LOCATION_FAILED}' AND subject = '{faulty.digest(fault)}'"
    found = [json.loads(text) for (text,) in rows(faulty.store.state / "catalog.db", query)]
    return sorted((event["backend_id"], event["reason"]) for event in found)


@pytest.mark.parametrize("row", ROWS, ids=map(str, ROWS))
def test_a_read(stores: Callable[[int], FaultyStore], row: Row) -> None:
    faulty = stores(row.locations)
    read = partial(faulty.read, row.fault)
    with broken(faulty, row.fault):
        try:
            answer: bytes | int | None = read()
        except OSError as exc:
            answer = exc.errno
        assert answer == (row.number or faulty.data[row.fault])
        assert faulty.gets(row.fault) == row.gets
        failed = (FIRST, SECOND)[: len(row.gets) if row.fault == FLIPPED_EVERYWHERE else 1] if row.reason else ()
        statuses = os.getxattr(faulty.path(row.fault), "user.castore.status").decode().split(",")
        assert statuses == ["failed" if name in failed else "stored" for name in (FIRST, SECOND)[: row.locations]]
        assert location_events(faulty, row.fault) == [(name, row.reason) for name in failed]
        if not row.number:
            assert read() == faulty.data[row.fault], "from memory"
            assert faulty.gets(row.fault) == row.gets


def test_each_fault_has_both_rows() -> None:
    assert {(row.fault, row.locations) for row in ROWS if row.fault != FLIPPED_EVERYWHERE} == {
        (row.fault, locations) for row in ROWS if row.fault != FLIPPED_EVERYWHERE for locations in (1, 2)
    }


def test_the_document_has_the_table_of_now() -> None:
    """Else: python -m tests.mount.read_fault_table"""
    text = DOCUMENT.read_text()
    assert table() in text
    assert with_table(text) == text
