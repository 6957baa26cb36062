"""The metrics of a program without a mount, over a real catalog and real backends; a mount's are in tests/mount/."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import pytest
import trio

from castore.api.metrics import BACKENDS_MAX, OTHERS, Metrics
from castore.api.sources import Sources
from castore.catalog.records import FailureReason
from castore.config_events import EventFileSettings, EventSettings
from castore.errors import StorageUnavailable
from castore.storage.measured import CallStats, MeasuredBackend
from tests.api.exposition import documented, promtool, samples, served
from tests.api.observed import observe
from tests.api.test_health import package_published
from tests.published import PublishedStore, numbered_files

DAY_NS = 86_400 * 10**9
Scrape = Callable[[], Awaitable[str]]


@pytest.fixture
async def scrape(store: PublishedStore, nursery: trio.Nursery) -> Scrape:
    """The text as of now."""
    metrics = Metrics(await observe(store, nursery))

    async def scrape() -> str:
        return (await metrics.make())[0].decode()

    return scrape


async def test_what_is_served_is_documented(store: PublishedStore, scrape: Scrape) -> None:
    await store.publish("demo/1", {b"a": b"a"})
    text = await scrape()
    stated = {name: kind for name, (kind, _, of_mount) in documented().items() if not of_mount}
    assert {name: kind for name, (kind, _) in served(text).items()} == stated


async def test_promtool_finds_nothing(store: PublishedStore, scrape: Scrape) -> None:
    await store.publish("demo/1", {b"a": b"a"})
    text = await scrape()
    checked = promtool("check", "metrics", text=text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    wrong = promtool("check", "metrics", text=text.replace("_bytes_total", "_kilobytes"))
    assert wrong.returncode != 0


async def test_locations(store: PublishedStore, scrape: Scrape) -> None:
    digests = await store.publish("demo/1", numbered_files(9))
    for number, reason in enumerate(FailureReason):
        store.write(
            lambda transaction, number=number, reason=reason: transaction.fail_location(  # type: ignore[misc]
                digests[b"file %d" % number], "first", reason
            )
        )
    found = samples(await scrape())
    assert found["castore_packages"] == 1
    assert found['castore_locations{backend="first",status="stored"}'] == 7
    assert found['castore_locations{backend="first",status="failed"}'] == 3
    assert found['castore_locations{backend="second",status="stored"}'] == 10
    assert {found[f'castore_failed_locations{{backend="first",reason="{reason}"}}'] for reason in FailureReason} == {1}
    assert {found[f'castore_failed_locations{{backend="second",reason="{reason}"}}'] for reason in FailureReason} == {0}
    assert found['castore_health_status{status="warn"}'] == 1
    assert found["castore_unreadable_blobs"] == 0


async def test_age_and_coverage_of_verification(store: PublishedStore, scrape: Scrape) -> None:
    await store.publish("demo/1", numbered_files(4), "first")
    now = time.time_ns()
    ages = (0, 2, 20, 400, None)  # days; None: never
    for (blob_id,), age in zip(store.execute("SELECT blob_id FROM storage_locations"), ages, strict=True):
        if age is not None:
            store.execute(
                "UPDATE storage_locations SET status = 'verified', verified_at_ns = ?, stored_at_ns = ? "
                "WHERE blob_id = ?",
                *(now - age * DAY_NS - 10**9, now - 500 * DAY_NS, blob_id),
            )
    found = samples(await scrape())
    within = {
        days: found[f'castore_verified_locations{{backend="first",within_days="{days}"}}']
        for days in ("1", "7", "30", "90", "any")
    }
    assert within == {"1": 1, "7": 2, "30": 3, "90": 3, "any": 4}

    # One fails, one is stored anew: neither is verified any more.
    for blob_id, status, expected in ((1, "failed", [0, 1, 2, 2, 3]), (2, "stored", [0, 0, 1, 1, 2])):
        reason = "missing" if status == "failed" else ""
        store.execute("UPDATE storage_locations SET status = ?, reason = ? WHERE blob_id = ?", status, reason, blob_id)
        found = samples(await scrape())
        within = {days: found[f'castore_verified_locations{{backend="first",within_days="{days}"}}'] for days in within}
        assert list(within.values()) == expected
    assert found['castore_verification_age_seconds{backend="first"}'] == pytest.approx(400 * 86_400, abs=600)


async def test_backends_that_fail(store: PublishedStore, nursery: trio.Nursery) -> None:
    summary = await store.store(b"data", "first")
    calls = {backend_id: CallStats() for backend_id in store.backends}
    first, second = (MeasuredBackend(store.backends[name], calls[name]) for name in ("first", "second"))
    await first.get(summary.digest, offset=0, length=4)
    with store.place.unreachable("second"), pytest.raises(StorageUnavailable):
        await second.head(summary.digest)
    with store.place.unreachable("second"):
        text = (await Metrics(await observe(store, nursery, calls)).make())[0].decode()
    found = samples(text)
    assert found['castore_backend_call_duration_seconds_count{backend="first",operation="get"}'] == 1
    assert found['castore_backend_read_bytes_total{backend="first"}'] == 4
    assert found['castore_backend_errors_total{backend="second",kind="storage_unavailable"}'] == 1
    assert found['castore_backend_errors_total{backend="first",kind="storage_unavailable"}'] == 0
    assert found['castore_backend_health{backend="second",status="fail"}'] == 1
    assert found['castore_backend_health{backend="first",status="pass"}'] == 1


async def test_events_that_wait(store: PublishedStore, nursery: trio.Nursery) -> None:
    sinks = EventSettings(keep_seconds=86_400, file=EventFileSettings(path=store.root / "events"))
    old = [package_published(age) for age in (600, 500, 400)]
    store.write(lambda transaction: transaction.begin_delivery("file", 0))
    store.write(lambda transaction: transaction.add_events(old))
    store.write(lambda transaction: transaction.give_up_events(1, {"file": lambda _: True}))
    found = samples((await Metrics(await observe(store, nursery, events=sinks)).make())[0].decode())
    assert found['castore_events_waiting{sink="file"}'] == 2
    assert found['castore_events_waiting_age_seconds{sink="file"}'] == pytest.approx(500, abs=60)
    assert found['castore_events_lost_total{sink="file"}'] == 1
    store.write(lambda transaction: transaction.set_delivered("file", 3))
    found = samples((await Metrics(await observe(store, nursery, events=sinks)).make())[0].decode())
    assert found['castore_events_waiting{sink="file"}'] == found['castore_events_waiting_age_seconds{sink="file"}'] == 0


async def test_a_catalog_that_is_gone(store: PublishedStore, scrape: Scrape) -> None:
    hidden = store.catalog_path.rename(store.catalog_path.with_name("hidden"))
    found = samples(await scrape())
    assert found["castore_catalog_up"] == 0
    assert found['castore_health_status{status="fail"}'] == 1
    assert "castore_packages" not in found
    hidden.rename(store.catalog_path)
    assert samples(await scrape())["castore_packages"] == 0


async def test_labels_are_bounded(store: PublishedStore, nursery: trio.Nursery) -> None:
    summary = await store.store(b"data", "first")
    for number in range(300):  # that the configuration does not have
        store.execute(
            "INSERT INTO storage_locations SELECT blob_id, ?, 'stored', '', 1, 0 FROM blobs WHERE digest = ?",
            *(f"gone-{number}", summary.digest.raw),
        )
    names = ["first", "second", *(f"more-{number}" for number in range(2 * BACKENDS_MAX))]
    calls = {name: CallStats() for name in names}
    for stats in calls.values():
        stats.durations["get"].add(0.1)
        stats.read_bytes += 1
    sources = await observe(store, nursery)
    many = Sources(
        catalog_path=sources.catalog_path,
        health=sources.health,
        probes=sources.probes,
        counts=sources.counts,
        backend_types=dict.fromkeys(names, "local"),
        calls=calls,
    )
    text, _ = await Metrics(many).make()
    found = samples(text.decode())
    labelled = [name for name in found if name.startswith("castore_backend_read_bytes_total")]
    assert len(labelled) == BACKENDS_MAX + 1
    assert found[f'castore_backend_read_bytes_total{{backend="{OTHERS}"}}'] == len(names) - BACKENDS_MAX
    duration = "castore_backend_call_duration_seconds"
    assert found[f'{duration}_count{{backend="{OTHERS}",operation="get"}}'] == len(names) - BACKENDS_MAX
    assert found[f'castore_locations{{backend="{OTHERS}",status="stored"}}'] == 300
    assert len(text) < 1_000_000
