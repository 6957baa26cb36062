"""Equal bytes go to a server once, counted by what it is asked: while they are put, and after that."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from castore.digest import Digest
from castore.storage.layout import key_of
from tests.mount.parts_place import InParts
from tests.mount.store import MountedStore, wait_until
from tests.servers.fault_proxy import Exchange, FaultProxy
from tests.servers.seaweedfs import SeaweedFS

FILES = 16


@pytest.fixture
def proxy(s3_server: SeaweedFS) -> Iterator[FaultProxy]:
    port = urlsplit(s3_server.endpoint_url).port
    assert port is not None
    with FaultProxy(port) as proxy:
        yield proxy


def test_equal_bytes_are_put_once(
    make_store: Callable[..., MountedStore], s3_server: SeaweedFS, proxy: FaultProxy, tmp_path: Path
) -> None:
    place = InParts(tmp_path, s3_server, proxy)
    store = make_store(place=place)
    store.mount()
    data = os.urandom(100_000)
    go_on = threading.Event()

    def hold(exchange: Exchange) -> bool:
        assert go_on.wait(60)
        exchange.answer(exchange.ask())
        return True

    proxy.break_with(hold, method="PUT")
    boxes = [store.ingest("equal/1"), store.ingest("equal/2"), store.ingest("other/1")]
    paths = [box / f"{number}" for box in boxes for number in range(FILES)]
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda path: path.write_bytes(data), paths):
            pass
    wait_until(lambda: {store.state_of(path) for path in paths} == {"uploading"}, "all of them wait for one put")
    go_on.set()
    for ref in ("equal/1", "equal/2", "other/1"):
        assert (store.publish(ref) / "7").read_bytes() == data
    again = store.ingest("equal/3") / "a"
    again.write_bytes(data)
    store.wait_stored(again)
    store.publish("equal/3")
    puts = [request.target for request in proxy.requests if request.method == "PUT"]
    assert len([target for target in puts if target.endswith(key_of(Digest.of(data)))]) == 1
    assert len(puts) == 1 + 4, "beside it the manifests"
    place.close()
