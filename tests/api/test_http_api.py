"""The HTTP API over a real catalog and real backends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from urllib.parse import quote

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castore.api.http_api import EVENTS_MAX, HttpApi
from tests.api.http_client import Served, start
from tests.api.observed import observe
from tests.event_schemas import check_event
from tests.published import PublishedStore

SetReady = Callable[[bool], None]


@pytest.fixture
def ready() -> list[bool]:
    """What the program says of itself: the last item counts."""
    return [True]


@pytest.fixture
async def served(store: PublishedStore, nursery: trio.Nursery, ready: list[bool]) -> Served:
    api = HttpApi(await observe(store, nursery), is_ready=lambda: ready[-1])
    return await start(nursery, api.respond)


async def test_health(served: Served, store: PublishedStore) -> None:
    await store.publish("demo/1", {b"a": b"a"}, "first")
    answer = await served.get("/health")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/health+json")
    assert answer.json()["status"] == "pass"


async def test_health_that_fails_is_503(served: Served, store: PublishedStore) -> None:
    await store.publish("demo/1", {b"a": b"a"}, "first")
    with store.place.unreachable("first"):
        answer = await served.get("/health")
    assert (answer.status, answer.json()["status"]) == (503, "fail")


async def test_alive_and_ready_whatever_the_backends_do(served: Served, store: PublishedStore) -> None:
    await store.publish("demo/1", {b"a": b"a"}, "first")
    with store.place.unreachable("first"), store.place.unreachable("second"):
        assert (await served.get("/livez")).json() == {"status": "pass"}
        assert (await served.get("/readyz")).json() == {"status": "pass"}


async def test_not_ready(served: Served, store: PublishedStore, ready: list[bool]) -> None:
    ready.append(False)
    assert (await served.get("/readyz")).status == 503
    assert (await served.get("/livez")).status == 200
    ready.append(True)
    assert (await served.get("/readyz")).status == 200
    hidden = store.catalog_path.rename(store.catalog_path.with_name("hidden"))
    answer = await served.get("/readyz")
    assert (answer.status, "there is no catalog" in answer.json()["detail"]) == (503, True)
    assert (await served.get("/livez")).status == 200
    assert (await served.get("/v1/events")).status == 503
    hidden.rename(store.catalog_path)


async def test_an_unknown_path(served: Served) -> None:
    answer = await served.get("/health/")
    assert answer.status == 404
    assert (
        answer.json()["detail"]
        == "there are /, /style.css, /page.js, /icon.svg, /health, /livez, /readyz, /metrics, /v1/events"
    )


@pytest.mark.parametrize("place", ["local"], indirect=True)
async def test_any_question_is_answered_in_one_way_or_the_other(served: Served, store: PublishedStore) -> None:
    """Whatever the parameters are: 200 with events, or 400 with what is wrong; never 500, a log line or a hang."""
    await add_events(store, 1, 2, 3)
    caller = await served.connect()
    answered: Counter[int] = Counter()
    async with caller.stream:
        for query in questions():
            with trio.fail_after(60):
                answer = await caller.get(f"/v1/events?{query}")
            answered[answer.status] += 1
            assert answer.status in (200, 400), query
            if answer.status == 200:
                assert {event["type"] for event in answer.json()} <= {"v1.package.published"}
                assert int(answer.headers["castore-next-since"]) >= 0
                assert answer.headers["castore-first-kept"] == "1"
            else:
                assert "\n" not in answer.json()["detail"]
    assert min(answered[200], answered[400]) > 100


def questions() -> list[str]:
    """Queries that are drawn anew each time from what others got wrong: numbers, times, escapes, and nonsense."""
    made: list[str] = []
    numbers = st.integers(-(2**70), 2**70).map(str) | st.integers(0, 4).map(str)
    times = st.datetimes().map(lambda each: each.isoformat()) | st.from_regex(r"[0-9]{1,25}(\.[0-9]+)?[a-z]{0,3}")
    texts = st.text(max_size=12) | st.sampled_from(["", "\0", "²", "१", "1e9", "nan", "-0", "0x1", " 1", "9" * 400])
    quoted = (numbers | times | texts).map(lambda text: quote(text.encode("utf-8", "surrogatepass")))
    raw = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12).filter(lambda text: "#" not in text)
    value = quoted | quoted | raw
    # A wait that is allowed would be waited for.
    known = st.tuples(st.sampled_from(["since", "limit", "type", "offset"]), value)
    waits = st.tuples(
        st.just("wait"), value.filter(lambda text: text.isascii() and text not in {str(n) for n in range(31)})
    )
    pairs = st.lists(known | known | waits, min_size=1, max_size=4)

    @settings(max_examples=600, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(pairs.map(lambda found: "&".join(f"{name}={text}" for name, text in found)) | raw)
    def draw(query: str) -> None:
        made.append(query)

    draw()
    return made


async def add_events(store: PublishedStore, *sizes: int) -> None:
    """Events with numbers, of types that alternate."""
    for size in sizes:
        store.execute(
            "INSERT INTO events (event_id, type, subject, time_ns, data) VALUES (?, ?, 'p/1', 1700000000000000000, ?)",
            f"00000000-0000-0000-0000-{size:012}",
            "v1.package.published",
            '{"name":"p","version":"1","producer":"x","retention_class":"s","publisher_uid":0,"backend_ids":["first"],'
            f'"file_count":1,"size_bytes":{size},"manifest_digest":"manifest-sha256:{"0" * 64}"}}',
        )


async def test_events_in_pages(served: Served, store: PublishedStore) -> None:
    await add_events(store, *range(1, 8))
    answer = await served.get("/v1/events?limit=3")
    assert answer.headers["content-type"] == "application/cloudevents-batch+json"
    seen = []
    since = "0"
    while page := (answer := await served.get(f"/v1/events?limit=3&since={since}")).json():
        for event in page:
            check_event(event)
        seen += [event["data"]["size_bytes"] for event in page]
        since = answer.headers["castore-next-since"]
        assert since == str(int(page[-1]["sequence"]))
    assert seen == list(range(1, 8))
    # The sequence of an event is as good a place to go on.
    assert len((await served.get(f"/v1/events?since={'3'.zfill(20)}")).json()) == 4
    assert (await served.get("/v1/events?since=2023-11-15T00:00Z")).json() == []
    assert len((await served.get("/v1/events?since=2023-11-14T00:00Z")).json()) == 7


async def test_events_of_a_type(served: Served, store: PublishedStore) -> None:
    await add_events(store, 1, 2, 3)
    answer = await served.get("/v1/events?type=v1.package.published")
    assert len(answer.json()) == 3
    answer = await served.get("/v1/events?type=v1.other")
    assert (answer.json(), answer.headers["castore-next-since"]) == ([], "3")


@pytest.mark.parametrize(
    "query", ["limit=0", f"limit={EVENTS_MAX + 1}", "limit=x", "wait=31", "wait=-1", "since=x", "since=-1", "limit=²"]
)
async def test_questions_that_are_not_understood(served: Served, query: str) -> None:
    answer = await served.get(f"/v1/events?{query.replace('²', '%C2%B2')}")
    assert answer.status == 400
    assert "expected" in answer.json()["detail"]


async def test_waiting_for_the_next_event(served: Served, store: PublishedStore) -> None:
    await add_events(store, 1)
    caller = await served.connect()
    async with caller.stream:
        with trio.fail_after(25):
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    answer = await caller.get("/v1/events?since=1&wait=30")
                    assert [event["data"]["size_bytes"] for event in answer.json()] == [2]

                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked(0.05)
                await add_events(store, 2)
    with trio.fail_after(25):
        assert (await served.get("/v1/events?since=2&wait=1")).json() == []
