"""The health document: each rule of pass, warn and fail, on a real catalog and real backends."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

from castore.api.health import (
    EVENTS_BEHIND_SECONDS,
    STAGING_NEARLY_FULL,
    VERIFY_WITHIN_DAYS,
    HealthDocument,
    QueueState,
)
from castore.api.probes import BackendProbes
from castore.catalog.condition import ConditionReader
from castore.catalog.records import FailureReason, StoredProbe
from castore.config_events import EventFileSettings, EventSettings
from castore.digest import Digest
from castore.events import PACKAGE_PUBLISHED, Event
from castore.registry.probing import stored_probe
from castore.storage.spi import Finding, ProbeReport, StorageBackend
from tests.published import PublishedStore, numbered_files

DAY_NS = 86_400 * 10**9
Look = Callable[..., Awaitable[dict[str, Any]]]
Enforced = Literal["yes", "no", "not supported", "unknown"]


@pytest.fixture
def look(store: PublishedStore, nursery: trio.Nursery) -> Look:
    """Makes a document as a program that has just started does; backends and queue may be given."""

    async def look(
        queue: QueueState | None = None,
        backends: dict[str, StorageBackend] | None = None,
        notice: str = "",
        events: EventSettings | None = None,
    ) -> dict[str, Any]:
        probes = BackendProbes(store.backends if backends is None else backends)
        await nursery.start(probes.run)
        health = HealthDocument(catalog_path=store.catalog_path, probes=probes, queue=lambda: queue, events=events)
        health.notices += [notice] if notice else []
        return await health.make()

    return look


def fail_location(store: PublishedStore, digest: Digest, backend_id: str) -> None:
    store.write(lambda transaction: transaction.fail_location(digest, backend_id, FailureReason.MISSING))


def not_passing(document: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """`KEY/COMPONENT` -> (status, output) of the checks that say something."""
    return {
        f"{key}/{check.get('componentId', '')}".rstrip("/"): (check["status"], check.get("output", ""))
        for key, checks in document["checks"].items()
        for check in checks
        if check["status"] != "pass"
    }


async def test_all_is_well(store: PublishedStore, look: Look) -> None:
    await store.publish("demo/1", {b"a": b"a"})
    document = await look(QueueState(staged_bytes=10, staging_max_bytes=1000, waiting_files=2, failed_files=0))
    assert (document["status"], not_passing(document)) == ("pass", {})
    assert document["serviceId"] == store.reader.catalog_id()
    assert set(document["checks"]) == {
        *("catalog:responseTime", "backend:responseTime", "backend:verificationAge", "locations:failed"),
        *("blobs:unreadable", "staging:utilization", "queue:waiting", "queue:failed", "ingest:expired"),
    }
    assert [check["componentId"] for check in document["checks"]["backend:responseTime"]] == ["first", "second"]
    (staging,) = document["checks"]["staging:utilization"]
    assert (staging["observedValue"], staging["observedUnit"]) == (1.0, "percent")
    assert document["checks"]["queue:waiting"][0]["observedValue"] == 2
    assert not any("output" in check for checks in document["checks"].values() for check in checks)


async def test_an_empty_store_is_well(look: Look) -> None:
    document = await look()
    assert (document["status"], not_passing(document)) == ("pass", {})


async def test_a_failed_location_with_another_good_copy(store: PublishedStore, look: Look) -> None:
    digests = await store.publish("demo/1", {b"a": b"a"})
    fail_location(store, digests[b"a"], "first")
    document = await look()
    assert document["status"] == "warn"
    assert not_passing(document).keys() == {"locations:failed"}
    (check,) = document["checks"]["locations:failed"]
    assert (check["observedValue"], check["packages"]) == (1, ["demo/1"])


@pytest.mark.parametrize("path", [b"a", b""], ids=["file", "manifest"])
async def test_a_blob_without_a_good_location(store: PublishedStore, look: Look, path: bytes) -> None:
    digests = await store.publish("demo/1", {b"a": b"a"})
    await store.publish("fine/1", {b"b": b"b"})
    fail_location(store, digests[path], "first")
    fail_location(store, digests[path], "second")
    document = await look()
    assert document["status"] == "fail"
    assert not_passing(document)["blobs:unreadable"] == ("fail", "1 have no good location anywhere")
    (check,) = document["checks"]["blobs:unreadable"]
    assert (check["observedValue"], check["packages"]) == (1, ["demo/1"])


async def test_a_blob_that_no_package_uses(store: PublishedStore, look: Look) -> None:
    summary = await store.store(b"left over", "first")
    fail_location(store, summary.digest, "first")
    document = await look()
    assert document["status"] == "warn"
    assert not_passing(document).keys() == {"locations:failed"}


async def test_an_unreachable_backend_whose_packages_have_copies(store: PublishedStore, look: Look) -> None:
    await store.publish("demo/1", {b"a": b"a"}, "first", "second")
    with store.place.unreachable("first"):
        document = await look()
    assert document["status"] == "warn"
    status, output = not_passing(document)["backend:responseTime/first"]
    assert (status, output.rpartition("; ")[2]) == ("warn", "no package is stored there alone")


async def test_an_unreachable_backend_that_holds_sole_copies(store: PublishedStore, look: Look) -> None:
    await store.publish("copied/1", {b"a": b"a"}, "first", "second")
    await store.publish("alone/1", {b"b": b"b"}, "second")
    with store.place.unreachable("second"):
        document = await look()
    assert document["status"] == "fail"
    assert not_passing(document)["backend:responseTime/second"][0] == "fail"
    (_, check) = document["checks"]["backend:responseTime"]
    assert check["packages"] == ["alone/1"]


async def test_two_unreachable_backends_with_each_others_copies(store: PublishedStore, look: Look) -> None:
    await store.publish("copied/1", {b"a": b"a"}, "first", "second")
    with store.place.unreachable("first"), store.place.unreachable("second"):
        document = await look()
    assert document["status"] == "fail"
    assert {check["status"] for check in document["checks"]["backend:responseTime"]} == {"fail"}


async def test_the_last_good_copy_is_unreachable(store: PublishedStore, look: Look) -> None:
    digests = await store.publish("copied/1", {b"a": b"a"}, "first", "second")
    fail_location(store, digests[b"a"], "first")
    with store.place.unreachable("second"):
        document = await look()
    assert document["status"] == "fail"
    output = "1 have one only in a backend that cannot be reached"
    assert not_passing(document)["blobs:unreadable"] == ("fail", output)
    assert document["checks"]["blobs:unreadable"][0]["packages"] == ["copied/1"]


async def test_a_backend_that_is_not_configured(store: PublishedStore, look: Look) -> None:
    await store.publish("demo/1", {b"a": b"a"}, "first", "second")
    document = await look(backends={"first": store.backends["first"]})
    assert document["status"] == "fail"
    assert not_passing(document).keys() == {"backend:responseTime/second"}


async def test_a_backend_that_was_emptied_need_not_be_configured(store: PublishedStore, look: Look) -> None:
    await store.publish("demo/1", {b"a": b"a"}, "first")
    summary = await store.store(b"x", "second")
    store.execute("UPDATE storage_locations SET status = 'deleting' WHERE backend_id = 'second'")
    document = await look(backends={"first": store.backends["first"]})
    assert document["status"] == "pass", summary


async def test_verified_or_stored_too_long_ago(store: PublishedStore, look: Look) -> None:
    digests = await store.publish("demo/1", {b"a": b"a", b"b": b"b"})
    old_ns = time.time_ns() - (VERIFY_WITHIN_DAYS + 1) * DAY_NS
    store.execute("UPDATE storage_locations SET stored_at_ns = ? WHERE backend_id = 'second'", old_ns)
    document = await look()
    assert document["status"] == "warn"
    assert not_passing(document).keys() == {"backend:verificationAge/second"}
    ages = {check["componentId"]: check["observedValue"] for check in document["checks"]["backend:verificationAge"]}
    assert ages == {"first": 0, "second": pytest.approx(31, abs=0.1)}
    # All but one were verified since.
    store.execute("UPDATE storage_locations SET verified_at_ns = ?", time.time_ns() - DAY_NS)
    assert (await look())["status"] == "pass"
    store.execute(
        "UPDATE storage_locations SET verified_at_ns = 0 WHERE blob_id = (SELECT blob_id FROM blobs WHERE digest = ?)",
        digests[b"b"].raw,
    )
    assert (await look())["status"] == "warn"


async def test_staging_and_queue(look: Look) -> None:
    full = QueueState(
        staged_bytes=int(1000 * STAGING_NEARLY_FULL), staging_max_bytes=1000, waiting_files=0, failed_files=0
    )
    document = await look(full)
    assert not_passing(document) == {"staging:utilization": ("warn", "900 of 1000 bytes are staged")}
    failed = QueueState(staged_bytes=899, staging_max_bytes=1000, waiting_files=0, failed_files=3)
    document = await look(failed)
    assert not_passing(document).keys() == {"queue:failed"}
    assert document["status"] == "warn"


async def test_what_the_program_says_of_itself(look: Look) -> None:
    document = await look(notice="port taken")
    assert (document["status"], not_passing(document)) == ("warn", {"service:notices": ("warn", "port taken")})


async def test_a_catalog_that_is_gone(store: PublishedStore, look: Look) -> None:
    hidden = store.catalog_path.rename(store.catalog_path.with_name("hidden"))
    document = await look()
    assert document["status"] == "fail"
    assert "there is no catalog" in not_passing(document)["catalog:responseTime"][1]
    assert "serviceId" not in document
    hidden.rename(store.catalog_path)


async def test_a_catalog_that_is_damaged(store: PublishedStore, look: Look) -> None:
    store.execute("ALTER TABLE storage_locations RENAME TO gone")
    document = await look()
    assert document["status"] == "fail"
    assert "no such table: storage_locations" in not_passing(document)["catalog:responseTime"][1]


async def test_many_packages_are_named_up_to_a_bound(store: PublishedStore, look: Look) -> None:
    for number in range(25):
        digests = await store.publish(f"p{number:02}/1", {b"a": b"the same"}, "first")
    fail_location(store, digests[b"a"], "first")
    document = await look()
    assert document["checks"]["locations:failed"][0]["packages"] == [f"p{number:02}/1" for number in range(20)]
    assert document["checks"]["blobs:unreadable"][0]["observedValue"] == 1


def steps(path: Path, question: Callable[[ConditionReader], object]) -> int:
    """How many thousands of steps SQLite takes for a question."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    with ConditionReader(path) as reader:
        reader._database.conn.set_progress_handler(tick, 100)
        question(reader)
    return count


