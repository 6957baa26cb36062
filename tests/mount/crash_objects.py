"""What a backend holds after a crash, seen from outside castore: in a folder, or in a bucket. Tests nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Final, Protocol

BLOBS: Final = "sha256"
MANIFESTS: Final = "manifest-sha256"
LEFTOVER_AGE_SECONDS: Final = 7200
"""Older than what the sweep of a backend takes for a put that might still go on."""


class Objects(Protocol):
    """The objects of one store."""

    def names(self, algorithm: str) -> set[str]:
        """The digests of that algorithm that are stored, in hex."""

    def half_puts(self) -> list[str]:
        """What puts left that did not come to their end."""

    def age(self) -> int:
        """Make what the dead daemon's puts left old enough to be swept; how many there are."""


class FolderObjects:
    """Those of a `local` backend."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self, algorithm: str) -> set[str]:
        return {path.name for path in (self._folder / algorithm).rglob("?" * 64) if path.is_file()}

    def half_puts(self) -> list[str]:
        return [str(path) for path in self._folder.rglob(".castore-put-*")]

    def age(self) -> int:
        found = self.half_puts()
        then = time.time() - LEFTOVER_AGE_SECONDS
        for path in found:
            os.utime(path, (then, then))
        return len(found)


class BucketObjects:
    """Those of an `s3` backend, by a client of the server itself."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix

    def names(self, algorithm: str) -> set[str]:
        below = {"Bucket": self._bucket, "Prefix": f"{self._prefix}/{algorithm}/"}
        pages = self._client.get_paginator("list_objects_v2").paginate(**below)
        return {found["Key"].rpartition("/")[2] for page in pages for found in page.get("Contents", ())}

    def half_puts(self) -> list[str]:
        page = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=f"{self._prefix}/")
        assert not page["IsTruncated"]
        return [
            f"{upload['Key']}, begun {upload['Initiated']}, the object {self._since(upload['Key'])}"
            for upload in page.get("Uploads", ())
        ]

    def _since(self, key: str) -> str:
        """Since when there is an object, for whoever has to find out why something was left."""
        found = self._client.list_objects_v2(Bucket=self._bucket, Prefix=key).get("Contents", [])
        return f"stored {found[0]['LastModified']}" if found else "not stored"

    def age(self) -> int:
        """They need not be old: their intents tell that nobody goes on from them."""
        return len(self.half_puts())
