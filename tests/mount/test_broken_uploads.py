"""A daemon that dies, or a file that goes, in the middle of a put in parts: nothing unfinished stays in the bucket."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from tests.mount.crash_round import rows
from tests.mount.parts_place import PART, UNAVAILABLE, InParts
from tests.mount.store import MountedStore, wait_until
from tests.servers.every import S3_SERVERS, EveryServer
from tests.servers.fault_proxy import Exchange, FaultProxy

HERE: Final = [name for name in S3_SERVERS if name in ("seaweedfs", "rgw")]


@pytest.fixture
def proxy(every_server: EveryServer, name: str) -> Iterator[FaultProxy]:
    port = urlsplit(every_server[name].endpoint_url).port
    assert port is not None
    with FaultProxy(port) as proxy:
        yield proxy


@pytest.fixture
def parts_place(every_server: EveryServer, name: str, proxy: FaultProxy, tmp_path: Path) -> Iterator[InParts]:
    place = InParts(tmp_path, every_server[name], proxy)
    yield place
    place.close()


@pytest.fixture
def store(make_store: Callable[..., MountedStore], parts_place: InParts) -> MountedStore:
    made = make_store(place=parts_place)
    made.mount()
    return made


def hang(exchange: Exchange) -> None:
    exchange.hang()


def unavailable(exchange: Exchange) -> bool:
    exchange.answer(UNAVAILABLE)
    return True


def begin(store: MountedStore, proxy: FaultProxy, place: InParts, path: Path) -> bytes:
    """A file of five parts whose put has sent all but the third, which hangs."""
    data = random.Random(str(path)).randbytes(4 * PART + 1)
    proxy.break_with(hang, method="PUT", value=("partNumber", "3"))
    path.write_bytes(data)
    wait_until(lambda: place.parts(data) == [1, 2, 4, 5], "all parts but one are there")
    return data


def sent_parts(proxy: FaultProxy) -> list[str]:
    return sorted(request.query["partNumber"] for request in proxy.requests if "partNumber" in request.query)


def nothing_is_left(store: MountedStore, place: InParts, data: bytes) -> None:
    wait_until(lambda: place.uploads(data) == [], "no upload is left")
    wait_until(lambda: rows(store.state / "catalog.db", "SELECT * FROM put_intents") == [], "no put is intended")


@pytest.mark.parametrize("name", HERE, scope="session")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_daemon_goes_on(
    store: MountedStore, proxy: FaultProxy, parts_place: InParts, number: signal.Signals
) -> None:
    path = store.ingest("resume/1") / "big"
    data = begin(store, proxy, parts_place, path)
    store.kill(number)
    proxy.break_with(hang, times=0)
    store.mount()
    store.wait_stored(path)
    assert sent_parts(proxy) == ["3"], "what the server had is not sent again"
    nothing_is_left(store, parts_place, data)
    assert (store.publish("resume/1") / "big").read_bytes() == data


@pytest.mark.parametrize("name", HERE, scope="session")
def test_a_file_discarded_while_it_is_put(store: MountedStore, proxy: FaultProxy, parts_place: InParts) -> None:
    path = store.ingest("discard/1") / "big"
    data = begin(store, proxy, parts_place, path)
    path.unlink()
    nothing_is_left(store, parts_place, data)
    assert not any(state["file_count"] for state in store.status()["queue"].values())
    (path.parent / "small").write_bytes(b"the next")
    store.wait_stored(path.parent / "small")


@pytest.mark.parametrize("name", HERE, scope="session")
def test_a_file_discarded_after_its_put_failed(store: MountedStore, proxy: FaultProxy, parts_place: InParts) -> None:
    """The server does not even let the daemon clear away at first: what the put left goes as soon as it can."""
    path = store.ingest("failed/1") / "big"
    proxy.break_with(unavailable, method="PUT", value=("partNumber", "3"))
    data = os.urandom(4 * PART + 1)
    path.write_bytes(data)
    wait_until(lambda: store.state_of(path).startswith("failed"), "the put fails")
    path.unlink()
    assert len(parts_place.uploads(data)) == 1
    proxy.break_with(unavailable, times=5)
    nothing_is_left(store, parts_place, data)


@pytest.mark.parametrize("name", HERE, scope="session")
def test_a_file_that_changes_while_it_is_put(store: MountedStore, proxy: FaultProxy, parts_place: InParts) -> None:
    path = store.ingest("change/1") / "big"
    data = begin(store, proxy, parts_place, path)
    proxy.mend()
    with open(path, "r+b") as file:
        file.write(b"other")
    store.wait_stored(path)
    nothing_is_left(store, parts_place, data)
    assert parts_place.uploads(b"other" + data[5:]) == []
    assert (store.publish("change/1") / "big").read_bytes() == b"other" + data[5:]


@pytest.mark.parametrize("name", HERE, scope="session")
def test_another_file_with_the_same_bytes_is_still_put(
    store: MountedStore, proxy: FaultProxy, parts_place: InParts
) -> None:
    path = store.ingest("twice/1") / "big"
    data = begin(store, proxy, parts_place, path)
    (path.parent / "copy").write_bytes(data)
    wait_until(lambda: store.state_of(path.parent / "copy") == "uploading", "it waits for the same put")
    path.unlink()
    proxy.break_with(hang, times=0)
    store.kill()
    store.mount()
    store.wait_stored(path.parent / "copy")
    nothing_is_left(store, parts_place, data)
    assert (store.publish("twice/1") / "copy").read_bytes() == data


@pytest.mark.parametrize("name", HERE, scope="session")
@pytest.mark.parametrize("change", [os.unlink, lambda path: os.truncate(path, 1)], ids=["discarded", "changed"])
def test_killed_before_it_could_clear_away(
    store: MountedStore, proxy: FaultProxy, parts_place: InParts, change: Callable[[Path], None]
) -> None:
    """The next daemon knows of the put by its intent, and of no file that wants it."""
    path = store.ingest("killed/1") / "big"
    data = begin(store, proxy, parts_place, path)
    proxy.break_with(hang)
    change(path)
    wait_until(lambda: proxy.met, "the daemon tries to clear away")
    store.kill()
    assert len(parts_place.uploads(data)) == 1
    proxy.mend()
    store.mount()
    nothing_is_left(store, parts_place, data)
    assert "an earlier daemon began is abandoned" in store.log()
