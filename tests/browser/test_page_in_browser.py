"""The status page in headless Chromium: with and without scripts, light and dark, on a desk and in a hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.from_thread

from castore.api.http_api import HttpApi
from castore.catalog.records import FailureReason
from tests.api.http_client import start
from tests.api.observed import observe
from tests.browser.chromium import Chromium, Page
from tests.mount.store import wait_until
from tests.places import Place
from tests.published import PublishedStore, numbered_files

DESK, HAND = 1280, 390
CONTRAST_MIN = 4.5
"""WCAG 2.2, 1.4.3, for text of any size."""

MEASURE = Path(__file__).with_name("measure.js").read_text()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


class Site:
    """A served store, and how to change it from the browser's thread."""

    def __init__(self, store: PublishedStore, url: str, run: Callable[..., Any]) -> None:
        self.store = store
        self.url = url
        self._run = run

    def publish(self, ref: str) -> None:
        self._run(self.store.publish, ref, {b"a": ref.encode()})


def with_site(root: Path, place: Place, look: Callable[[Site], None]) -> None:
    """Serve a store with something of everything, and look at it from another thread."""

    async def serve() -> None:
        store = await PublishedStore(root, place, "first", "second").create()
        digests = await store.publish(
            "evil/1", {b"<script>document.title='evil'</script>\x1b[31m": b"a", b"x" * 250: b"b"}
        )
        for path, reason in zip([b"x" * 250, b""], FailureReason, strict=False):
            store.write(
                lambda transaction, path=path, reason=reason: transaction.fail_location(digests[path], "first", reason)  # type: ignore[misc]
            )
        evil = next(path for path in digests if b"script" in path)
        for backend_id in store.backends:
            store.write(
                lambda transaction, backend_id=backend_id: transaction.fail_location(  # type: ignore[misc]
                    digests[evil], backend_id, FailureReason.MISSING
                )
            )
        await store.publish("zlib/1.3.1", numbered_files(8))
        async with trio.open_nursery() as nursery:
            sources = await observe(store, nursery)
            known: list[int | None] = [None]
            while None in known:  # how the backends are is said from the first page on
                known = [probe.duration_ms for probe in (await sources.probes.latest()).values()]
            served = await start(nursery, HttpApi(sources).respond)
            site = Site(store, f"http://localhost:{served.port}/", trio.from_thread.run)
            await trio.to_thread.run_sync(look, site)
            nursery.cancel_scope.cancel()
        await store.aclose()

    trio.run(serve)


@pytest.fixture
def visit(tmp_path: Path, place: Place) -> Callable[[Callable[[Site], None]], None]:
    return lambda look: with_site(tmp_path, place, look)


Visit = Callable[[Callable[[Site], None]], None]


@contextmanager
def opened(chromium: Chromium, site: Site, **how: Any) -> Iterator[Page]:
    with chromium.page(**how) as page:
        page.open(site.url)
        yield page
        assert page.problems() == []
        assert {url for url in page.requests() if not url.startswith(site.url)} == set()


def test_every_look(visit: Visit, chromium: Chromium, tmp_path: Path) -> None:
    grounds = set()

    def look(site: Site) -> None:
        for dark in (False, True):
            for width in (DESK, HAND):
                with opened(chromium, site, width=width, dark=dark) as page:
                    measured = page.tell(MEASURE)
                    assert measured["textCount"] > 100
                    poor = {text: ratio for text, ratio in measured["contrasts"].items() if ratio < CONTRAST_MIN}
                    assert poor == {}, (dark, width)
                    assert measured["pageWidth"] <= width, (dark, width)
                    assert measured["cut"] == [], (dark, width)
                    grounds.add(measured["ground"])
                    page.screenshot(tmp_path / f"{width}-{dark}.png")
                    assert (tmp_path / f"{width}-{dark}.png").stat().st_size > 10_000
                    assert page.tell("document.title") == "Failing · castore"

    visit(look)
    assert len(grounds) == 2  # light and dark differ


def test_what_a_screen_reader_meets(visit: Visit, chromium: Chromium) -> None:
    def look(site: Site) -> None:
        for width in (DESK, HAND):
            with opened(chromium, site, width=width) as page:
                nodes = page.call("Accessibility.getFullAXTree")["nodes"]
                said = [
                    (node["role"]["value"], node.get("name", {}).get("value", ""))
                    for node in nodes
                    if not node["ignored"]
                ]
                roles = [role for role, _ in said]
                for landmark in ("banner", "navigation", "main", "contentinfo"):
                    assert roles.count(landmark) == 1, (landmark, width)
                headings = [name for role, name in said if role == "heading"]
                assert headings[1:] == [
                    *("Health", "Failed locations", "Backends", "Verification", "Queue", "Packages", "Events")
                ]
                assert {name for role, name in said if role == "region"} == set(headings[1:])
                tables = [name for role, name in said if role == "table"]
                assert "Failed locations" in tables
                assert all(tables)
                assert ("rowheader", "zlib/1.3.1") in said
                assert ("columnheader", "Backend") in said, width
                assert ("image", "0 % of first verified within 30 days") in [
                    ("image" if role == "img" else role, name) for role, name in said
                ]
                unnamed = [
                    role for role, name in said if role in ("link", "button", "img", "image", "table") and not name
                ]
                assert unnamed == []

    visit(look)


def test_without_scripts_it_says_the_same(visit: Visit, chromium: Chromium) -> None:
    def look(site: Site) -> None:
        texts = []
        for scripts in (True, False):
            with opened(chromium, site, scripts=scripts) as page:
                texts.append(page.tell("document.querySelector('main').innerText"))
                assert page.tell("document.querySelectorAll('button').length") == int(scripts)
        assert len(texts[0]) > 500
        steady = [re.sub(r"\d+ ms|[\d.]+ \w+ left", "", text) for text in texts]
        assert steady[0] == steady[1]

    visit(look)


def test_it_updates_itself(visit: Visit, chromium: Chromium) -> None:
    def look(site: Site) -> None:
        with opened(chromium, site) as page:
            page.tell("document.querySelector('#events').id = 'events'; window.kept = document.querySelector('#queue')")
            site.publish("news/1")
            wait_until(lambda: "news/1" in page.tell("document.querySelector('#packages').innerText"), "it is there")
            assert page.tell("document.querySelector('#queue') === window.kept")  # what is the same stays in place
            # Paused: nothing is asked for.
            page.tell("document.querySelector('button').click()")
            assert page.tell("document.querySelector('button').innerText") == "Go on updating"
            site.publish("news/2")
            asked = len(page.requests())
            page.tell("document.dispatchEvent(new Event('visibilitychange'))")
            assert len(page.requests()) == asked
            page.tell("document.querySelector('button').click()")
            wait_until(lambda: "news/2" in page.tell("document.querySelector('#packages').innerText"), "it goes on")

    visit(look)


def test_a_server_that_goes_away(visit: Visit, chromium: Chromium) -> None:
    with chromium.page() as page:
        visit(lambda site: page.open(site.url))
        wait_until(lambda: "no answer" in page.tell("document.querySelector('#live').innerText"), "it says so")
        assert page.tell("document.querySelector('#packages').innerText.includes('zlib/1.3.1')")  # and stays as it was
