"""Which locations a scrub takes and in which order, when it ends early, and how fast it may be."""

from __future__ import annotations

import time
from array import array
from fractions import Fraction

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from castore.catalog.scrub import Choice, ScrubReader
from castore.digest import Digest
from castore.verify.limits import Limits
from castore.verify.outcomes import Outcome
from castore.verify.pace import YIELD_SECONDS, Pace
from castore.verify.sample import draw, parse_part
from tests.published import PublishedStore, numbered_files
from tests.verify.test_scrub import scrub

NOW_NS = 1_700_000_000 * 10**9
DAY_NS = 86_400 * 10**9


def verified_at(store: PublishedStore, digest: Digest, time_ns: int) -> None:
    store.execute(
        "UPDATE storage_locations SET verified_at_ns = ? WHERE blob_id = (SELECT blob_id FROM blobs WHERE digest = ?)",
        *(time_ns, digest.raw),
    )


def given_by(store: PublishedStore, choice: Choice, *, limit: int = 7, now_ns: int = NOW_NS) -> list[Digest]:
    """What a scrub would look at, in order; and its totals are of that."""
    with ScrubReader(store.catalog_path) as reader:
        rows = [row for page in reader.pages("first", choice, now_ns, limit) for row in page]
        parts = list(reader.chosen_totals("first", choice, now_ns))
    assert sum(count for count, _ in parts) == len(rows)
    assert sum(size_bytes for _, size_bytes in parts) == sum(row.size_bytes for row in rows)
    return [row.digest for row in rows]


async def aged(store: PublishedStore) -> list[Digest]:
    """Forty locations in order: the first ten verified in the future, ten never, the others a day apart."""
    digests = list((await store.publish("demo/1", numbered_files(39), "first")).values())
    for number, digest in enumerate(digests):
        age_days = number - 10 if number < 10 else 100 - number if number >= 20 else None
        verified_at(store, digest, 0 if age_days is None else NOW_NS - age_days * DAY_NS)
    return digests


@pytest.mark.parametrize("is_named", [False, True], ids=["all", "named"])
async def test_the_oldest_come_first(store: PublishedStore, is_named: bool) -> None:
    digests = await aged(store)
    blob_ids = array("q", (row[0] for row in store.execute("SELECT blob_id FROM blobs"))) if is_named else None
    found = given_by(store, Choice(blob_ids=blob_ids))
    assert set(found[:10]) == set(digests[:10]), "a time that has not come yet proves nothing"
    assert set(found[10:20]) == set(digests[10:20])
    assert found[20:] == digests[20:]
    older = Choice(blob_ids=blob_ids, verified_before_ns=NOW_NS - 70 * DAY_NS)
    assert given_by(store, older) == [*found[:20], *digests[20:30]]


async def test_what_is_verified_meanwhile_is_not_given_again(store: PublishedStore) -> None:
    digests = await aged(store)
    now_ns = time.time_ns()
    seen: list[Digest] = []
    with ScrubReader(store.catalog_path) as reader:
        for page in reader.pages("first", Choice(), now_ns, 7):
            seen += [row.digest for row in page]
            for row in page:
                verified_at(store, row.digest, time.time_ns())
    assert sorted(seen) == sorted(digests)


