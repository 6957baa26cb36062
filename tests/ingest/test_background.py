"""Work in the background of an ingest whose databases cannot be used for a while: it says so, and ends nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from castore.catalog.workspace import Publishing
from castore.ingest.expiry import ExpiryWatch
from castore.ingest.service import Ingest
from castore.ingest.staged_file import StagedFile
from castore.ingest.tree import INGEST_ROOT
from tests.ingest.running import running_ingest

OWNER = {"mode": 0o755, "uid": 0, "gid": 0}


async def _until(condition: Callable[[], object]) -> None:
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110 a log tells nobody
            await trio.sleep(0.01)


def _create(ingest: Ingest) -> StagedFile:
    """ingest/n/1/f, open for writing."""
    name = ingest.tree.mkdir(INGEST_ROOT, b"n", **OWNER)
    version = ingest.tree.mkdir(name.inode, b"1", **OWNER)
    return ingest.files.create(ingest.tree.create(version.inode, b"f", **OWNER))


async def test_staged_files_while_the_catalog_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running_ingest(tmp_path) as (ingest, backend, catalog):
        backend.go_on.set()
        file = _create(ingest)
        catalog.close()
        await ingest.files.write(file, 0, b"bytes")
        await ingest.files.release(file, writable=True)
        await _until(lambda: "a staged file is not put yet: " in caplog.text)
        catalog.reopen()
        await _until(lambda: ingest.tree.get(file.inode).state == "stored")
    caplog.clear()


async def test_a_publish_that_cannot_be_undone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    note = Publishing(5, "n", "1", bytes(32))
    async with running_ingest(tmp_path) as (ingest, _, _):
        ingest.store.begin_publishing(note)
    # As a catalog that another process holds locked, only sooner.
    async with running_ingest(tmp_path, lambda _, writer: writer.close()) as (ingest, _, _):
        await _until(lambda: "the manifest of unpublished n/1 stays until the next try or start: " in caplog.text)
        file = _create(ingest)
        await ingest.files.write(file, 0, bytes(3_000_000))
        await ingest.files.release(file, writable=True)
        await _until(lambda: ingest.store.summary(file.inode))
        assert ingest.store.publishings() == [note]
    async with running_ingest(tmp_path) as (ingest, _, _):
        await _until(lambda: not ingest.store.publishings())
    caplog.clear()


async def test_versions_that_expire_while_the_workspace_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_ingest(tmp_path) as (ingest, _, _), trio.open_nursery() as nursery:
        name = ingest.tree.mkdir(INGEST_ROOT, b"n", **OWNER)
        ingest.tree.mkdir(name.inode, b"1", **OWNER)
        aside = ingest.store.path.rename(tmp_path / "aside")
        watch = ExpiryWatch(ingest.store, files=ingest.files, after_seconds=0.04)
        nursery.start_soon(watch.run)
        await _until(lambda: "versions that expired are not looked for: " in caplog.text)
        assert watch.expired == ()
        aside.rename(ingest.store.path)
        await _until(lambda: [expired.ref for expired in watch.expired] == ["n/1"])
        nursery.cancel_scope.cancel()
    caplog.clear()
