"""The metrics in Prometheus' text format, made from the program's own counters when they are asked for.

docs/METRICS.md lists them. Labels are bounded: backends by the configuration and BACKENDS_MAX, all others by the code.
The parts count in plain integers and know nothing of this: a read costs the same whether anybody looks or not.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import trio

from castore import __version__
from castore.api.counts import COVERAGE_DAYS, Counts
from castore.api.metric_families import Families
from castore.api.probes import Probe
from castore.api.queue_report import Queue, queue_of
from castore.api.sources import Sources
from castore.catalog.records import FailureReason
from castore.errors import StorageError
from castore.storage.measured import kind_of

if TYPE_CHECKING:
    from castore.blobs.reader import BlobReader

BACKENDS_MAX: Final = 100
"""Backends with a label of their own, each some 150 time series. Further ones share the label OTHERS."""
OTHERS: Final = "(others)"
"""No id of a backend has a parenthesis. Those that the catalog knows and the configuration does not are here."""
_STATUSES: Final = ("pass", "warn", "fail")
_ERRORS: Final[tuple[type[StorageError], ...]] = (StorageError, *StorageError.__subclasses__())
_NS: Final = 10**9


class Metrics:
    """Makes the text."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._labelled = frozenset(list(sources.backend_types)[:BACKENDS_MAX])

    async def make(self) -> tuple[bytes, str]:
        """The text and its media type, within seconds whatever the backends do.

        What is counted in the catalog is left out while it cannot be read, and while it is counted for the first time.
        """
        families = await trio.to_thread.run_sync(Families)  # the first time, the library is loaded
        health = await self._sources.health.make()
        probes = await self._sources.probes.latest()
        counts = await self._sources.counts.soon()
        self._add_program(families, health)
        self._add_backends(families, probes)
        self._add_catalog(families, counts)
        if self._sources.blobs is not None:
            _add_reads(families, self._sources.blobs)
            _add_cache(families, self._sources.blobs)
        if self._sources.ingest is not None:
            _add_queue(families, queue_of(self._sources.ingest))
        said = None if self._sources.mount is None else await self._sources.mount.latest()
        families.gauge(
            "castore_other_mount",
            "Of castore serve: 1 when the daemon that writes to its store answers.",
            [] if said is None else [((), bool(said.mountpoint))],
        )
        if said is not None and said.queue is not None and not said.http_url:  # else its own metrics have it
            _add_queue(families, said.queue)
        return families.text()

    def _label(self, backend_id: str) -> str:
        return backend_id if backend_id in self._labelled else OTHERS

    # what they tell of

    def _add_program(self, families: Families, health: dict[str, Any]) -> None:
        source = self._sources
        families.process()
        families.gauge("castore_build_info", "The version that runs.", [((__version__,), 1)], ["version"])
        families.gauge("castore_mounted", "1 with a mount, 0 for castore serve.", bool(source.mountpoint))
        catalog = health["checks"]["catalog:responseTime"]
        is_up = all(check["status"] == "pass" for check in catalog)
        families.gauge("castore_catalog_up", "1 when the catalog can be read.", is_up)
        followed = self._sources.followed
        families.gauge(
            "castore_followed_catalog_age_seconds",
            "How long ago a followed catalog was last known to be the newest.",
            [] if followed is None else [((), followed().age_seconds)],
        )
        families.gauge(
            "castore_health_status",
            "1 for what /health says: pass, warn or fail.",
            [((status,), health["status"] == status) for status in _STATUSES],
            ["status"],
        )
        unreadable = health["checks"].get("blobs:unreadable", [])
        families.gauge(
            "castore_unreadable_blobs",
            "Blobs of packages without a good location that can be reached, as far as health looks.",
            [((), check["observedValue"]) for check in unreadable],
        )
        _add_deliveries(families, health["checks"].get("events:delivery", []))

    def _add_backends(self, families: Families, probes: dict[str, Probe]) -> None:
        calls = [(self._label(backend_id), stats) for backend_id, stats in self._sources.calls.items()]
        families.gauge(
            "castore_backend_health",
            "Backends by what their last probe said: pass, warn or fail.",
            [
                ((self._label(backend_id), status), probe.health.status == status)
                for backend_id, probe in probes.items()
                for status in _STATUSES
            ],
            ["backend", "status"],
        )
        families.gauge(
            "castore_backend_probe_duration_seconds",
            "What the last probe of a backend took.",
            [
                ((self._label(backend_id),), probe.duration_ms / 1000)
                for backend_id, probe in probes.items()
                if probe.duration_ms is not None
            ],
            ["backend"],
            max,
        )
        families.gauge(
            "castore_backend_free_bytes",
            "Room that a backend says it has left.",
            [
                ((self._label(backend_id),), probe.health.free_bytes)
                for backend_id, probe in probes.items()
                if probe.health.free_bytes is not None
            ],
            ["backend"],
        )
        families.histogram(
            "castore_backend_call_duration_seconds",
            "Calls of a backend by operation, each try on its own, waits for a turn left out.",
            [((label, operation), each) for label, stats in calls for operation, each in stats.durations.items()],
            ["backend", "operation"],
        )
        families.counter(
            "castore_backend_errors_total",
            "Calls of a backend that failed, each try on its own, by the kind of error.",
            [
                *(((label, kind_of(error)), 0) for label, _ in calls for error in _ERRORS),
                *(((label, kind), count) for label, stats in calls for kind, count in stats.errors.items()),
            ],
            ["backend", "kind"],
        )
        families.gauge(
            "castore_backend_calls_in_progress",
            "Calls of a backend under way.",
            [((label,), stats.in_progress) for label, stats in calls],
            ["backend"],
        )
        families.counter(
            "castore_backend_read_bytes_total",
            "Bytes that a backend gave.",
            [((label,), stats.read_bytes) for label, stats in calls],
            ["backend"],
        )
        families.counter(
            "castore_backend_written_bytes_total",
            "Bytes that a backend took.",
            [((label,), stats.written_bytes) for label, stats in calls],
            ["backend"],
        )

    def _add_catalog(self, families: Families, counts: Counts | None) -> None:
        locations = [] if counts is None else counts.locations
        coverage = [] if counts is None else counts.coverage
        failures = [] if counts is None else counts.failures
        families.gauge("castore_packages", "Published packages.", [] if counts is None else counts.package_count)
        families.gauge(
            "castore_package_bytes",
            "Bytes of their files, shared ones counted for each package.",
            [] if counts is None else counts.package_bytes,
        )
        families.gauge(
            "castore_locations",
            "Locations of blobs by status.",
            [((self._label(backend_id), status), count) for backend_id, status, count, _ in locations],
            ["backend", "status"],
        )
        families.gauge(
            "castore_location_bytes",
            "Bytes of the blobs that have such a location.",
            [((self._label(backend_id), status), size) for backend_id, status, _, size in locations],
            ["backend", "status"],
        )
        families.gauge(
            "castore_failed_locations",
            "Locations with missing or wrong bytes, by reason.",
            [
                *(((self._label(name), reason), 0) for name in self._sources.backend_types for reason in FailureReason),
                *(((self._label(backend_id), reason), count) for backend_id, reason, count in failures),
            ],
            ["backend", "reason"],
        )
        families.gauge(
            "castore_verified_locations",
            "Good locations that were re-read within so many days; any: ever since they were stored.",
            [
                ((self._label(each.backend_id), days), count)
                for each in coverage
                for days, count in zip(
                    (*map(str, COVERAGE_DAYS), "any"), (*each.verified_since, each.verified_count), strict=True
                )
            ],
            ["backend", "within_days"],
        )
        families.gauge(
            "castore_verification_age_seconds",
            "How long ago the good location was verified or stored whose turn is longest ago.",
            [
                ((self._label(each.backend_id),), max(0.0, (time.time_ns() - each.oldest_proof_ns) / _NS))
                for each in coverage
                if each.oldest_proof_ns
            ],
            ["backend"],
            max,
        )