async def test_a_run_that_ends_early_is_gone_on_with(store: PublishedStore) -> None:
    files = numbered_files(60)
    digests = await store.publish("demo/1", files, "first")
    seen: set[Digest] = set()
    for _ in range(4):
        limits = Limits(max_bytes=sum(map(len, files.values())) // 3 + 400)
        tally, outcomes = await scrub(store, "first", limits=limits)
        assert (limits.reached, tally.total_count) == ("byte limit", 61)
        found = {outcome.row.digest for outcome in outcomes}
        left = set(digests.values()) - seen
        assert found <= left or left <= found, "none is looked at again before all were"
        seen |= found
        if left <= found:
            return
    raise AssertionError(f"{61 - len(seen)} were not looked at")


def test_limits() -> None:
    limits = Limits(max_bytes=100)
    assert [limits.allow(60), limits.allow(40), limits.reached] == [True, True, ""]
    assert [limits.allow(1), limits.allow(0), limits.reached] == [False, False, "byte limit"]
    limits = Limits(max_bytes=100)
    assert [limits.allow(1000), limits.allow(1)] == [True, False], "one is always begun"
    limits = Limits(seconds=1e-9)
    assert [limits.allow(1), limits.allow(1), limits.reached] == [True, False, "time limit"]
    limits = Limits()
    assert all(limits.allow(1 << 60) for _ in range(100))


async def test_a_time_limit_lets_what_was_begun_end(store: PublishedStore) -> None:
    await store.publish("demo/1", numbered_files(60), "first")
    limits = Limits(seconds=1e-9)
    tally, outcomes = await scrub(store, "first", limits=limits)
    assert (limits.reached, tally.done_count, len(outcomes)) == ("time limit", 1, 1)
    assert tally.counts["verified"] == 1


async def test_no_faster_than_the_rate(autojump_clock: trio.abc.Clock) -> None:
    pace = Pace(1000)
    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        for size_bytes in (500, 1000, 1500):
            nursery.start_soon(pace.take, size_bytes)
    await pace.take(1)
    assert trio.current_time() - started == pytest.approx(3.0)
    # Time that went by unused is not made up for.
    await trio.sleep(100)
    started = trio.current_time()
    for _ in range(3):
        await pace.take(1000)
    assert trio.current_time() - started == pytest.approx(2.0)


async def test_readers_come_first_for_a_while(autojump_clock: trio.abc.Clock) -> None:
    busy_until = trio.current_time() + 0.5
    pace = Pace(is_busy=lambda: trio.current_time() < busy_until)
    await pace.take(1)
    assert busy_until <= trio.current_time() < busy_until + 0.1
    busy_until = trio.current_time() + 3600
    started = trio.current_time()
    await pace.take(1)
    assert trio.current_time() - started == pytest.approx(YIELD_SECONDS)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**64 - 1), st.integers(1, 20))
def test_samples_side_by_side_are_everything(raw: bytes, begin: int, count: int) -> None:
    step = -(-(2**64) // count)
    draws = [draw(Fraction(step, 2**64), (begin + number * step) % 2**64) for number in range(count)]
    assert sum(Choice(drawn=drawn).takes(raw) for drawn in draws) in (1, 2)
    assert Choice(drawn=draw(Fraction(1))).takes(raw)


async def test_a_sample(store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(200), "first")
    drawn = draw(Fraction(1, 2))
    found = given_by(store, Choice(drawn=drawn))
    assert set(found) == {digest for digest in digests.values() if Choice(drawn=drawn).takes(digest.raw)}
    assert 40 < len(found) < 160


def test_parts() -> None:
    assert [parse_part(text) for text in ("1%", "0.5 %", "100%")] == [Fraction(1, 100), Fraction(1, 200), 1]
    for text in ("", "0%", "101%", "1", "-1%", "1%%", "one%"):
        with pytest.raises(ValueError, match="part"):
            parse_part(text)


async def test_going_on_after_a_kill_loses_what_was_in_flight(store: PublishedStore) -> None:
    """What one run recorded is the last that the next one looks at."""
    digests = await store.publish("demo/1", numbered_files(100), "first")
    first: list[Outcome] = (await scrub(store, "first", limits=Limits(max_bytes=20_000)))[1]
    second = (await scrub(store, "first", workers=1))[1]
    done = {outcome.row.digest for outcome in first}
    assert 0 < len(done) < 101
    assert {outcome.row.digest for outcome in second[: 101 - len(done)]} == set(digests.values()) - done
    assert {outcome.row.digest for outcome in second[101 - len(done) :]} == done
