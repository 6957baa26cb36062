"""Events from a catalog to real sinks: in order, at least once, each sink by itself; and old ones away."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from castore.api.deliveries import BATCH_BYTES, GIVE_UP_TRIES, Deliveries
from castore.catalog.delivery import Delivery, DeliveryReader
from castore.catalog.writer import CatalogWriter
from castore.config import Config
from castore.config_events import EventFileSettings, EventSettings, WebhookSettings
from castore.config_values import SecretRef
from castore.errors import StateLocked
from castore.events import LOCATION_STORED, PACKAGE_PUBLISHED, Event
from tests.published import PublishedStore
from tests.servers.webhook_receiver import WebhookReceiver, half, hang_up, slow, status

PATIENCE_S = 60.0
DAY_NS = 86_400 * 10**9


def stored(number: int, *, time_ns: int = 0) -> Event:
    digest = f"sha256:{number:064x}"
    data: dict[str, Any] = {
        "backend_id": "first",
        "source_backend_id": None,
        "digest": digest,
        "size_bytes": number,
        "packages": [],
        "duration_ms": None,
    }
    return Event(type=LOCATION_STORED, subject=digest, data=data, time_ns=time_ns or time.time_ns())


def published(number: int, *, time_ns: int = 0, producer: str = "tests") -> Event:
    data = {
        "name": "p",
        "version": str(number),
        "producer": producer,
        "retention_class": "standard",
        "publisher_uid": 0,
        "backend_ids": ["first"],
        "file_count": number,
        "size_bytes": 0,
        "manifest_digest": f"manifest-sha256:{'0' * 64}",
    }
    return Event(type=PACKAGE_PUBLISHED, subject=f"p/{number}", data=data, time_ns=time_ns or time.time_ns())


def add(store: PublishedStore, *events: Event) -> None:
    store.write(lambda transaction: transaction.add_events(events))


@pytest.fixture
def receiver() -> WebhookReceiver:
    return WebhookReceiver()


class Sinks:
    """Settings of both sinks, the receiver's as soon as it listens."""

    def __init__(self, folder: Path, receiver: WebhookReceiver) -> None:
        self.path = folder / "events.jsonl"
        self.secret = folder / "secret"
        self.secret.write_bytes(receiver.secret)
        self._receiver = receiver

    def file(self, **options: Any) -> EventFileSettings:
        return EventFileSettings(path=self.path, **options)

    def webhook(self, **options: Any) -> WebhookSettings:
        reference = SecretRef(f"file:{self.secret}", "events.webhook.secret_ref", self.secret)
        settings: dict[str, Any] = {"timeout_seconds": 20.0, "retry_max_seconds": 0.1}
        return WebhookSettings(url=self._receiver.url, secret=reference, **settings | options)

    def in_file(self) -> list[int]:
        """The sequences of the file's events."""
        text = self.path.read_text() if self.path.exists() else ""
        return [int(json.loads(line)["sequence"]) for line in text.splitlines()]


@pytest.fixture
def sinks(tmp_path: Path, receiver: WebhookReceiver) -> Sinks:
    return Sinks(tmp_path, receiver)


def config(store: PublishedStore, keep_seconds: float = 90 * 86_400, **sinks: Any) -> Config:
    return replace(store.config, events=EventSettings(keep_seconds=keep_seconds, **sinks))


@asynccontextmanager
async def delivering(config: Config) -> AsyncIterator[None]:
    with closing(CatalogWriter(config.store.catalog_path)) as writer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Deliveries(config, writer).run)
            yield
            nursery.cancel_scope.cancel()


async def deliver(config: Config) -> dict[str, tuple[int, str]]:
    with closing(CatalogWriter(config.store.catalog_path)) as writer:
        return await Deliveries(config, writer).deliver()


