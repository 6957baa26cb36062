"""The status document: what `castore status` and `.castore/status.json` say of a running daemon. It changes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from castore import __version__
from castore.api.counts import CatalogCounts

if TYPE_CHECKING:
    from castore.blobs.reader import BlobReader
    from castore.ingest.service import Ingest
    from castore.replica.follower import FollowedState

STATES: Final = ("receiving", "staged", "uploading", "stored", "failed")


class StatusDocument:
    """Makes the document from a daemon's parts; `ingest` is None on a read-only mount, which has no queue."""

    def __init__(
        self,
        *,
        state_dir: Path,
        mountpoint: Path,
        counts: CatalogCounts,
        ingest: Ingest | None,
        blobs: BlobReader,
        followed: Callable[[], FollowedState] | None = None,
    ) -> None:
        self._followed = followed
        self._state_dir = state_dir
        self._mountpoint = mountpoint
        self._counts = counts
        self._ingest = ingest
        self._blobs = blobs
        self._started_ns = time.time_ns()
        self.http_url = ""
        """Where the HTTP API answers; empty while it does not."""

    async def make(self) -> dict[str, Any]:
        """The document as of now; counts of a large catalog may be older. Sizes are bytes, times nanoseconds since the
        epoch. Raises StateError when the catalog cannot be read.
        """
        counts = await self._counts.latest()
        return {
            "castore": __version__,
            "pid": os.getpid(),
            "started_ns": self._started_ns,
            "state_dir": str(self._state_dir),
            "mountpoint": str(self._mountpoint),
            "read_only": self._ingest is None,
            "http_url": self.http_url,
            **({} if self._followed is None else {"followed": asdict(self._followed())}),
            "package_count": counts.package_count,
            "package_bytes": counts.package_bytes,
            **({} if self._ingest is None else self._staged(self._ingest)),
            "locations": [
                {"backend_id": backend_id, "status": str(status), "count": count, "size_bytes": size_bytes}
                for backend_id, status, count, size_bytes in counts.locations
            ],
            "failed_location_count": counts.failed_count,
            "reads": asdict(self._blobs.stats)
            | {"kept_bytes": self._blobs.kept_bytes, "buffer_bytes": self._blobs.buffer_bytes},
            "cache": _cache(self._blobs),
        }

    def _staged(self, ingest: Ingest) -> dict[str, Any]:
        return {
            "queue": {
                state: {"file_count": file_count, "size_bytes": size_bytes}
                for state, file_count, size_bytes in states_of(ingest)
            },
            "rate": asdict(ingest.uploader.rate.rate()),
            "eta_s": ingest.eta_seconds(),
            "expired": [asdict(each) for each in ingest.expiry.expired],
            "staged_bytes": ingest.files.staged_bytes,
            "staging_max_bytes": ingest.files.max_bytes,
            "versions": [_version(ingest, *version) for version in ingest.store.versions()],
        }


def states_of(ingest: Ingest) -> list[tuple[str, int, int]]:
    """(state, files, bytes) of ingest/, for every state; bytes that are being written among them."""
    counts = {count.state: (count.file_count, count.size_bytes) for count in ingest.store.state_counts()}
    files, size_bytes = counts.get("receiving", (0, 0))
    counts["receiving"] = files, max(0, size_bytes + ingest.files.unnoted_bytes())
    return [(state, *counts.get(state, (0, 0))) for state in STATES]


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
