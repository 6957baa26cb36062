"""How the backends are: probed beside whoever asks, so that an answer never waits for a backend that hangs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import trio

from castore.storage.spi import BackendHealth, StorageBackend

FRESH_SECONDS: Final = 5.0
"""A result this young is given again: many may ask, each backend is probed once."""
KEPT_SECONDS: Final = 20.0
"""An older result says nothing any more. A probe ends within 5 s, so this is met only when nobody asked for a while."""
WAIT_SECONDS: Final = 1.0
"""How long an answer waits for probes under way; what has not come by then is said to be unknown, or as it was."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Probe:
    """The outcome of one probe. `duration_ms` is None while the first one has not answered."""

    health: BackendHealth
    time_ns: int
    duration_ms: int | None


class BackendProbes:
    """The last known health of each backend. Backends bound the time of a probe by themselves."""

    def __init__(self, backends: Mapping[str, StorageBackend]) -> None:
        self._backends = backends
        self._known: dict[str, tuple[float, Probe]] = {}
        self._running: dict[str, trio.Event] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do the probes that are asked for, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def latest(self) -> dict[str, Probe]:
        """The health of every backend, within WAIT_SECONDS. `run` must be running."""
        assert self._nursery is not None
        for backend_id, backend in self._backends.items():
            if backend_id not in self._running and self._age(backend_id) > FRESH_SECONDS:
                self._running[backend_id] = trio.Event()
                self._nursery.start_soon(self._probe, backend)
        with trio.move_on_after(WAIT_SECONDS):
            for done in list(self._running.values()):
                await done.wait()
        return {backend_id: self._last(backend_id) for backend_id in self._backends}

    def _age(self, backend_id: str) -> float:
        known = self._known.get(backend_id)
        return float("inf") if known is None else trio.current_time() - known[0]

    def _last(self, backend_id: str) -> Probe:
        if self._age(backend_id) <= KEPT_SECONDS:
            return self._known[backend_id][1]
        return Probe(BackendHealth("warn", f"has not answered within {WAIT_SECONDS:g} s"), time.time_ns(), None)

    async def _probe(self, backend: StorageBackend) -> None:
        started = trio.current_time()
        try:
            try:
                health = await backend.health()
            except Exception:
                # Against its contract, and no reason to end the program.
                _log.exception("the probe of backend %s failed unexpectedly", backend.backend_id)
                health = BackendHealth("fail", "the probe failed unexpectedly: the log says more")
            duration_ms = round((trio.current_time() - started) * 1000)
            self._known[backend.backend_id] = trio.current_time(), Probe(health, time.time_ns(), duration_ms)
        finally:
            self._running.pop(backend.backend_id).set()