async def until(done: Callable[[], Any]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not done():  # noqa: ASYNC110 what is waited for happens in threads, too
            await trio.sleep(0.01)


def known(store: PublishedStore) -> dict[str, Delivery]:
    with DeliveryReader(store.catalog_path) as reader:
        return reader.deliveries()


def kept(store: PublishedStore) -> list[int]:
    return [row[0] for row in store.execute("SELECT sequence FROM events ORDER BY sequence")]


@pytest.fixture
def listening(receiver: WebhookReceiver) -> Iterator[None]:
    with receiver.running():
        yield


@pytest.mark.usefixtures("listening")
async def test_both_sinks_get_all_in_order(store: PublishedStore, sinks: Sinks, receiver: WebhookReceiver) -> None:
    add(store, *(stored(number) for number in range(1, 1101)))
    async with delivering(config(store, file=sinks.file(), webhook=sinks.webhook())):
        await until(lambda: len(sinks.in_file()) == len(receiver.sequences()) == 1100)
        add(store, stored(1101))
        await until(lambda: len(sinks.in_file()) == len(receiver.sequences()) == 1101)
        await until(lambda: {each.sequence for each in known(store).values()} == {1101})
    assert sinks.in_file() == receiver.sequences() == list(range(1, 1102))
    assert max(len(got.events) for got in receiver.taken) == 100
    # The next one goes on where this one was.
    add(store, stored(1102))
    assert await deliver(config(store, file=sinks.file(), webhook=sinks.webhook())) == {
        "file": (1, ""),
        "webhook": (1, ""),
    }
    assert sinks.in_file() == receiver.sequences() == list(range(1, 1103))


async def test_a_receiver_that_fails_in_every_way(
    store: PublishedStore, sinks: Sinks, receiver: WebhookReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped, refusing, redirecting, slow, half: all comes in order once it is well, and the file never waits."""
    with receiver.running():
        pass  # its port is known, and nobody listens there
    settings = config(store, file=sinks.file(), webhook=sinks.webhook(timeout_seconds=0.5))
    async with delivering(settings):
        add(store, stored(1))
        await until(lambda: sinks.in_file() == [1])
        await until(lambda: "webhook" in known(store) and known(store)["webhook"].error)
        assert known(store)["webhook"].failing_since_ns
        with receiver.running():
            await until(lambda: receiver.sequences() == [1])
            await until(lambda: not known(store)["webhook"].error)
            receiver.script = [
                status(500),
                status(302, Location="/x"),
                slow,
                half,
                hang_up,
                status(429, Retry_After="0"),
            ]
            add(store, stored(2), stored(3))
            await until(lambda: sinks.in_file() == [1, 2, 3])
            await until(lambda: receiver.sequences() == [1, 2, 3])
        add(store, stored(4))
        await until(lambda: sinks.in_file() == [1, 2, 3, 4])
        with receiver.running():  # a restart
            await until(lambda: receiver.sequences()[-1] == 4)
    assert receiver.sequences() == [1, 2, 3, 4]
    assert receiver.bad == 0, "nothing unsigned, and no redirect followed"
    assert [got.sequences for got in receiver.got].count([2, 3]) == 7
    assert "T0PS3CRET" not in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.usefixtures("listening")
async def test_a_sink_gets_the_types_it_wants(store: PublishedStore, sinks: Sinks, receiver: WebhookReceiver) -> None:
    add(store, stored(1), published(2), stored(3))
    settings = config(store, file=sinks.file(types=("v1.package.*",)), webhook=sinks.webhook(types=("v1.storage.*",)))
    assert await deliver(settings) == {"file": (1, ""), "webhook": (2, "")}
    assert (sinks.in_file(), receiver.sequences()) == ([2], [1, 3])
    assert {each.sequence for each in known(store).values()} == {3}, "nobody waits for what is not wanted"


@pytest.mark.usefixtures("listening")
async def test_where_a_new_sink_begins(store: PublishedStore, sinks: Sinks, receiver: WebhookReceiver) -> None:
    add(store, stored(1))
    settings = config(store, file=sinks.file(), webhook=sinks.webhook(begin="newest"))
    assert await deliver(settings) == {"file": (1, ""), "webhook": (0, "")}
    add(store, stored(2))
    assert await deliver(settings) == {"file": (1, ""), "webhook": (1, "")}
    # One that was taken out of the configuration is forgotten, and new when it comes back.
    assert await deliver(config(store, webhook=sinks.webhook(begin="newest"))) == {"webhook": (0, "")}
    assert known(store).keys() == {"webhook"}
    assert await deliver(settings) == {"file": (2, ""), "webhook": (0, "")}
    assert (sinks.in_file(), receiver.sequences()) == ([1, 2, 1, 2], [2])


@pytest.mark.usefixtures("listening")
async def test_batches_are_bounded(store: PublishedStore, sinks: Sinks, receiver: WebhookReceiver) -> None:
    long = "x" * 100_000
    add(store, *(published(number, producer=long) for number in range(1, 26)))
    assert await deliver(config(store, webhook=sinks.webhook())) == {"webhook": (25, "")}
    sizes = [int(got.headers["content-length"]) for got in receiver.taken]
    assert (len(sizes), max(sizes) <= BATCH_BYTES) == (3, True)
    add(store, *(stored(number) for number in range(26, 31)))
    assert await deliver(config(store, webhook=sinks.webhook(batch_events=2))) == {"webhook": (5, "")}
    assert [len(got.events) for got in receiver.taken[3:]] == [2, 2, 1]


@pytest.mark.usefixtures("listening")
async def test_a_delivery_that_ends_gives_up(store: PublishedStore, sinks: Sinks, receiver: WebhookReceiver) -> None:
    add(store, stored(1), stored(2))
    receiver.script = [status(204), *[status(500)] * GIVE_UP_TRIES]
    settings = config(store, webhook=sinks.webhook(batch_events=1))
    assert await deliver(settings) == {"webhook": (1, f"http://127.0.0.1:{receiver.port}: answers 500")}
    assert len(receiver.got) == 1 + GIVE_UP_TRIES
    assert known(store)["webhook"].sequence == 1
    assert await deliver(settings) == {"webhook": (1, "")}
    assert receiver.sequences() == [2]


async def test_one_process_at_a_time(store: PublishedStore, sinks: Sinks) -> None:
    settings = config(store, file=sinks.file())
    add(store, stored(1))
    async with delivering(settings):
        await until(lambda: sinks.in_file() == [1])
        with pytest.raises(StateLocked, match=r"another delivery \(pid \d+\) runs there"):
            await deliver(settings)
    assert await deliver(settings) == {"file": (0, "")}


# letting events go


def old(store: PublishedStore, numbers: range, days: float) -> None:
    add(store, *(stored(number, time_ns=time.time_ns() - round(days * DAY_NS)) for number in numbers))


async def prune(config: Config) -> int:
    with closing(CatalogWriter(config.store.catalog_path)) as writer:
        return await Deliveries(config, writer).prune()


async def test_without_sinks_events_expire(store: PublishedStore) -> None:
    old(store, range(1, 5001), 91)
    old(store, range(5001, 5011), 89)
    assert await prune(config(store)) == 5000
    assert kept(store) == list(range(5001, 5011))
    assert await prune(config(store)) == 0
    assert await prune(config(store, keep_seconds=3600)) == 10
    add(store, stored(5011))
    assert kept(store) == [5011], "a number is never given anew"


async def test_what_is_not_delivered_stays_for_as_long_again(
    store: PublishedStore, sinks: Sinks, receiver: WebhookReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    with receiver.running():
        pass
    settings = config(store, file=sinks.file(), webhook=sinks.webhook(types=(LOCATION_STORED,)))
    old(store, range(1, 6), 181)
    add(store, published(6, time_ns=time.time_ns() - 181 * DAY_NS))
    old(store, range(7, 10), 179)
    old(store, range(10, 12), 1)
    done = await deliver(settings)
    assert done["file"] == (11, "")
    assert done["webhook"][0] == 0
    # Twice `keep` has passed for the first: those of them that it wanted count as lost.
    assert kept(store) == list(range(7, 12))
    webhook = known(store)["webhook"]
    assert (webhook.sequence, webhook.lost_count, webhook.lost_at_ns > 0) == (6, 5, True)
    assert known(store)["file"].lost_count == 0
    assert "5 events are older than twice events.keep: webhook will not get them" in caplog.text
    with receiver.running():
        assert (await deliver(settings))["webhook"] == (5, "")
    assert receiver.sequences() == list(range(7, 12))
    assert kept(store) == [10, 11], "delivered and expired"


async def test_writers_go_on_while_events_go(store: PublishedStore) -> None:
    old(store, range(1, 8001), 91)
    waits = []
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            for number in range(8001, 8031):
                began = time.monotonic()
                await trio.to_thread.run_sync(add, store, stored(number))
                waits.append(time.monotonic() - began)

        nursery.start_soon(write)
        assert await prune(config(store)) == 8000
    assert kept(store) == list(range(8001, 8031))
    assert max(waits) < 5, "less than a writer waits for the lock"
