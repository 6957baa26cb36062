"""The status document: what `castore status` and `.castore/status.json` say of a running daemon. It changes nothing."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import trio

from castore import __version__
from castore.blobs.reader import BlobReader
from castore.catalog.reader import CatalogReader
from castore.catalog.records import LocationStatus
from castore.ingest.service import Ingest

STATES: Final = ("receiving", "staged", "uploading", "stored", "failed")
COUNTS_SHARE: Final = 10
"""Counting the locations takes 0.1 s for each million. What took long is given again for that many times as long, so
that whoever watches the document keeps no more than a tenth of a core busy."""
_SHORT_SECONDS: Final = 0.05
"""What took less is counted again each time."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """What takes a scan of the catalog to know."""

    package_count: int
    package_bytes: int
    locations: list[tuple[str, LocationStatus, int, int]]
    good_until: float
    """By trio's clock."""


class StatusDocument:
    """Makes the document from a daemon's parts; `ingest` is None on a read-only mount, which has no queue."""

    def __init__(
        self, *, state_dir: Path, mountpoint: Path, catalog_path: Path, ingest: Ingest | None, blobs: BlobReader
    ) -> None:
        self._state_dir = state_dir
        self._mountpoint = mountpoint
        self._catalog_path = catalog_path
        self._ingest = ingest
        self._blobs = blobs
        self._started_ns = time.time_ns()
        self._turn = trio.Lock()
        self._counts: _Counts | None = None
        self.http_url = ""
        """Where the HTTP API answers; empty while it does not."""

    async def make(self) -> dict[str, Any]:
        """The document as of now; counts of a large catalog may be older. Sizes are bytes, times nanoseconds since the
        epoch. Raises StateError when the catalog cannot be read.
        """
        async with self._turn:
            if self._counts is None or trio.current_time() > self._counts.good_until:
                self._counts = await self._count()
            counts = self._counts
        return {
            "castore": __version__,
            "pid": os.getpid(),
            "started_ns": self._started_ns,
            "state_dir": str(self._state_dir),
            "mountpoint": str(self._mountpoint),
            "read_only": self._ingest is None,
            "http_url": self.http_url,
            "package_count": counts.package_count,
            "package_bytes": counts.package_bytes,
            **({} if self._ingest is None else self._staged(self._ingest)),
            "locations": [
                {"backend_id": backend_id, "status": str(status), "count": count, "size_bytes": size_bytes}
                for backend_id, status, count, size_bytes in counts.locations
            ],
            "failed_location_count": sum(row[2] for row in counts.locations if row[1] is LocationStatus.FAILED),
            "reads": asdict(self._blobs.stats) | {"kept_bytes": self._blobs.kept_bytes},
            "cache": _cache(self._blobs),
        }

    async def _count(self) -> _Counts:
        started = trio.current_time()
        counted = await trio.to_thread.run_sync(_scan, self._catalog_path)
        now = trio.current_time()
        took = now - started
        return _Counts(*counted, good_until=now + (COUNTS_SHARE * took if took > _SHORT_SECONDS else 0))

    def _staged(self, ingest: Ingest) -> dict[str, Any]:
        queue = {state: {"file_count": 0, "size_bytes": 0} for state in STATES}
        for count in ingest.store.state_counts():
            queue[count.state] = {"file_count": count.file_count, "size_bytes": count.size_bytes}
        queue["receiving"]["size_bytes"] = max(0, queue["receiving"]["size_bytes"] + ingest.files.unnoted_bytes())
        return {
            "queue": queue,
            "rate": asdict(ingest.uploader.rate.rate()),
            "eta_s": ingest.eta_seconds(),
            "expired": [asdict(each) for each in ingest.expiry.expired],
            "staged_bytes": ingest.files.staged_bytes,
            "staging_max_bytes": ingest.files.max_bytes,
            "versions": [_version(ingest, *version) for version in ingest.store.versions()],
        }


def _scan(catalog_path: Path) -> tuple[int, int, list[tuple[str, LocationStatus, int, int]]]:
    """On a connection of its own, in a thread: reads and lookups go on."""
    with CatalogReader.open(catalog_path) as reader:
        return *reader.totals(), reader.location_counts()


def _version(ingest: Ingest, name: str, version: str, inode: int) -> dict[str, Any]:
    return {
        "ref": f"{name}/{version}",
        "error": ingest.store.error(inode),
        **asdict(ingest.publisher.progress(inode)),
    }


def _cache(blobs: BlobReader) -> dict[str, Any] | None:
    """The disk cache; None where there is none. Blocks found and not found are counted since the daemon's start."""
    if blobs.cache is None:
        return None
    stats = blobs.stats
    return {
        **asdict(blobs.cache.state()),
        "hit_count": stats.disk_hits,
        "miss_count": stats.disk_misses,
        "bad_count": stats.disk_bad,
    }
