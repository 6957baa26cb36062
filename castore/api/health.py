"""The health document: what the catalog, the backends and the queue say together. It changes nothing.

Its form is that of `application/health+json` (draft-inadarei-api-health-check-06). The rules:

- fail: a blob of a published package has no good location, or none that can be reached; a backend that cannot be
  reached is the only one that some package was published to; the catalog has locations in a backend that is not
  configured; the catalog cannot be read; a followed catalog is older than what is deleted is kept.
- warn: other failed locations, other backends that cannot be reached; a location that was neither verified nor stored
  for VERIFY_WITHIN_DAYS; staging nearly full; puts that failed; versions of ingest/ that
  nobody changes or publishes; whatever the backends warn of; something castore
  relies on that a backend's last probe did not find; a followed catalog that was last known to be the newest over
  FOLLOWED_SECONDS ago, or whose successor is refused; events that wait to be delivered for over EVENTS_BEHIND_SECONDS,
  or expired before they could be; a writing mount that does not answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from castore import __version__
from castore.api.probes import BackendProbes, Probe
from castore.api.queue_report import MountQueue, MountSaid, Queue
from castore.catalog.condition import ConditionReader, FailedLocations
from castore.catalog.delivery import Delivery, DeliveryReader, Waiting
from castore.catalog.records import StoredProbe
from castore.config_events import EventSettings
from castore.errors import StateError
from castore.registry.probing import consequences

if TYPE_CHECKING:
    from castore.ingest.service import Ingest
    from castore.replica.follower import FollowedState

VERIFY_WITHIN_DAYS: Final = 30
"""A monthly scrub is what people run; rot that is older than backups is not mended."""
STAGING_NEARLY_FULL: Final = 0.9
"""Part of `ingest.staging_max_bytes`: leaves time to react before writers meet `no space left on device`."""
EXPIRED_NAMED: Final = 20
"""Versions that a check names; `castore status` names all."""
EVENTS_BEHIND_SECONDS: Final = 300.0
"""For so long an event waits for a receiver that restarts; longer, somebody should look."""
FOLLOWED_SECONDS: Final = 60.0
"""A followed catalog is some seconds old; a network that is away for a moment is nobody's business."""
ANSWER_SECONDS: Final = 1.0
"""A document this young is given again."""

_DAY_NS: Final = 86_400 * 10**9
_WORST: Final = ("pass", "warn", "fail")

MEDIA_TYPE: Final = "application/health+json"


@dataclass(frozen=True, slots=True)
class QueueState:
    """What a writing mount has staged. `waiting_files` are not stored yet, `failed_files` could not be put lately."""

    staged_bytes: int
    staging_max_bytes: int
    waiting_files: int
    failed_files: int
    expired: tuple[str, ...] = ()
    """Versions in which nothing changed for `ingest.expire_after`."""


def queue_state(ingest: Ingest) -> QueueState:
    """Of a writing daemon."""
    files = {count.state: count.file_count for count in ingest.store.state_counts()}
    return QueueState(
        staged_bytes=ingest.files.staged_bytes,
        staging_max_bytes=ingest.files.max_bytes,
        waiting_files=sum(count for state, count in files.items() if state not in ("stored", "failed")),
        failed_files=files.get("failed", 0),
        expired=tuple(each.ref for each in ingest.expiry.expired),
    )


