"""A server that stops, is slow, or answers 503 in the middle of a scrub: no location becomes `failed` by it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio

from castore.storage.open import open_backend
from castore.verify.outcomes import Tally
from castore.verify.scrub import Scrub
from tests.places import S3Place
from tests.published import PublishedStore, numbered_files
from tests.servers.fault_proxy import Answer, Exchange, FaultProxy
from tests.servers.seaweedfs import SeaweedFS

COUNT = 200


class ProxyPlace(S3Place):
    """A bucket behind a proxy that does harm as it is told."""

    def __init__(self, root: Path, server: SeaweedFS, relays: ExitStack) -> None:
        super().__init__(root, server, relays)
        port = urlsplit(server.endpoint_url).port
        assert port is not None
        self.proxy = relays.enter_context(FaultProxy(port))
        self.begin: Callable[[], None] = self.proxy.mend
        """Has the harm begin."""

    def _endpoint_url(self, backend_id: str) -> str:
        return self.proxy.endpoint_url


@pytest.fixture
def behind_proxy(tmp_path: Path, s3_server: SeaweedFS) -> Iterator[ProxyPlace]:
    with ExitStack() as relays:
        yield ProxyPlace(tmp_path, s3_server, relays)


async def scrub_through(place: ProxyPlace, tmp_path: Path, outage_s: float = 60.0) -> tuple[PublishedStore, Tally]:
    """A scrub of COUNT objects; whatever it met, nothing is failed by it."""
    store = await PublishedStore(tmp_path, place, "first").create()
    place.proxy.mend()
    await store.publish("demo/1", numbered_files(COUNT - 1), "first")
    place.begin()
    run = Scrub(store.catalog_path, store.backends, outage_s=outage_s)
    with trio.fail_after(120):
        await run.run()
    assert place.proxy.met
    assert run.tally.counts["failed"] == 0
    assert not [event for event in store.events() if event.get("status") == "failed"]
    await store.aclose()
    return store, run.tally


def busy(exchange: Exchange) -> bool:
    exchange.answer(Answer(503, {"content-length": "0", "retry-after": "1"}, b""))
    return True


def slow(exchange: Exchange) -> None:
    answer = exchange.ask()
    exchange.drip(answer.head + answer.body, 0.001)


async def test_503_for_a_while(behind_proxy: ProxyPlace, tmp_path: Path) -> None:
    behind_proxy.begin = lambda: behind_proxy.proxy.break_with(busy, first=60, times=40)
    _, tally = await scrub_through(behind_proxy, tmp_path)
    assert (tally.counts["verified"], tally.stopped) == (COUNT, {})


async def test_a_slow_server(behind_proxy: ProxyPlace, tmp_path: Path) -> None:
    behind_proxy.begin = lambda: behind_proxy.proxy.break_with(slow, method="GET", first=60, times=30)
    _, tally = await scrub_through(behind_proxy, tmp_path)
    assert (tally.counts["verified"], tally.stopped) == (COUNT, {})


async def test_a_server_that_is_started_anew(behind_proxy: ProxyPlace, tmp_path: Path) -> None:
    proxy, down = behind_proxy.proxy, threading.Event()

    def stop(_exchange: Exchange) -> None:
        proxy.cut()
        down.set()

    behind_proxy.begin = lambda: proxy.break_with(stop, first=60, times=1)

    async def start_anew() -> None:
        await trio.to_thread.run_sync(down.wait, 60)
        await trio.sleep(1)  # how long it is away
        proxy.restore()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start_anew)
        _, tally = await scrub_through(behind_proxy, tmp_path)
    assert (tally.counts["verified"], tally.stopped) == (COUNT, {})


async def test_a_server_that_stays_away(behind_proxy: ProxyPlace, tmp_path: Path) -> None:
    proxy = behind_proxy.proxy
    behind_proxy.begin = lambda: proxy.break_with(lambda _: proxy.cut(), first=60, times=1)
    store, tally = await scrub_through(behind_proxy, tmp_path, outage_s=0)
    assert list(tally.stopped) == ["first"]
    assert tally.counts["unreachable"] > 0
    assert tally.counts["verified"] < COUNT
    proxy.restore()
    for backend_id in list(store.backends):
        store.backends[backend_id] = open_backend(store.config.backends[backend_id])
    run = Scrub(store.catalog_path, store.backends)
    await run.run()
    assert run.tally.counts["verified"] == COUNT
    for backend in store.backends.values():
        await backend.aclose()
