"""The status page: facts become HTML, at most once a second however many look. It changes nothing.

It needs no script: the page is whole as it is sent. `page.js` fetches it again and replaces the sections that changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import trio

from castore import __version__
from castore.api.markup import Markup, join, tag, text
from castore.api.page_facts import PageFacts, gather
from castore.api.page_parts import empty, figures, instant, more, section, table
from castore.api.page_sections import COUNTING, backends, events, failed, packages, queue, verification
from castore.api.sources import Sources
from castore.readable import format_bytes

PAGE_SECONDS: Final = 1.0
"""A page this young is given again."""
CHECKS_SHOWN: Final = 20
"""Checks that say something, on the page. /health has all."""

HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
"""Of the page: nothing runs or loads but its own files, and nobody shows it in a frame."""

_FOLDER: Final = Path(__file__).with_name("page_files")
FILES: Final = {
    "/style.css": ("text/css; charset=utf-8", _FOLDER / "style.css"),
    "/page.js": ("text/javascript; charset=utf-8", _FOLDER / "page.js"),
    "/icon.svg": ("image/svg+xml", _FOLDER / "icon.svg"),
}
"""What the page loads: media type and file by path."""

_SAID: Final = {
    "pass": ("All is well", "Every published byte has a good copy that can be reached."),
    "warn": ("Needs attention", "Everything can be read. Something wants looking at."),
    "fail": ("Failing", "Some of what is published cannot be read, or may not be."),
}


class StatusPage:
    """Makes the page."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._turn = trio.Lock()
        self._made: tuple[float, bytes] | None = None

    async def make(self) -> bytes:
        """The page, at most PAGE_SECONDS old, within seconds whatever the backends do."""
        async with self._turn:
            if self._made is None or trio.current_time() - self._made[0] > PAGE_SECONDS:
                page = render(self._sources, await gather(self._sources)).encode()
                self._made = trio.current_time(), page
            return self._made[1]


def render(sources: Sources, facts: PageFacts) -> str:
    """The whole page."""
    status = facts.health["status"]
    title, _ = _SAID[status]
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} · castore"),
        tag("link", rel="icon", href="/icon.svg"),
        tag("link", rel="stylesheet", href="/style.css"),
        tag("script", src="/page.js", defer=""),
    )
    body = join(
        tag("a", "Skip to the content", class_="skip", href="#content"),
        _header(sources, facts),
        tag("main", *_sections(sources, facts), id="content", tabindex="-1"),
        tag(
            "footer",
            tag("p", f"castore {__version__} · the same for programs: ", *_links()),
        ),
    )
    return "<!doctype html>\n" + tag("html", tag("head", head), tag("body", body), lang="en") + "\n"


def _header(sources: Sources, facts: PageFacts) -> Markup:
    where = sources.mountpoint or "without a mount"
    return tag(
        "header",
        tag("h1", tag("span", "castore", class_="name"), " ", tag("span", where, class_="where")),
        tag(
            "p",
            tag("span", "As of ", instant(facts.made_at_ns), " UTC", id="made"),
            tag("span", role="status", id="live"),
            class_="asof",
        ),
        tag(
            "nav",
            tag("ul", *(tag("li", tag("a", name, href=f"#{key}")) for key, name in _CONTENTS)),
            aria_label="Sections",
        ),
    )


_CONTENTS: Final = (
    ("health", "Health"),
    ("failed", "Failed locations"),
    ("backends", "Backends"),
    ("verification", "Verification"),
    ("queue", "Queue"),
    ("packages", "Packages"),
    ("events", "Events"),
)


def _sections(sources: Sources, facts: PageFacts) -> list[Markup]:
    return [
        _health(facts),
        failed(facts),
        backends(sources, facts),
        verification(facts),
        queue(facts),
        packages(facts),
        events(facts),
    ]


def _health(facts: PageFacts) -> Markup:
    status = facts.health["status"]
    title, meaning = _SAID[status]
    checks = [
        (name, check) for name, group in facts.health["checks"].items() for check in group if check["status"] != "pass"
    ]
    checks.sort(key=lambda item: item[1]["status"])  # fail before warn
    rows = [[_state(check["status"]), _check_name(name, check), _check_says(check)] for name, check in checks]
    said = None
    if rows:
        said = join(
            table("What health checks say", ["Status", "Check", "Says"], rows[:CHECKS_SHOWN]),
            more(len(rows) - CHECKS_SHOWN, "/health has all"),
        )
    return section(
        "health",
        "Health",
        tag("p", tag("strong", title), " ", tag("span", meaning), class_=f"banner {status}"),
        _figures(facts),
        said,
    )


def _figures(facts: PageFacts) -> Markup:
    counts = facts.counts
    if counts is None:
        return empty("The catalog cannot be read." if facts.rows is None else COUNTING)
    good = sum(each.stored_count + each.verified_count for each in counts.coverage)
    recent = sum(each.verified_since[2] for each in counts.coverage)
    waiting = sum(files for state, files, _ in facts.queue.states if state != "stored") if facts.queue else 0
    found = [
        ("Packages", f"{counts.package_count:,}", format_bytes(counts.package_bytes)),
        ("Good locations", f"{good:,}", format_bytes(sum(row[3] for row in counts.locations if row[1] in _GOOD))),
        ("Failed locations", f"{counts.failed_count:,}", "missing or wrong bytes"),
        ("Verified in 30 days", f"{100 * recent // good} %" if good else "-", f"{recent:,} of {good:,}"),
    ]
    if facts.queue is not None:
        found.append(("Files waiting", f"{waiting:,}", f"{format_bytes(facts.queue.staged_bytes)} staged"))
    return figures(found)


_GOOD: Final = ("stored", "verified")


def _state(status: str) -> Markup:
    return tag("span", status, class_=f"state {status}")


def _check_name(name: str, check: dict[str, Any]) -> Markup:
    component = check.get("componentId")
    return join(name, f" {component}" if component else None)


def _check_says(check: dict[str, Any]) -> Markup:
    packages = ", ".join(check.get("packages", []))
    # What stands between backticks is a command.
    parts = check.get("output", "").split("`")
    said = [tag("code", part) if number % 2 else text(part) for number, part in enumerate(parts)]
    return join(*said, tag("div", f"Packages: {packages}", class_="quiet") if packages else None)


def _links() -> list[Markup]:
    paths = ("/health", "/metrics", "/v1/events")
    return [join(" " if path != paths[0] else None, tag("a", path, href=path)) for path in paths]
