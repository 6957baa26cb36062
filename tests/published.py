"""A catalog and real backends with packages in them, made without a mount. Not a model: what lies there is real."""

from __future__ import annotations

import itertools
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import trio

from castore.catalog.connection import create_catalog, open_writer
from castore.catalog.event_log import EventReader
from castore.catalog.reader import CatalogReader
from castore.catalog.records import Kind, Location
from castore.catalog.writer import CatalogWriter, Transaction
from castore.config import parse_config
from castore.digest import MANIFEST_ALGORITHM, BlobHasher, BlobSummary, Digest
from castore.storage.open import create_backend, open_backend
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend
from tests.places import Place

T = TypeVar("T")


def summary_of(data: bytes, algorithm: str = "sha256") -> BlobSummary:
    hasher = BlobHasher(algorithm=algorithm)
    hasher.update(data)
    return hasher.finish()


class PublishedStore:
    """Backends in one `place`, and a catalog with what `publish` puts there."""

    def __init__(self, root: Path, place: Place, *backend_ids: str) -> None:
        self.root = root
        self.place = place
        self.config_path = root / "castore.toml"
        self.config_path.write_text(
            f'[store]\nstate_dir = "{root}/state"\n[cache]\ndir = "{root}/cache"\n'
            + "".join(place.section(backend_id) for backend_id in backend_ids)
            + f'[routing]\ndefault = "{backend_ids[0]}"\n[http]\nlisten = "127.0.0.1:0"\n'
        )
        self.config = parse_config(tomllib.loads(self.config_path.read_text()), source=self.config_path)
        self.catalog_path = self.config.store.catalog_path
        self.backends: dict[str, StorageBackend] = {}
        self._numbers = itertools.count(10_000)

    async def create(self) -> PublishedStore:
        self.config.store.state_dir.mkdir()
        create_catalog(self.catalog_path)
        for settings in self.config.backends.values():
            await create_backend(settings)
        return self.reopen()

    def reopen(self) -> PublishedStore:
        """Go on after `aclose`."""
        self._database = open_writer(self.catalog_path, synchronous="OFF").conn
        for backend_id, settings in self.config.backends.items():
            self.backends[backend_id] = open_backend(settings)
        self.reader = CatalogReader(self.catalog_path)
        return self

    async def aclose(self) -> None:
        self.reader.close()
        self._database.close()
        for backend in self.backends.values():
            await backend.aclose()

    def execute(self, sql: str, *parameters: Any) -> list[Any]:
        """One statement on the catalog, committed."""
        rows: list[Any] = self._database.execute(sql, parameters).fetchall()
        return rows

    # storing

    async def store(self, data: bytes, *backend_ids: str, algorithm: str = "sha256") -> BlobSummary:
        """Put bytes into backends, by default all, as a daemon does."""
        summary = await self._put(data, backend_ids or tuple(self.backends), algorithm)
        self.add_locations((summary, backend_id) for backend_id in backend_ids or self.backends)
        return summary

    async def _put(self, data: bytes, backend_ids: tuple[str, ...], algorithm: str = "sha256") -> BlobSummary:
        summary = summary_of(data, algorithm)
        async with trio.open_nursery() as nursery:
            for backend_id in backend_ids:
                nursery.start_soon(self.backends[backend_id].put, summary.digest, BytesSource(data))
        return summary

    def add_location(self, summary: BlobSummary, backend_id: str) -> None:
        """The catalog learns that a put was acknowledged."""
        self.add_locations([(summary, backend_id)])

    def add_locations(self, stored: Iterable[tuple[BlobSummary, str]]) -> None:
        """The same of many, in one transaction."""
        self.write(lambda transaction: transaction.add_locations(stored))

    def write(self, work: Callable[[Transaction], T]) -> T:
        """One transaction, as another process makes it."""
        writer = CatalogWriter(self.catalog_path)
        try:
            return writer.run_sync(work)
        finally:
            writer.close()

    async def publish(self, ref: str, files: Mapping[bytes, bytes], *backend_ids: str) -> dict[bytes, Digest]:
        """A package with these paths and bytes, stored in backends, by default all: the digest of each path.

        The digest of the manifest is that of the path b"".
        """
        name, version = ref.split("/")
        chosen = tuple(backend_ids or self.backends)
        manifest = await self._put(f"the manifest of {ref}".encode(), chosen, MANIFEST_ALGORITHM)
        blobs = {path: await self._put(data, chosen) for path, data in files.items()}
        stored = [*blobs.values(), manifest]
        self.add_locations((summary, backend_id) for summary in stored for backend_id in chosen)
        root = next(self._numbers)
        parent = self.write(
            lambda transaction: transaction.add_package_name(
                name,
                inode=next(self._numbers),
                latest_inode=next(self._numbers),
                uid=0,
                gid=0,
                mode=0o755,
                now_ns=time.time_ns(),
                version=version,
            )
        )
        self._add_entry(root, parent, version.encode(), Kind.DIRECTORY, 0)
        self._add_entries(root, {path: self._blob_id(blob.digest) for path, blob in blobs.items()})
        self.write(
            lambda transaction: transaction.add_package(
                name=name,
                version=version,
                root_id=root,
                producer="tests",
                retention_class="standard",
                publisher_uid=0,
                published_at_ns=time.time_ns(),
                file_count=len(files),
                size_bytes=sum(map(len, files.values())),
                manifest=manifest,
                backend_ids=chosen,
            )
        )
        return {path: blob.digest for path, blob in blobs.items()} | {b"": manifest.digest}

    def _blob_id(self, digest: Digest) -> int:
        return int(self.execute("SELECT blob_id FROM blobs WHERE digest = ?", digest.raw)[0][0])

    def _add_entries(self, root: int, blob_ids: Mapping[bytes, int]) -> None:
        folders = {b"": root}
        for path, blob_id in blob_ids.items():
            *parts, name = path.split(b"/")
            above = b""
            for part in parts:
                folder = above + part + b"/"
                if folder not in folders:
                    folders[folder] = next(self._numbers)
                    self._add_entry(folders[folder], folders[above], part, Kind.DIRECTORY, 0)
                above = folder
            self._add_entry(next(self._numbers), folders[above], name, Kind.FILE, blob_id)

    def _add_entry(self, number: int, parent: int, name: bytes, kind: Kind, blob_id: int) -> None:
        self.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, 420, 0, 0, 1, 1, 0, 1, ?, x'', 0)",
            *(number, parent, name, number, int(kind), blob_id),
        )

    # looking

    def location(self, digest: Digest, backend_id: str) -> Location:
        """A location as it is now."""
        blob_id = self._blob_id(digest)
        return next(found for found in self.reader.locations(blob_id) if found.backend_id == backend_id)

    def statuses(self) -> dict[tuple[str, str], str]:
        """(digest, backend id) -> status, with the reason if there is one, of every location."""
        rows = self.execute(
            "SELECT algorithm, digest, backend_id, status, reason FROM storage_locations JOIN blobs USING (blob_id)"
        )
        return {(str(Digest(row[0], row[1])), row[2]): f"{row[3]} {row[4]}".rstrip() for row in rows}

    def events(self) -> list[dict[str, Any]]:
        """The data of every event, in order."""
        with EventReader(self.catalog_path) as reader:
            return [stored.event.data for stored in reader.events_after(0, 1_000_000)[0]]


def numbered_files(count: int, *, size_bytes: int = 100) -> dict[bytes, bytes]:
    """Files that all differ."""
    return {b"file %d" % number: (b"%d " % number) * size_bytes for number in range(count)}


def some(items: Iterable[Any]) -> Any:
    """The only item."""
    (item,) = items
    return item
