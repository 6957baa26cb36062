"""What a program has that its metrics and its status page tell of. Holds the parts together, and asks none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from castore.api.counts import CatalogCounts
from castore.api.health import HealthDocument
from castore.api.probes import BackendProbes
from castore.api.queue_report import MountQueue
from castore.storage.measured import CallStats

if TYPE_CHECKING:
    from castore.blobs.reader import BlobReader
    from castore.ingest.service import Ingest
    from castore.replica.follower import FollowedState


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The parts of a daemon, or of `castore serve`, which has no mount and no queue of its own."""

    catalog_path: Path
    health: HealthDocument
    probes: BackendProbes
    counts: CatalogCounts
    backend_types: Mapping[str, str]
    """The configured backends, in the order of the configuration."""
    calls: Mapping[str, CallStats]
    """What was asked of each backend."""
    blobs: BlobReader | None = None
    ingest: Ingest | None = None
    mount: MountQueue | None = None
    """The daemon that may write to the same store, where this program is none."""
    followed: Callable[[], FollowedState] | None = None
    """How the catalog is, where it follows that of another host."""
    mountpoint: str = ""
    """Empty without a mount."""
    started_ns: int = field(default_factory=time.time_ns)
