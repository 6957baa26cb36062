"""Events from a real daemon to a file and to a real HTTP receiver, over kills and restarts of both."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from castore.failpoint import VARIABLE
from tests.event_schemas import check_event
from tests.mount.store import MountedStore, wait_until
from tests.servers.webhook_receiver import WebhookReceiver, status

SECTIONS = """
[events.file]
path = "events.jsonl"
[events.webhook]
url = "{url}"
secret_ref = "file:secret"
retry_max = "200ms"
"""


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    with WebhookReceiver().running() as receiver:
        yield receiver


@pytest.fixture
def store(make_store: Callable[..., MountedStore], receiver: WebhookReceiver) -> MountedStore:
    store = make_store(SECTIONS.format(url=receiver.url))
    (store.root / "secret").write_bytes(receiver.secret)
    return store


def publish(store: MountedStore, number: int) -> None:
    (store.ingest(f"demo/{number}") / "file").write_text(f"content {number}")
    store.publish(f"demo/{number}")


def in_file(store: MountedStore) -> list[dict[str, Any]]:
    path = store.root / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def stored(store: MountedStore) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.castore("events", "--json").splitlines()]


def sequences(events: list[dict[str, Any]]) -> list[int]:
    return [int(event["sequence"]) for event in events]


def delivery_checks(store: MountedStore) -> dict[str, dict[str, Any]]:
    health = json.loads((store.mnt / ".castore/health.json").read_text())
    return {check["componentId"]: check for check in health["checks"]["events:delivery"]}


def test_what_is_published_is_told(store: MountedStore, receiver: WebhookReceiver) -> None:
    store.mount()
    publish(store, 1)
    events = stored(store)
    assert [event["type"].rpartition(".")[2] for event in events] == ["location_stored", "location_stored", "published"]
    wait_until(lambda: in_file(store) == events, "the file has them all")
    wait_until(lambda: receiver.sequences() == sequences(events), "the receiver has them all")
    for got in receiver.taken:
        for event in got.events:
            check_event(event)
    wait_until(
        lambda: {(each["status"], each["observedValue"]) for each in delivery_checks(store).values()} == {("pass", 0)},
        "health shows that nothing waits",
    )
    done = store.run("events", "--deliver")
    assert (done.returncode, f"another delivery (pid {store.pid}) runs there" in done.stderr) == (2, True)
    secret = receiver.secret.decode()
    store.umount()
    for path in (store.state / "log/mount.log", store.state / "catalog.db", store.root / "events.jsonl"):
        assert secret not in path.read_bytes().decode(errors="replace")


@pytest.mark.parametrize("kills", [1, 2])
def test_killed_before_it_knows(store: MountedStore, receiver: WebhookReceiver, kills: int) -> None:
    """A sink has taken events, the catalog does not know: they come again, and none is lost."""
    os.environ[VARIABLE] = f"events.sent:{kills}"
    try:
        store.mount()
    finally:
        del os.environ[VARIABLE]
    box = store.ingest("demo/1")
    for number in range(3):
        (box / str(number)).write_text(str(number))
    wait_until(lambda: not Path(f"/proc/{store.pid}").exists(), "the daemon has died")
    store.pid = 0
    before = sequences(in_file(store)), receiver.sequences()
    assert any(before), "something was taken"
    store.mount()
    store.publish("demo/1")
    publish(store, 2)
    events = stored(store)
    wait_until(lambda: sequences(in_file(store))[-1:] == sequences(events)[-1:], "the file has the last one")
    wait_until(lambda: receiver.sequences()[-1:] == sequences(events)[-1:], "the receiver has the last one")
    again = 0
    for taken, known in ((sequences(in_file(store)), before[0]), (receiver.sequences(), before[1])):
        assert sorted(set(taken)) == sequences(events), "none is lost"
        first, then = taken[: len(known)], taken[len(known) :]
        assert (first, first == sorted(first), then == sorted(then)) == (known, True, True), "each time in order"
        again += len(taken) - len(set(taken))
    assert again, "some came twice"


def test_a_receiver_that_is_away(store: MountedStore, receiver: WebhookReceiver) -> None:
    """The mount does not care; what it could not deliver the next one does."""
    receiver.script = [status(503)] * 1000
    store.mount()
    publish(store, 1)
    wait_until(lambda: "events are not delivered: http://127.0.0.1" in store.log(), "the log says so")
    wait_until(lambda: delivery_checks(store)["webhook"]["observedValue"] == 3, "health counts what waits")
    assert receiver.taken == []
    store.umount()
    receiver.script = []
    store.mount()
    wait_until(lambda: receiver.sequences() == [1, 2, 3], "the receiver has them all")
    assert "T0PS3CRET" not in store.log()