def _state_of(queue: Queue) -> QueueState:
    """Of another process."""
    files = {state: file_count for state, file_count, _ in queue.states}
    return QueueState(
        staged_bytes=queue.staged_bytes,
        staging_max_bytes=queue.staging_max_bytes,
        waiting_files=sum(count for state, count in files.items() if state not in ("stored", "failed")),
        failed_files=files.get("failed", 0),
        expired=queue.expired,
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    catalog_id: str
    duration_ms: float
    failed: FailedLocations
    oldest_ns: dict[str, int]
    unknown_backends: list[str]
    sole_backends: frozenset[str]
    sole_packages: tuple[str, ...]
    probed: tuple[StoredProbe, ...]
    deliveries: tuple[tuple[str, Delivery | None, Waiting], ...]
    """Each sink of the configuration: how far it is, and what waits for it."""


class HealthDocument:
    """Makes the document. `queue` says what is staged, None when there is no ingest, and `mount` is asked instead where
    another process may have that; `run` of `probes` must be running.

    `notices` are further things to warn of, set by whoever knows them.
    """

    def __init__(
        self,
        *,
        catalog_path: Path,
        probes: BackendProbes,
        queue: Callable[[], QueueState | None] = lambda: None,
        mount: MountQueue | None = None,
        events: EventSettings | None = None,
        followed: Callable[[], FollowedState] | None = None,
        restore_within_seconds: float = 0,
    ) -> None:
        self._followed = followed
        self._restore_within_seconds = restore_within_seconds
        self.notices: list[str] = []
        self._events = events
        self._catalog_path = catalog_path
        self._probes = probes
        self._queue = queue
        self._mount = mount
        self._turn = trio.Lock()
        self._made: tuple[float, dict[str, Any]] | None = None

    async def make(self) -> dict[str, Any]:
        """The document, at most ANSWER_SECONDS old. Answers within seconds, whatever the backends do."""
        async with self._turn:
            if self._made is None or trio.current_time() - self._made[0] > ANSWER_SECONDS:
                document = await self._make()
                self._made = trio.current_time(), document
            return self._made[1]

    async def _make(self) -> dict[str, Any]:
        probes = await self._probes.latest()
        reachable = frozenset(backend_id for backend_id, probe in probes.items() if probe.health.status != "fail")
        checks: dict[str, list[dict[str, Any]]] = {}
        facts: _Facts | None = None
        try:
            facts = await trio.to_thread.run_sync(_look, self._catalog_path, frozenset(probes), reachable, self._events)
            checks["catalog:responseTime"] = [_check("pass", facts.duration_ms, "ms", componentType="datastore")]
        except StateError as exc:
            checks["catalog:responseTime"] = [_check("fail", output=str(exc), componentType="datastore")]
        checks["backend:responseTime"] = [
            _backend_check(backend_id, probe, facts) for backend_id, probe in probes.items()
        ]
        if facts is not None:
            checks["backend:responseTime"] += [_unknown_backend_check(name) for name in facts.unknown_backends]
            if facts.probed:
                checks["backend:probe"] = [_probe_check(probe) for probe in facts.probed]
            checks["backend:verificationAge"] = [_age_check(*item) for item in facts.oldest_ns.items()]
            checks["locations:failed"] = [_failed_check(facts.failed)]
            checks["blobs:unreadable"] = [_unreadable_check(facts.failed)]
            if facts.deliveries and self._events is not None:
                keep_ns = round(self._events.keep_seconds * 10**9)
                checks["events:delivery"] = [_delivery_check(*item, keep_ns) for item in facts.deliveries]
        if self._followed is not None:
            checks["catalog:followedAge"] = [_followed_check(self._followed(), self._restore_within_seconds)]
        queue = self._queue()
        if self._mount is not None:
            said = await self._mount.latest()
            checks["mount:running"] = [_mount_check(said)]
            queue = None if said.queue is None else _state_of(said.queue)
        if queue is not None:
            checks["staging:utilization"] = [_staging_check(queue)]
            checks["queue:waiting"] = [_check("pass", queue.waiting_files, "files")]
            checks["queue:failed"] = [_queue_check(queue)]
            checks["ingest:expired"] = [_expired_check(queue)]
        if self.notices:
            checks["service:notices"] = [_check("warn", output=notice) for notice in self.notices]
        document: dict[str, Any] = {
            "status": _worst(check["status"] for group in checks.values() for check in group),
            "version": __version__,
            "description": "castore: a content-addressed file system for published packages",
            "checks": checks,
        }
        return document | ({"serviceId": facts.catalog_id} if facts else {})


def _look(path: Path, configured: frozenset[str], reachable: frozenset[str], events: EventSettings | None) -> _Facts:
    """Ask the catalog, on a connection of its own. Raises StateError."""
    started = time.perf_counter()
    with ConditionReader(path) as reader:
        known = reader.backend_ids()
        unreachable = (known | configured) - reachable
        alone: dict[str, frozenset[str]] = {}
        if unreachable:
            alone = reader.sole_in(unreachable)
        return _Facts(
            catalog_id=reader.catalog_id(),
            failed=reader.failed_locations(reachable),
            oldest_ns={backend_id: reader.oldest_proof_ns(backend_id) for backend_id in sorted(known)},
            unknown_backends=sorted(known - configured),
            sole_backends=frozenset().union(*alone.values()),
            sole_packages=tuple(sorted(alone)),
            probed=tuple(probe for backend_id, probe in reader.probes().items() if backend_id in configured),
            duration_ms=round((time.perf_counter() - started) * 1000, 1),
            deliveries=_look_at_deliveries(path, events),
        )


def _look_at_deliveries(path: Path, events: EventSettings | None) -> tuple[tuple[str, Delivery | None, Waiting], ...]:
    if events is None or not events.sinks:
        return ()
    with DeliveryReader(path) as reader:
        known = reader.deliveries()
        found = []
        for name, sink in events.sinks.items():
            delivery = known.get(name)
            begin = reader.last_sequence() if sink.begin == "newest" else 0
            found.append((name, delivery, reader.waiting(begin if delivery is None else delivery.sequence)))
    return tuple(found)


def _check(status: str, value: Any = None, unit: str = "", *, output: str = "", **more: Any) -> dict[str, Any]:
    """One check; the draft wants `output` left out when all is well."""
    check = {"status": status, "time": _iso(time.time_ns()), **more}
    if value is not None:
        check |= {"observedValue": value, "observedUnit": unit}
    return check | ({"output": output} if output else {})


def _backend_check(backend_id: str, probe: Probe, facts: _Facts | None) -> dict[str, Any]:
    health = probe.health
    status: str = health.status
    output = "" if status == "pass" else health.detail
    more: dict[str, Any] = {}
    if status == "fail" and facts is not None:
        if backend_id in facts.sole_backends:
            output += "; some packages are stored nowhere else"
            more["packages"] = list(facts.sole_packages)
        else:
            status = "warn"
            output += "; no package is stored there alone"
    check = _check(status, probe.duration_ms, "ms", output=output, componentId=backend_id, componentType="datastore")
    return check | more | {"time": _iso(probe.time_ns)}


def _unknown_backend_check(backend_id: str) -> dict[str, Any]:
    output = "the catalog has locations there, but the configuration has no such backend"
    return _check("fail", output=output, componentId=backend_id, componentType="datastore")


def _age_check(backend_id: str, oldest_ns: int) -> dict[str, Any]:
    age_days = max(0, time.time_ns() - oldest_ns) / _DAY_NS if oldest_ns else 0
    late = age_days > VERIFY_WITHIN_DAYS
    return _check(
        "warn" if late else "pass",
        round(age_days, 2),
        "days",
        output=f"some object was last verified or stored over {VERIFY_WITHIN_DAYS} days ago: "
        f"run `castore storage verify --backend {backend_id}`"
        if late
        else "",
        componentId=backend_id,
        componentType="datastore",
    )


def _probe_check(probe: StoredProbe) -> dict[str, Any]:
    """What `castore storage probe` found; of a backend that it never asked there is no check."""
    missing = consequences(probe)
    check = _check(
        "warn" if missing else "pass",
        len(missing),
        "missing",
        output=" | ".join(missing),
        componentId=probe.backend_id,
        componentType="datastore",
    )
    return check | {"time": _iso(probe.probed_at_ns)}


def _failed_check(failed: FailedLocations) -> dict[str, Any]:
    output = "`castore storage verify` names them and their paths" if failed.count else ""
    status = "warn" if failed.count else "pass"
    return _check(status, failed.count, "locations", output=output, packages=list(failed.packages))


def _unreadable_check(failed: FailedLocations) -> dict[str, Any]:
    count = failed.lost_count + failed.cut_off_count
    said = []
    if failed.lost_count:
        said.append(f"{failed.lost_count} have no good location anywhere")
    if failed.cut_off_count:
        said.append(f"{failed.cut_off_count} have one only in a backend that cannot be reached")
    return _check(
        "fail" if count else "pass", count, "blobs", output="; ".join(said), packages=list(failed.lost_packages)
    )


def _delivery_check(name: str, delivery: Delivery | None, waiting: Waiting, keep_ns: int) -> dict[str, Any]:
    """A sink; what is lost is said for as long as events are kept."""
    now = time.time_ns()
    said = []
    waiting_s = max(0, now - waiting.oldest_ns) / 10**9 if waiting.count else 0.0
    if waiting_s > EVENTS_BEHIND_SECONDS:
        error = delivery.error if delivery is not None else ""
        said.append(error or "no process delivers events: mount, or run `castore events --deliver`")
    if delivery is not None and delivery.lost_count and now - delivery.lost_at_ns < keep_ns:
        said.append(f"{delivery.lost_count} events expired before they could be delivered")
    return _check(
        "warn" if said else "pass",
        waiting.count,
        "events",
        output="; ".join(said),
        componentId=name,
        componentType="component",
        waitingSeconds=round(waiting_s, 1),
        lostCount=0 if delivery is None else delivery.lost_count,
    )


def _followed_check(followed: FollowedState, restore_within_seconds: float) -> dict[str, Any]:
    """A catalog of another host. Objects of packages deleted there are kept for a time: it must not be older."""
    said = [followed.error] if followed.error else []
    status = "pass"
    if followed.error or followed.age_seconds > FOLLOWED_SECONDS:
        status = "warn"
        said.append(f"this is the catalog as of {followed.age_seconds:.0f} s ago, or later")
    if followed.age_seconds > restore_within_seconds:
        status = "fail"
        said.append("what was deleted since may be gone, and its reads fail")
    return _check(status, round(followed.age_seconds, 1), "seconds", output="; ".join(said), componentType="datastore")


def _mount_check(said: MountSaid) -> dict[str, Any]:
    """Whether a mount of this store is there. None is no fault: packages can be looked after without one."""
    is_there = bool(said.mountpoint or said.problem)
    return _check("warn" if said.problem else "pass", int(is_there), "mounts", output=said.problem)


def _staging_check(queue: QueueState) -> dict[str, Any]:
    part = queue.staged_bytes / queue.staging_max_bytes
    full = part >= STAGING_NEARLY_FULL
    output = f"{queue.staged_bytes} of {queue.staging_max_bytes} bytes are staged" if full else ""
    return _check("warn" if full else "pass", round(part * 100, 1), "percent", output=output)


def _queue_check(queue: QueueState) -> dict[str, Any]:
    output = "puts of staged files failed, and are tried again: see `castore status`" if queue.failed_files else ""
    return _check("warn" if queue.failed_files else "pass", queue.failed_files, "files", output=output)


def _expired_check(queue: QueueState) -> dict[str, Any]:
    named = ", ".join(queue.expired[:EXPIRED_NAMED])
    output = f"nothing changed in them for ingest.expire_after: {named}" if named else ""
    return _check("warn" if named else "pass", len(queue.expired), "versions", output=output)


def _worst(statuses: Iterable[str]) -> str:
    return max(statuses, key=_WORST.index, default="pass")


def _iso(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