async def test_its_questions_cost_the_same_for_any_number_of_blobs(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(10))
    fail_location(store, digests[b"file 1"], "first")
    fail_location(store, digests[b""], "first")
    questions: list[Callable[[ConditionReader], object]] = [
        lambda reader: reader.backend_ids(),
        lambda reader: reader.oldest_proof_ns("first"),
        lambda reader: reader.failed_locations(["first", "second"]),
    ]
    before = [steps(store.catalog_path, question) for question in questions]
    store.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
        "INSERT INTO blobs (algorithm, digest, size_bytes, block_size_bytes, checksum_algorithm, checksums) "
        "SELECT 'sha256', randomblob(32), 1, 1, 'xxh3-64', x'' FROM n"
    )
    for status, backend_id in (("stored", "first"), ("verified", "second")):
        store.execute(
            "INSERT OR IGNORE INTO storage_locations SELECT blob_id, ?, ?, '', 1000000 + blob_id, 0 FROM blobs",
            backend_id,
            status,
        )
    store.execute(
        "INSERT INTO packages SELECT blob_id, 'demo', 'v' || blob_id, -blob_id, '', '', 0, 0, 0, 0, blob_id, "
        "'[\"first\"]' FROM blobs WHERE blob_id > 20"
    )
    after = [steps(store.catalog_path, question) for question in questions]
    assert all(now <= then + 3 for now, then in zip(after, before, strict=True)), (before, after)


