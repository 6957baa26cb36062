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
    """Makes the document from a daemon's parts."""

    def __init__(
        self, *, state_dir: Path, mountpoint: Path, catalog: CatalogReader, ingest: Ingest, blobs: BlobReader
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
        queue = {state: {"file_count": 0, "size_bytes": 0} for state in STATES}
        for count in self._ingest.store.state_counts():
            queue[count.state] = {"file_count": count.file_count, "size_bytes": count.size_bytes}
        return {
            "castore": __version__,
            "pid": os.getpid(),
            "started_ns": self._started_ns,
            "state_dir": str(self._state_dir),
            "mountpoint": str(self._mountpoint),
            "http_url": self.http_url,
            "package_count": package_count,
            "package_bytes": package_bytes,
            "queue": queue,
            "staged_bytes": self._ingest.files.staged_bytes,
            "staging_max_bytes": self._ingest.files.max_bytes,
            "versions": [self._version(*version) for version in self._ingest.store.versions()],
            "locations": [
                {"backend_id": backend_id, "status": str(status), "count": count, "size_bytes": size_bytes}
                for backend_id, status, count, size_bytes in locations
            ],
            "failed_location_count": sum(row[2] for row in locations if row[1] is LocationStatus.FAILED),
            "reads": asdict(self._blobs.stats) | {"kept_bytes": self._blobs.kept_bytes},
        }

    def _version(self, name: str, version: str, inode: int) -> dict[str, Any]:
        progress = self._ingest.publisher.progress(inode)
        return {
            "ref": f"{name}/{version}",
            "error": self._ingest.store.error(inode),
            **asdict(progress),
        }
