"""The parts that `castore serve` has, over a store of a test."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from castore.api.counts import CatalogCounts
from castore.api.health import HealthDocument
from castore.api.probes import BackendProbes
from castore.api.sources import Sources
from castore.config_events import EventSettings
from castore.storage.measured import CallStats
from tests.published import PublishedStore


async def observe(
    store: PublishedStore,
    nursery: trio.Nursery,
    calls: Mapping[str, CallStats] | None = None,
    events: EventSettings | None = None,
) -> Sources:
    """Its probes and counts run in the nursery; by default nothing was asked of any backend yet."""
    probes, counts = BackendProbes(store.backends), CatalogCounts(store.catalog_path)
    await nursery.start(probes.run)
    await nursery.start(counts.run)
    return Sources(
        catalog_path=store.catalog_path,
        health=HealthDocument(catalog_path=store.catalog_path, probes=probes, events=events),
        probes=probes,
        counts=counts,
        backend_types={backend_id: backend.backend_type for backend_id, backend in store.backends.items()},
        calls=calls or {backend_id: CallStats() for backend_id in store.backends},
    )