def _add_deliveries(families: Families, sinks: list[dict[str, Any]]) -> None:
    families.gauge(
        "castore_events_waiting",
        "Events that a sink of the configuration has not taken yet.",
        [((sink["componentId"],), sink["observedValue"]) for sink in sinks],
        ["sink"],
    )
    families.gauge(
        "castore_events_waiting_age_seconds",
        "How old the first of them is.",
        [((sink["componentId"],), sink["waitingSeconds"]) for sink in sinks],
        ["sink"],
    )
    families.counter(
        "castore_events_lost_total",
        "Events that expired before the sink took them.",
        [((sink["componentId"],), sink["lostCount"]) for sink in sinks],
        ["sink"],
    )


def _add_reads(families: Families, blobs: BlobReader) -> None:
    stats = blobs.stats
    families.counter("castore_reads_total", "Reads that the kernel asked for, failed ones among them.", stats.reads)
    families.counter("castore_read_bytes_total", "Bytes that they gave.", stats.read_bytes)
    families.counter("castore_read_errors_total", "Reads that failed.", stats.read_errors)
    families.histogram("castore_read_wait_seconds", "Waits of reads that found not all in memory.", [((), blobs.waits)])
    families.counter(
        "castore_read_blocks_total",
        "Blocks that reads asked for: in memory, or waited for.",
        [(("memory",), stats.cache_hits), (("waited",), stats.cache_misses)],
        ["found"],
    )
    families.counter("castore_fetches_total", "Gets that reads sent to backends, failed ones among them.", stats.gets)
    families.counter("castore_fetched_bytes_total", "Bytes that backends gave for reads.", stats.fetched_bytes)
    families.counter(
        "castore_bad_blocks_total",
        "Blocks whose checksum differed, by where they came from.",
        [(("backend",), stats.bad_blocks), (("disk_cache",), stats.disk_bad), (("memory",), stats.memory_bad)],
        ["source"],
    )
    families.counter("castore_prefetch_blocks_total", "Blocks fetched before any read asked.", stats.prefetched)
    families.counter("castore_prefetch_used_blocks_total", "Of these, blocks that were read.", stats.prefetched_read)
    families.counter(
        "castore_prefetch_unused_blocks_total", "Of these, blocks given up unread.", stats.prefetched_unread
    )
    families.gauge("castore_memory_kept_bytes", "Blocks in memory, for the next read.", blobs.kept_bytes)
    families.gauge("castore_memory_ahead_bytes", "On the way, or prefetched and not yet read.", blobs.ahead_bytes)