async def test_a_document_is_shared_for_a_moment(store: PublishedStore, nursery: trio.Nursery) -> None:
    probes = BackendProbes(store.backends)
    await nursery.start(probes.run)
    health = HealthDocument(catalog_path=store.catalog_path, probes=probes)
    made: list[dict[str, Any]] = []

    async def make() -> None:
        made.append(await health.make())

    async with trio.open_nursery() as askers:
        for _ in range(20):
            askers.start_soon(make)
    assert all(document is made[0] for document in made)


# what a probe found


def probed(store: PublishedStore, backend_id: str, *enforced: Enforced) -> None:
    """A probe of the backend ends, with one thing that castore relies on for each of `enforced`."""
    found = (
        Finding(f"thing-{n}", "a question", "so", "not so", given, "then this") for n, given in enumerate(enforced)
    )
    nice = Finding("nice", "a question", "so", "not so", "no", "")
    probe = stored_probe(backend_id, ProbeReport("a server", (*found, nice)))
    store.write(lambda transaction: transaction.set_probe(probe))


async def test_a_probe_that_found_all_that_is_relied_on(store: PublishedStore, look: Look) -> None:
    probed(store, "second", "yes", "yes")
    document = await look()
    assert (document["status"], not_passing(document)) == ("pass", {})
    (check,) = document["checks"]["backend:probe"]  # the other was never probed
    assert (check["componentId"], check["observedValue"], check["observedUnit"]) == ("second", 0, "missing")


