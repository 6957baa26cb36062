"""A real catalog and real backends for the tests of the read path: watched and damaged, never imitated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from castore.blobs.disk_cache import DiskCache
from castore.blobs.memory import MEMORY_BYTES
from castore.blobs.open_blob import OpenBlob
from castore.blobs.reader import BlobReader
from castore.blobs.siblings import Following
from castore.catalog.connection import create_catalog, open_writer
from castore.catalog.reader import CatalogReader
from castore.catalog.records import Blob, FailureReason, Kind, LocationStatus
from castore.digest import BLOCK_SIZE_BYTES, XXH3, BlobHasher, Digest
from castore.storage.backends.local import LocalBackend
from castore.storage.layout import key_of
from castore.storage.source import BytesSource
from castore.storage.wrapping import Operation, Wrapping

T = TypeVar("T")
MIB = 1024 * 1024
BLOCK = BLOCK_SIZE_BYTES


@dataclass(frozen=True, slots=True)
class Get:
    """One get as the backend saw it; `under_way` counts the gets at that moment, itself included."""

    offset: int
    length: int
    under_way: int
    digest: Digest


class WatchedBackend(Wrapping):
    """Notes each get, holds gets while `open` is not set, fails them with `error`, and flips bits in transit."""

    def __init__(self, inner: LocalBackend) -> None:
        super().__init__(inner)
        self.local = inner
        self.gets: list[Get] = []
        self.under_way = 0
        self.error: Exception | None = None
        self.flips = 0
        """How many of the next gets arrive with a wrong first byte."""
        self.turns = 0
        """How often other tasks have their turn during a get, at least: a server that takes its time."""
        self.open = trio.Event()
        self.open.set()

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        return await call()

    async def get(
        self, digest: Digest, *, offset: int, length: int, into: bytearray | memoryview | None = None
    ) -> memoryview:
        self.under_way += 1
        self.gets.append(Get(offset, length, self.under_way, digest))
        try:
            for _ in range(self.turns):
                await trio.lowlevel.checkpoint()
            await self.open.wait()
            if self.error is not None:
                raise self.error
            view = await super().get(digest, offset=offset, length=length, into=into)
            if self.flips:
                self.flips -= 1
                view[0] ^= 1
            return view
        finally:
            self.under_way -= 1

    def path(self, blob: Blob) -> Path:
        return self.local.path / key_of(blob.summary.digest)

    def flip(self, blob: Blob, offset: int) -> None:
        """Flip a bit of the stored object."""
        with self.path(blob).open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))

    def truncate(self, blob: Blob, size: int) -> None:
        with self.path(blob).open("r+b") as file:
            file.truncate(size)

    def remove(self, blob: Blob) -> None:
        self.path(blob).unlink()


class World:
    """A catalog, backends in configuration order, and what was reported of bad locations."""

    def __init__(self, folder: Path, *backend_ids: str) -> None:
        create_catalog(folder / "catalog.db")
        self._writer = open_writer(folder / "catalog.db", synchronous="OFF")
        self.catalog = CatalogReader.open(folder / "catalog.db")
        self.backends: Mapping[str, WatchedBackend] = {
            backend_id: WatchedBackend(LocalBackend(backend_id, folder / backend_id)) for backend_id in backend_ids
        }
        self.reports: list[tuple[Digest, str, FailureReason]] = []
        self.report_error: Exception | None = None

    async def create(self) -> World:
        for backend in self.backends.values():
            await backend.local.create()
        return self

    def close(self) -> None:
        self.catalog.close()
        self._writer.close()

    def __getitem__(self, backend_id: str) -> WatchedBackend:
        return self.backends[backend_id]

    async def add(self, data: bytes, *backend_ids: str, block_size: int = BLOCK, checksums: str = XXH3) -> Blob:
        """Store a blob in backends (all of them unless named), with a row and locations."""
        hasher = BlobHasher(block_size_bytes=block_size, checksum_algorithm=checksums)
        hasher.update(data)
        summary = hasher.finish()
        blob_id = self._writer.execute(
            "INSERT INTO blobs (algorithm, digest, size_bytes, block_size_bytes, checksum_algorithm, checksums) "
            "VALUES (?, ?, ?, ?, ?, ?) RETURNING blob_id",
            [
                summary.digest.algorithm,
                summary.digest.raw,
                summary.size_bytes,
                summary.block_size_bytes,
                summary.checksum_algorithm,
                summary.checksums,
            ],
        ).fetchone()[0]
        for backend_id in backend_ids or self.backends:
            await self.backends[backend_id].put(summary.digest, BytesSource(data))
            self.locate(blob_id, backend_id, LocationStatus.STORED)
        blob = self.catalog.blob(blob_id)
        assert blob is not None
        return blob

    def locate(self, blob_id: int, backend_id: str, status: LocationStatus) -> None:
        """Say in the catalog how a location is."""
        self._writer.execute(
            "INSERT INTO storage_locations VALUES (?, ?, ?, '', 1, 0) "
            "ON CONFLICT DO UPDATE SET status = excluded.status",
            [blob_id, backend_id, str(status)],
        )

    def insert_entry(
        self, number: int, parent: int, name: bytes, inode: int, kind: Kind, size_bytes: int = 0, blob_id: int = 0
    ) -> None:
        """A name in a package."""
        self._writer.execute(
            "INSERT INTO entries VALUES (?, ?, ?, ?, ?, 493, 1, 2, 0, 0, ?, 1, ?, x'', 0)",
            [number, parent, name, inode, kind, size_bytes, blob_id],
        )

    def forget(self, blob: Blob) -> None:
        """Delete the blob's rows; as in a catalog that was made anew, the next blob gets its number."""
        self._writer.execute("DELETE FROM storage_locations WHERE blob_id = ?", [blob.blob_id])
        self._writer.execute("DELETE FROM blobs WHERE blob_id = ?", [blob.blob_id])
        self._writer.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'blobs'", [blob.blob_id - 1])

    def reader(
        self,
        *,
        memory_bytes: int = MEMORY_BYTES,
        cache: DiskCache | None = None,
        following: Following | None = None,
    ) -> BlobReader:
        return BlobReader(
            self.catalog,
            self.backends,
            memory_bytes=memory_bytes,
            on_bad_location=self.report,
            cache=cache,
            following=following,
        )

    async def report(self, digest: Digest, backend_id: str, reason: FailureReason) -> None:
        self.reports.append((digest, backend_id, reason))
        await trio.lowlevel.checkpoint()
        if self.report_error is not None:
            raise self.report_error


async def read_all(file: OpenBlob, *, request: int) -> bytes:
    """Read from the beginning to the end, as `cat` does."""
    whole = bytearray()
    while piece := await file.read(len(whole), request):
        whole += piece
    return bytes(whole)


async def until(true: Callable[[], bool]) -> None:
    """Let other tasks run until something holds."""
    with trio.fail_after(20):
        while not true():
            await trio.lowlevel.checkpoint()