def _add_cache(families: Families, blobs: BlobReader) -> None:
    stats, state = blobs.stats, None if blobs.cache is None else blobs.cache.state()
    families.counter(
        "castore_disk_cache_blocks_total",
        "Blocks that memory lacked: found in the disk cache, or missed.",
        [(("hit",), stats.disk_hits), (("miss",), stats.disk_misses)],
        ["result"],
    )
    families.counter("castore_disk_cache_written_bytes_total", "Bytes written to it.", stats.disk_written_bytes)
    families.counter(
        "castore_disk_cache_dropped_blocks_total",
        "Blocks not written to it: no room, or a disk that is slow or fails.",
        stats.disk_dropped,
    )
    families.counter(
        "castore_disk_cache_evicted_files_total",
        "Files evicted from it by this process.",
        [] if state is None else state.evicted_files,
    )
    families.gauge("castore_disk_cache_up", "1 when it works.", [] if state is None else not state.problem)
    families.gauge(
        "castore_disk_cache_used_bytes",
        "Bytes on disk, of files and of small blobs.",
        [] if state is None else [(("files",), max(0, state.used_bytes)), (("small_blobs",), state.tiny_used_bytes)],
        ["kind"],
    )
    families.gauge("castore_disk_cache_max_bytes", "What its files may use.", [] if state is None else state.max_bytes)
    families.gauge(
        "castore_disk_cache_queued_bytes", "Bytes that wait to be written.", [] if state is None else state.queued_bytes
    )


def _add_queue(families: Families, queue: Queue) -> None:
    families.gauge(
        "castore_queue_files",
        "Files in ingest/ by state.",
        [((state,), file_count) for state, file_count, _ in queue.states],
        ["state"],
    )
    families.gauge(
        "castore_queue_bytes",
        "Their bytes.",
        [((state,), size_bytes) for state, _, size_bytes in queue.states],
        ["state"],
    )
    families.gauge("castore_staged_bytes", "Bytes staged on disk.", queue.staged_bytes)
    families.gauge("castore_staging_max_bytes", "What may be staged.", queue.staging_max_bytes)
    families.gauge(
        "castore_expired_versions", "Versions in ingest/ that nobody changes or publishes.", len(queue.expired)
    )
