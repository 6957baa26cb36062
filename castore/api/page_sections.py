"""The sections of the status page, from facts: backends, verification, failures, queue, packages, events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from castore.api.markup import Child, Markup, join, tag
from castore.api.page_facts import EVENTS_SHOWN, PageFacts
from castore.api.page_parts import bar, command, empty, figures, instant, more, ref_and_path, section, table
from castore.api.queue_report import MountSaid
from castore.api.sources import Sources
from castore.catalog.event_log import StoredEvent
from castore.catalog.overview import BackendCoverage, FailedLocation
from castore.catalog.records import LocationStatus
from castore.readable import format_bytes, format_seconds

BACKENDS_SHOWN: Final = 50
"""Backends in a table. `castore storage backends` names all."""

_DAY_NS: Final = 86_400 * 10**9
_REASONS: Final = {
    "digest_mismatch": "wrong bytes",
    "size_mismatch": "wrong size",
    "missing": "missing",
}
_NO_CATALOG: Final = "The catalog cannot be read: health says why."
COUNTING: Final = "The locations are being counted for the first time."


def failed(facts: PageFacts) -> Markup:
    """Locations with missing or wrong bytes, and the files that they are for."""
    counts, rows = facts.counts, facts.rows
    if rows is None:
        return section("failed", "Failed locations", empty(_NO_CATALOG))
    if not rows.failed:
        return section("failed", "Failed locations", empty("None: no object is known to be missing or damaged."))
    return section(
        "failed",
        "Failed locations",
        tag("p", "Objects that are missing or damaged where they are stored.", class_="lead"),
        table(
            "Failed locations",
            ["Files", "Backend", "Found", "Last verified", "Digest"],
            [
                [
                    _files(each),
                    tag("span", each.backend_id, class_="id"),
                    tag("span", _REASONS.get(each.reason, each.reason), class_="state fail"),
                    instant(each.judged_at_ns),
                    tag("code", f"{str(each.digest)[: len(each.digest.algorithm) + 17]}…", title=str(each.digest)),
                ]
                for each in rows.failed
            ],
        ),
        more(_not_shown(counts.failed_count if counts else 0, rows.failed), command("castore storage verify")),
    )


def _not_shown(whole: int, shown: Sequence[object]) -> int:
    """How many; none while they are not counted."""
    return max(0, whole - len(shown))


def _files(location: FailedLocation) -> Markup:
    if not location.uses:
        return tag("span", "no package uses it", class_="quiet")
    files = [tag("div", ref_and_path(use.ref, use.path)) for use in location.uses]
    left = location.use_count - len(location.uses)
    return join(*files, tag("div", f"and {left:,} more", class_="quiet") if left > 0 else None)


def backends(sources: Sources, facts: PageFacts) -> Markup:
    """How each backend is, what it holds, and how it answered."""
    held: dict[str, dict[LocationStatus, tuple[int, int]]] = {}
    for backend_id, status, count, size in facts.counts.locations if facts.counts else []:
        held.setdefault(backend_id, {})[status] = (count, size)
    names = [*facts.probes, *sorted(held.keys() - facts.probes.keys())]
    rows: list[list[Child]] = []
    for name in names[:BACKENDS_SHOWN]:
        probe, calls = facts.probes.get(name), sources.calls.get(name)
        has = held.get(name, {})
        good = [has[status] for status in (LocationStatus.STORED, LocationStatus.VERIFIED) if status in has]
        gets = calls.durations.get("get") if calls else None
        bound = gets.within(0.95) if gets else None
        rows.append(
            [
                join(
                    tag("span", name, class_="ref"),
                    " ",
                    tag("span", sources.backend_types.get(name, ""), class_="quiet"),
                ),
                _health_of(probe.health.status if probe else "fail"),
                probe.health.detail if probe else "not in the configuration",
                "-" if probe is None or probe.duration_ms is None else f"{probe.duration_ms:,} ms",
                sum(count for count, _ in good),
                format_bytes(sum(size for _, size in good)),
                has.get(LocationStatus.FAILED, (0, 0))[0],
                "-" if bound is None else ("over 60 s" if bound == float("inf") else f"≤ {bound * 1000:g} ms"),
                sum(calls.errors.values()) if calls else 0,
            ]
        )
    head = ["Backend", "Health", "Says", "Probe", "Objects", "Size", "Failed", "Gets, 95 %", "Errors"]
    return section(
        "backends",
        "Backends",
        table("Backends; gets and errors since this program began", head, rows, right=(3, 4, 5, 6, 7, 8)),
        more(len(names) - BACKENDS_SHOWN, command("castore storage backends")),
    )


def _health_of(status: str) -> Markup:
    return tag("span", status, class_=f"state {status}")


def verification(facts: PageFacts) -> Markup:
    """How much was re-read, and how long ago."""
    if facts.counts is None:
        return section("verification", "Verification", empty(_NO_CATALOG if facts.rows is None else COUNTING))
    coverage = [each for each in facts.counts.coverage if each.stored_count + each.verified_count]
    if not coverage:
        return section("verification", "Verification", empty("Nothing is stored yet."))
    head = ["Backend", "Coverage", "< 1 day", "1 to 7", "7 to 30", "30 to 90", "Older", "Never", "Oldest proof"]
    return section(
        "verification",
        "Verification",
        tag("p", "Good objects by when they were last re-read and compared with their digest.", class_="lead"),
        table(
            "Objects by age of their verification",
            head,
            [_coverage_row(each) for each in coverage[:BACKENDS_SHOWN]],
            right=(2, 3, 4, 5, 6, 7, 8),
        ),
        more(len(coverage) - BACKENDS_SHOWN, tag("a", "/metrics", href="/metrics")),
    )


def _coverage_row(each: BackendCoverage) -> list[Markup | str | int]:
    day, week, month, quarter = each.verified_since
    ages = [day, week - day, month - week, quarter - month, each.verified_count - quarter]
    whole = each.stored_count + each.verified_count
    parts = [*zip(("age1", "age7", "age30", "age90", "older"), ages, strict=True), ("never", each.stored_count)]
    label = f"{100 * month // whole} % of {each.backend_id} verified within 30 days"
    age_days = (time.time_ns() - each.oldest_proof_ns) / _DAY_NS if each.oldest_proof_ns else 0
    return [
        tag("span", each.backend_id, class_="ref id"),
        join(bar(label, parts), tag("span", f"{100 * month // whole} % in 30 days", class_="quiet")),
        *ages,
        each.stored_count,
        f"{age_days:,.1f} d",
    ]


def queue(facts: PageFacts) -> Markup:
    """What is in ingest/, and how fast it becomes stored."""
    waiting = facts.queue
    if waiting is None:
        return section("queue", "Queue", empty(_no_queue(facts.mount)))
    left = [f"of the mount at {facts.mount.mountpoint}"] if facts.mount is not None else []
    left += [f"{waiting.rate.files_per_s:,.1f} files/s, {format_bytes(int(waiting.rate.bytes_per_s))}/s"]
    if waiting.eta_s:
        left.append(f"about {format_seconds(waiting.eta_s)} left")
    left.append(f"{format_bytes(waiting.staged_bytes)} of {format_bytes(waiting.staging_max_bytes)} staged")
    states = figures([(state, f"{files:,}", format_bytes(size)) for state, files, size in waiting.states])
    versions = table(
        "Versions in ingest/",
        ["Version", "Stored", "Size", "Problem"],
        [
            [
                tag("span", each.ref, class_="ref"),
                f"{each.stored_files:,} of {each.total_files:,}",
                f"{format_bytes(each.stored_bytes)} of {format_bytes(each.total_bytes)}",
                each.error or "-",
            ]
            for each in waiting.versions
        ],
        right=(1, 2),
    )
    return section(
        "queue",
        "Queue",
        tag("p", " · ".join(left), class_="lead"),
        states if any(files for _, files, _ in waiting.states) else empty("Nothing waits: ingest/ has no files."),
        versions if waiting.versions else None,
        more(waiting.version_count - len(waiting.versions), command("castore status")),
    )


def _no_queue(mount: MountSaid | None) -> str:
    if mount is None or mount.mountpoint:
        return "This program has no writing mount, and so no queue."
    if mount.problem:
        return f"It is not known: {mount.problem}."
    return "No writing mount of this store runs, so nothing comes in. What is staged waits for the next one."


def packages(facts: PageFacts) -> Markup:
    """What was published last."""
    counts, rows = facts.counts, facts.rows
    if rows is None:
        return section("packages", "Packages", empty(_NO_CATALOG))
    if not rows.packages:
        return section("packages", "Packages", empty("Nothing is published yet."))
    return section(
        "packages",
        "Packages",
        table(
            "Packages, the one published last first",
            ["Package", "Published", "Files", "Size", "Producer", "Backends"],
            [
                [
                    tag("span", each.ref, class_="ref"),
                    instant(each.published_at_ns),
                    each.file_count,
                    format_bytes(each.size_bytes),
                    each.producer,
                    ", ".join(each.backend_ids),
                ]
                for each in rows.packages
            ],
            right=(2, 3),
        ),
        more(_not_shown(counts.package_count if counts else 0, rows.packages), command("castore package list")),
    )


def events(facts: PageFacts) -> Markup:
    """What happened last. Of one kind after another, as a scrub makes them, there is one row."""
    rows = facts.rows
    if rows is None:
        return section("events", "Events", empty(_NO_CATALOG))
    if not rows.events:
        return section("events", "Events", empty("Nothing has happened yet."))
    runs = [list(run) for _, run in groupby(rows.events, key=_kind)][:EVENTS_SHOWN]
    return section(
        "events",
        "Events",
        table(
            "Events, the last one first",
            ["Event", "When", "About", "Says"],
            [
                [
                    tag("span", run[0].event.type, class_="id"),
                    instant(run[0].event.time_ns),
                    tag("code", _subject(run[0])) if len(run) == 1 else f"{len(run):,} objects",
                    _says(run),
                ]
                for run in runs
            ],
        ),
        tag(
            "p",
            "All of them: ",
            command("castore events"),
            ", ",
            tag("a", "/v1/events", href="/v1/events"),
            class_="more",
        ),
    )


def _kind(stored: StoredEvent) -> tuple[object, ...]:
    """What makes two events of the same kind. Each of a package is its own."""
    event = stored.event
    if ":" not in event.subject:
        return (stored.sequence,)
    return (event.type, *(event.data.get(key) for key in ("status", "reason", "backend_id")))


def _subject(stored: StoredEvent) -> str:
    algorithm, colon, rest = stored.event.subject.partition(":")
    return f"{algorithm}:{rest[:16]}…" if colon and len(rest) == 64 else stored.event.subject


def _says(run: list[StoredEvent]) -> str:
    """Whatever a type of event has of what people look for."""
    data = run[0].event.data
    said = [str(data[key]) for key in ("status", "reason") if data.get(key)]
    if data.get("backend_id"):
        said.append(f"in {data['backend_id']}")
    if isinstance(data.get("file_count"), int):
        said.append(f"{data['file_count']:,} files")
    sizes = [stored.event.data.get("size_bytes") for stored in run]
    known = [size for size in sizes if isinstance(size, int)]
    if known:
        said.append(format_bytes(sum(known)))
    named = list(dict.fromkeys(str(ref) for stored in run for ref in stored.event.data.get("packages") or ()))
    if named:
        said.append(f"for {', '.join(named[:3])}" + (" and more" if len(named) > 3 else ""))
    return " · ".join(said) or "-"
