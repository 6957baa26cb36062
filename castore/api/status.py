"""The status document: what `castore status` and `.castore/status.json` say of a running daemon. It changes nothing."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from castore import __version__
from castore.blobs.reader import BlobReader
from castore.catalog.reader import CatalogReader
from castore.catalog.records import LocationStatus
from castore.ingest.service import Ingest

STATES = ("receiving", "staged", "uploading", "stored", "failed")


class StatusDocument:
    """Makes the document from a daemon's parts; `ingest` is None on a read-only mount, which has no queue."""

    def __init__(
        self, *, state_dir: Path, mountpoint: Path, catalog: CatalogReader, ingest: Ingest | None, blobs: BlobReader
    ) -> None:
        self._state_dir = state_dir
        self._mountpoint = mountpoint
        self._catalog = catalog
        self._ingest = ingest
        self._blobs = blobs
        self._started_ns = time.time_ns()
        self.http_url = ""
        """Where the HTTP API answers; empty while it does not."""

    def make(self) -> dict[str, Any]:
        """The document as of now. Sizes are bytes, times nanoseconds since the epoch."""
        package_count, package_bytes = self._catalog.totals()
        locations = self._catalog.location_counts()
        return {
            "castore": __version__,
            "pid": os.getpid(),
            "started_ns": self._started_ns,
            "state_dir": str(self._state_dir),
            "mountpoint": str(self._mountpoint),
            "read_only": self._ingest is None,
            "http_url": self.http_url,
            "package_count": package_count,
            "package_bytes": package_bytes,
            **({} if self._ingest is None else self._staged(self._ingest)),
            "locations": [
                {"backend_id": backend_id, "status": str(status), "count": count, "size_bytes": size_bytes}
                for backend_id, status, count, size_bytes in locations
            ],
            "failed_location_count": sum(row[2] for row in locations if row[1] is LocationStatus.FAILED),
            "reads": asdict(self._blobs.stats) | {"kept_bytes": self._blobs.kept_bytes},
        }

    def _staged(self, ingest: Ingest) -> dict[str, Any]:
        queue = {state: {"file_count": 0, "size_bytes": 0} for state in STATES}
        for count in ingest.store.state_counts():
            queue[count.state] = {"file_count": count.file_count, "size_bytes": count.size_bytes}
        return {
            "queue": queue,
            "staged_bytes": ingest.files.staged_bytes,
            "staging_max_bytes": ingest.files.max_bytes,
            "versions": [_version(ingest, *version) for version in ingest.store.versions()],
        }


def _version(ingest: Ingest, name: str, version: str, inode: int) -> dict[str, Any]:
    return {
        "ref": f"{name}/{version}",
        "error": ingest.store.error(inode),
        **asdict(ingest.publisher.progress(inode)),
    }
