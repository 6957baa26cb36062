"""An ingest service for tests, without a mount: all real, but that its backend may be told to wait."""

from __future__ import annotations

import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio

from castore.catalog.connection import create_catalog
from castore.catalog.reader import CatalogReader
from castore.catalog.writer import CatalogWriter
from castore.config import parse_config
from castore.ingest.service import Ingest
from castore.storage.backends.local import LocalBackend
from castore.storage.wrapping import Operation, Wrapping

T = TypeVar("T")


class PausingBackend(Wrapping):
    """Waits after each put, before it is acknowledged, until it is told to go on."""

    def __init__(self, backend: LocalBackend) -> None:
        super().__init__(backend)
        self.put_done = trio.Event()
        self.go_on = trio.Event()
        self.put_count = 0

    async def _around(self, operation: Operation, call: Callable[[], Awaitable[T]]) -> T:
        result = await call()
        if operation.name == "put":
            self.put_count += 1
            self.put_done.set()
            await self.go_on.wait()
        return result


@asynccontextmanager
async def running_ingest(
    root: Path, recovered: Callable[[Ingest, CatalogWriter], None] = lambda ingest, writer: None
) -> AsyncIterator[tuple[Ingest, PausingBackend, CatalogReader]]:
    """An ingest service without a mount, over a real catalog and a local backend.

    `recovered` is called between its recovery and its background work.
    """
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
    recovered(ingest, writer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingest.run)
        yield ingest, backend, catalog
        nursery.cancel_scope.cancel()
    ingest.close()
    writer.close()
    catalog.close()
