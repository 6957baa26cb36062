"""A file that is written to while it is put: what was put is no location, whatever the short checksums say."""

from __future__ import annotations

import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import trio

from castore.catalog.connection import create_catalog
from castore.catalog.reader import CatalogReader
from castore.catalog.writer import CatalogWriter
from castore.config import parse_config
from castore.digest import Digest
from castore.ingest.service import Ingest
from castore.ingest.staged_file import StagedFile
from castore.ingest.tree import INGEST_ROOT
from castore.storage.backends.local import LocalBackend
from castore.storage.wrapping import Operation, Wrapping

T = TypeVar("T")

OWNER: Final = {"mode": 0o755, "uid": 0, "gid": 0}


class PausingBackend(Wrapping):
    """Waits after each put, before it is acknowledged, until it is told to go on."""

    def __init__(self, backend: LocalBackend) -> None:
        super().__init__(backend)
        self.put_done = trio.Event()
        self.go_on = trio.Event()

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        result = await call()
        if operation.name == "put":
            self.put_done.set()
            await self.go_on.wait()
        return result


@asynccontextmanager
async def running_ingest(root: Path) -> AsyncIterator[tuple[Ingest, PausingBackend, CatalogReader]]:
    """An ingest service without a mount, over a real catalog and a local backend."""
    text = f"""
        [store]
        state_dir = "{root}"
        [cache]
        dir = "{root}/cache"
        [backends.local]
        type = "local"
        path = "{root}/objects"
    """
    config = parse_config(tomllib.loads(text), source=root / "castore.toml")
    create_catalog(root / "catalog.db")
    local = LocalBackend("local", root / "objects")
    await local.create()
    backend = PausingBackend(local)
    catalog, writer = CatalogReader(root / "catalog.db"), CatalogWriter(root / "catalog.db")

    async def on_published(inodes: list[int]) -> None:
        return

    ingest = Ingest(config, catalog=catalog, writer=writer, backends={"local": backend}, on_published=on_published)
    await ingest.recover()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingest.run)
        yield ingest, backend, catalog
        nursery.cancel_scope.cancel()
    ingest.close()
    writer.close()
    catalog.close()


async def write_file(ingest: Ingest, data: bytes) -> StagedFile:
    """ingest/n/1/f, written front to back and flushed, still open."""
    name = ingest.tree.mkdir(INGEST_ROOT, b"n", **OWNER)
    version = ingest.tree.mkdir(name.inode, b"1", **OWNER)
    file = ingest.files.create(ingest.tree.create(version.inode, b"f", **OWNER))
    await ingest.files.write(file, 0, data)
    await ingest.files.flush(file)
    return file


async def test_bytes_changed_and_changed_back_are_put_again(tmp_path: Path) -> None:
    async with running_ingest(tmp_path) as (ingest, backend, catalog):
        file = await write_file(ingest, b"first")
        with trio.fail_after(30):
            await backend.put_done.wait()
        await ingest.files.write(file, 0, b"other")
        await ingest.files.write(file, 0, b"first")
        progress = ingest.uploader.progress
        backend.go_on.set()
        with trio.fail_after(30):
            await progress.wait()
        assert catalog.good_backends(Digest.of(b"first")) == set()
        await ingest.files.release(file, writable=True)
        with trio.fail_after(30):
            while ingest.tree.get(file.inode).state != "stored":
                await progress.wait()
        assert catalog.good_backends(Digest.of(b"first")) == {"local"}


async def test_bytes_that_changed_are_no_location(tmp_path: Path) -> None:
    async with running_ingest(tmp_path) as (ingest, backend, catalog):
        file = await write_file(ingest, b"first")
        with trio.fail_after(30):
            await backend.put_done.wait()
        await ingest.files.write(file, 0, b"other")
        await ingest.files.release(file, writable=True)
        backend.go_on.set()
        with trio.fail_after(30):
            while ingest.tree.get(file.inode).state != "stored":
                await ingest.uploader.progress.wait()
        assert catalog.good_backends(Digest.of(b"first")) == set()
        assert catalog.good_backends(Digest.of(b"other")) == {"local"}
