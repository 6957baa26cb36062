"""The status page as HTML: what it says, that no name becomes markup, and that it stays small. Not how it looks."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from html import unescape
from html.parser import HTMLParser

import pytest
import trio

from castore.api.http_api import HttpApi
from castore.api.page import HEADERS
from castore.api.page_facts import EVENTS_SHOWN, FAILED_SHOWN, PACKAGES_SHOWN, PATHS_SHOWN
from castore.catalog.records import FailureReason
from castore.registry.locations import record_bad_read, record_stored
from tests.api.http_client import Served, start
from tests.api.observed import observe
from tests.published import PublishedStore, numbered_files, summary_of

PAGE_MAX_BYTES = 200_000
"""With everything that is bounded at its bound, names of ordinary length."""

SECTIONS = ["health", "failed", "backends", "verification", "queue", "packages", "events"]
Fetch = Callable[[], Awaitable[str]]


class Outline(HTMLParser):
    """Checks that elements are nested right, and keeps what refers to what."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def words(page: str) -> str:
    """What a person reads, on one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())


def section(page: str, key: str) -> str:
    """What a person reads of one section."""
    found = re.search(rf'<section [^>]*id="{key}".*?</section>', page, flags=re.DOTALL)
    assert found, key
    return words(found[0])


@pytest.fixture
async def served(store: PublishedStore, nursery: trio.Nursery) -> Served:
    return await start(nursery, HttpApi(await observe(store, nursery)).respond)


@pytest.fixture
def fetch(served: Served) -> Fetch:
    async def fetch() -> str:
        answer = await served.get("/")
        assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        return answer.body.decode()

    return fetch


async def test_an_empty_store(fetch: Fetch) -> None:
    page = await fetch()
    assert page.startswith('<!doctype html>\n<html lang="en">')
    assert "All is well" in section(page, "health")
    for key, said in (
        ("failed", "no object is known to be missing or damaged"),
        ("verification", "Nothing is stored yet."),
        ("queue", "This program has no writing mount"),
        ("packages", "Nothing is published yet."),
        ("events", "Nothing has happened yet."),
    ):
        assert said in section(page, key)


async def test_what_it_says(fetch: Fetch, store: PublishedStore) -> None:
    digests = await store.publish("zlib/1.3", {b"lib/libz.so": b"z" * 2048, b"README": b"r"})
    await store.publish("other/2", {b"x": b"x"}, "second")
    store.write(
        lambda transaction: transaction.fail_location(digests[b"lib/libz.so"], "first", FailureReason.DIGEST_MISMATCH)
    )
    store.execute(
        "UPDATE storage_locations SET status = 'verified', verified_at_ns = ? WHERE backend_id = 'second'",
        time.time_ns() - 3 * 86_400 * 10**9,
    )
    with store.place.unreachable("first"):
        page = await fetch()
    health = section(page, "health")
    assert "fail" in health or "Failing" in health or "Needs attention" in health
    assert "locations:failed" in health
    assert "backend:responseTime first" in health
    failed = section(page, "failed")
    assert "zlib/1.3 / lib/libz.so first wrong bytes" in failed
    assert str(digests[b"lib/libz.so"])[:20] in failed
    backends = section(page, "backends")
    assert re.search(r"second local pass .* 5 .* 0", backends)
    assert re.search(r"first local fail", backends)
    assert re.search(r"second 100 % in 30 days 0 5 0 0 0 0", section(page, "verification"))
    assert re.search(r"other/2 .* 1 1 B tests second zlib/1.3", section(page, "packages"))


async def test_its_outline(fetch: Fetch, store: PublishedStore) -> None:
    digests = await store.publish("demo/1", numbered_files(2))
    store.write(lambda transaction: transaction.fail_location(digests[b""], "first", FailureReason.MISSING))
    page = await fetch()
    outline = Outline(page)
    ids = outline.values("id")
    assert len(ids) == len(set(ids))
    assert [key for key in ids if key in SECTIONS] == SECTIONS
    assert {target.removeprefix("#") for target in outline.values("href") if target.startswith("#")} <= set(ids)
    assert set(outline.values("aria-labelledby")) <= set(ids)
    assert [tag for tag in outline.tags if tag in ("header", "nav", "main", "footer")] == [
        *("header", "nav", "main", "footer")
    ]
    assert [tag for tag in outline.tags if re.fullmatch("h[1-6]", tag)] == ["h1"] + ["h2"] * len(SECTIONS)
    assert outline.tags.count("caption") == outline.tags.count("table") == outline.tags.count("thead") > 3
    assert outline.values("scope").count("row") == outline.tags.count("tr") - outline.tags.count("thead")
    assert not [name for name, _ in outline.attributes if name.startswith("on") or name == "style"]
    assert {tag for tag in outline.tags if tag in ("style", "form", "iframe", "object", "img")} == set()


async def test_the_policy_lets_only_its_own_files_in(served: Served) -> None:
    answer = await served.get("/")
    for name, value in HEADERS.items():
        assert answer.headers[name.lower()] == value
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    loaded = set(re.findall(r'(?:src|href)="(/[a-z]+\.[a-z]+)"', answer.body.decode()))
    assert loaded == {"/style.css", "/page.js", "/icon.svg"}
    types = {path: (await served.get(path)).headers["content-type"] for path in loaded}
    assert types == {
        "/style.css": "text/css; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8",
        "/icon.svg": "image/svg+xml",
    }


HOSTILE = {
    b"<script>alert(1)</script>": "<script>alert(1)</script>",
    b"\"'><img src=x onerror=alert(1)>": "\"'><img src=x onerror=alert(1)>",
    b"&lt;already&gt;": "&lt;already&gt;",
    b"\x1b[31mred\x07\r\n": "\\x1b[31mred\\x07\\r\\n",
    b"\xff\xfe not text": "\\xff\\xfe not text",
    "a\u202egnp.exe".encode(): "a\\u202egnp.exe",
    b"back\\slash": "back\\\\slash",
}


async def test_names_stay_names(fetch: Fetch, store: PublishedStore) -> None:
    digests = await store.publish("evil/1", {name: b"%d" % number for number, name in enumerate(HOSTILE)}, "first")
    for name in HOSTILE:
        store.write(
            lambda transaction, name=name: transaction.fail_location(digests[name], "first", FailureReason.MISSING)  # type: ignore[misc]
        )
    page = await fetch()
    Outline(page)
    assert page.isprintable() or set(page) - {"\n"} == {char for char in page if char.isprintable()}
    shown = re.findall(r'<span class="path">(.*?)</span>', page, flags=re.DOTALL)
    assert {unescape(path) for path in shown} == set(HOSTILE.values())
    assert page.count("<script") == 1


async def test_long_names_are_cut(fetch: Fetch, store: PublishedStore) -> None:
    path = b"/".join([b"d" * 255] * 12) + b"/the-end"
    digests = await store.publish("long/1", {path: b"x"}, "first")
    store.write(lambda transaction: transaction.fail_location(digests[path], "first", FailureReason.MISSING))
    (shown,) = re.findall(r'<span class="path">(.*?)</span>', await fetch())
    assert len(shown) < 300
    assert shown.startswith("ddd")
    assert shown.endswith("d/the-end")


async def test_many_of_everything(fetch: Fetch, store: PublishedStore) -> None:
    """10,000 packages and 100,000 failed locations: the page is as small as with a hundred."""
    digests = await store.publish("model/1", {b"dir/file": b"x"}, "first")
    (inode,) = store.execute("SELECT inode FROM entries WHERE name = x'66696c65'")[0]
    store.execute("BEGIN")
    store.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) "
        "INSERT INTO blobs SELECT 1000000 + i, 'sha256', randomblob(32), 1, 131072, 'xxh3-64', zeroblob(8) FROM n"
    )
    store.execute(
        "INSERT INTO storage_locations SELECT blob_id, 'first', 'failed', 'missing', 1, 1 FROM blobs "
        "WHERE blob_id > 1000000"
    )
    store.execute(
        "INSERT INTO entries SELECT blob_id, (SELECT parent_id FROM entries WHERE inode = ?), "
        "CAST('file-' || blob_id AS BLOB), blob_id, 2, 420, 0, 0, 1, 1, 1, 1, blob_id, x'', 0 FROM blobs "
        "WHERE blob_id > 1000000",
        inode,
    )
    store.execute(
        "INSERT INTO packages SELECT b.blob_id, 'model', 'v' || b.blob_id, 2000000 + b.blob_id, 'ci', 'x', 0, ?, 1, 1, "
        "manifest.blob_id, '[\"first\"]' FROM blobs AS b, blobs AS manifest "
        "WHERE b.blob_id BETWEEN 1000001 AND 1010000 AND manifest.digest = ?",
        *(time.time_ns(), digests[b""].raw),
    )
    store.execute("COMMIT")
    started = time.perf_counter()
    page = await fetch()
    took = time.perf_counter() - started
    assert len(page) < PAGE_MAX_BYTES
    assert took < 10  # 0.3 s on an idle machine
    failed = section(page, "failed")
    assert failed.count("missing") - 1 == FAILED_SHOWN
    assert f"and {100_000 - FAILED_SHOWN:,} more: castore storage verify" in failed
    packages = section(page, "packages")
    assert packages.count("model/") == PACKAGES_SHOWN
    assert f"and {10_001 - PACKAGES_SHOWN:,} more: castore package list" in packages


async def test_a_blob_of_many_files(fetch: Fetch, store: PublishedStore) -> None:
    files = {b"empty-%d" % number: b"" for number in range(40)}
    digests = await store.publish("many/1", files, "first")
    store.write(lambda transaction: transaction.fail_location(digests[b"empty-0"], "first", FailureReason.MISSING))
    failed = section(await fetch(), "failed")
    assert failed.count("many/1 / empty-") == PATHS_SHOWN
    assert f"and {40 - PATHS_SHOWN} more" in failed


async def test_events_are_the_last_ones(fetch: Fetch, store: PublishedStore) -> None:
    for number in range(50):
        store.execute(
            "INSERT INTO events (event_id, type, subject, time_ns, data) VALUES (?, 'v1.package.published', ?, "
            "1700000000000000000, ?)",
            f"00000000-0000-0000-0000-{number:012}",
            f"p/{number}",
            '{"name":"p","version":"1","producer":"x","retention_class":"s","publisher_uid":0,"backend_ids":["first"],'
            f'"file_count":{number},"size_bytes":1,"manifest_digest":"manifest-sha256:{"0" * 64}"}}',
        )
    events = section(await fetch(), "events")
    assert [int(number) for number in re.findall(r"p/(\d+)", events)] == list(range(49, 49 - EVENTS_SHOWN, -1))
    assert "2023-11-14 22:13:20 p/49 49 files · 1 B" in events


async def test_events_of_one_kind_share_a_row(fetch: Fetch, store: PublishedStore) -> None:
    blobs = [(summary_of(b"%d" % number), "first") for number in range(40)]
    store.write(lambda transaction: record_stored(transaction, blobs[:10]))
    bad = blobs[5][0].digest
    store.write(lambda transaction: record_bad_read(transaction, bad, "first", FailureReason.MISSING))
    store.write(lambda transaction: record_stored(transaction, blobs[10:]))
    events = section(await fetch(), "events")
    rows = re.findall(r"(v1\.\S+) \S+ \S+ (.*?)(?= v1\.| All of them)", events)
    assert [name for name, _ in rows] == [
        *("v1.storage.location_stored", "v1.storage.location_failed", "v1.storage.location_stored")
    ]
    assert [said for _, said in rows] == [
        "30 objects in first · 60 B",
        f"{str(bad)[:23]}… missing · in first · 1 B",
        "10 objects in first · 10 B",
    ]


async def test_a_catalog_that_is_gone(fetch: Fetch, store: PublishedStore) -> None:
    hidden = store.catalog_path.rename(store.catalog_path.with_name("hidden"))
    page = await fetch()
    assert "Failing" in section(page, "health")
    assert "there is no catalog" in section(page, "health")
    for key in ("failed", "verification", "packages", "events"):
        assert "The catalog cannot be read" in section(page, key)
    assert "first local pass" in section(page, "backends")
    hidden.rename(store.catalog_path)