async def test_a_probe_that_found_something_missing(store: PublishedStore, look: Look) -> None:
    probed(store, "first", "yes")
    probed(store, "second", "yes", "no", "not supported", "unknown")
    document = await look()
    assert document["status"] == "warn"
    ((status, output),) = not_passing(document).values()
    assert status == "warn"
    assert output.split(" | ") == [
        "thing-1: a question: not so: then this",
        "thing-2: a question: not so: then this",
        "thing-3: a question: could not be asked: not so",
    ]


async def test_the_time_of_a_probe_is_its_own(store: PublishedStore, look: Look) -> None:
    store.write(lambda transaction: transaction.set_probe(StoredProbe("first", 86_400 * 10**9, "", ())))
    (check,) = (await look())["checks"]["backend:probe"]
    assert check["time"] == "1970-01-02T00:00:00Z"


async def test_a_probe_of_a_backend_that_is_gone(store: PublishedStore, look: Look) -> None:
    probed(store, "third", "no")
    document = await look()
    assert document["status"] == "pass"
    assert "backend:probe" not in document["checks"]


def package_published(age_seconds: float) -> Event:
    data = {
        "name": "p",
        "version": "1",
        "producer": "tests",
        "retention_class": "standard",
        "publisher_uid": 0,
        "backend_ids": ["first"],
        "file_count": 1,
        "size_bytes": 0,
        "manifest_digest": f"manifest-sha256:{'0' * 64}",
    }
    time_ns = time.time_ns() - round(age_seconds * 10**9)
    return Event(type=PACKAGE_PUBLISHED, subject="p/1", data=data, time_ns=time_ns)


async def test_events_that_are_not_delivered(store: PublishedStore, look: Look) -> None:
    events = EventSettings(keep_seconds=86_400, file=EventFileSettings(path=store.root / "events"))
    assert "events:delivery" not in (await look(events=EventSettings(keep_seconds=86_400)))["checks"]
    assert not_passing(await look(events=events)) == {}
    store.write(lambda transaction: transaction.add_event(package_published(EVENTS_BEHIND_SECONDS - 60)))
    document = await look(events=events)
    (check,) = document["checks"]["events:delivery"]
    assert (check["status"], check["observedValue"], check["componentId"]) == ("pass", 1, "file"), "it may still come"
    store.write(lambda transaction: transaction.begin_delivery("file", 1))
    waiting = [package_published(EVENTS_BEHIND_SECONDS + 60), package_published(1)]
    store.write(lambda transaction: transaction.add_events(waiting))
    said = "no process delivers events: mount, or run `castore events --deliver`"
    document = await look(events=events)
    assert (document["status"], not_passing(document)) == ("warn", {"events:delivery/file": ("warn", said)})
    assert document["checks"]["events:delivery"][0]["observedValue"] == 2
    store.write(lambda transaction: transaction.set_failing("file", "events: No space left on device"))
    assert not_passing(await look(events=events)) == {
        "events:delivery/file": ("warn", "events: No space left on device")
    }
    store.write(lambda transaction: transaction.set_delivered("file", 3))
    assert not_passing(await look(events=events)) == {}
    store.write(lambda transaction: transaction.add_event(package_published(1)))
    store.write(lambda transaction: transaction.give_up_events(4, {"file": lambda _: True}))
    said = "1 events expired before they could be delivered"
    assert not_passing(await look(events=events)) == {"events:delivery/file": ("warn", said)}
    store.execute("UPDATE event_deliveries SET lost_at_ns = lost_at_ns - ?", 2 * DAY_NS)
    assert not_passing(await look(events=events)) == {}, "that is long ago"
