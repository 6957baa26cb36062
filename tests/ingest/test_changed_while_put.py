"""A file that is written to while it is put: what was put is no location, whatever the short checksums say."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import trio

from castore.digest import Digest
from castore.ingest.service import Ingest
from castore.ingest.staged_file import StagedFile
from castore.ingest.tree import INGEST_ROOT
from castore.ingest.uploader import BATCH_FILES, LINGER_SECONDS
from tests.ingest.running import running_ingest

OWNER: Final = {"mode": 0o755, "uid": 0, "gid": 0}


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


async def test_a_put_ends_at_the_first_change(tmp_path: Path) -> None:
    """Nobody waits for it any more, and its worker does not either: here the backend gives no answer at all."""
    async with running_ingest(tmp_path) as (ingest, backend, catalog):
        file = await write_file(ingest, b"first")
        with trio.fail_after(30):
            await backend.put_done.wait()
        progress = ingest.uploader.progress
        await ingest.files.write(file, 0, b"other")
        with trio.fail_after(30):
            await progress.wait()
        assert catalog.good_backends(Digest.of(b"first")) == set()
        assert ingest.tree.get(file.inode).state == "receiving"


async def test_the_file_that_was_read_changed_and_another_one_waits_for_these_bytes(tmp_path: Path) -> None:
    """Nothing ends that put early, and nobody knows what it read: the bytes are put again, from the other file."""
    async with running_ingest(tmp_path) as (ingest, backend, catalog):
        file = await write_file(ingest, b"same")
        other = ingest.files.create(ingest.tree.create(file.version_inode, b"other", **OWNER))
        await ingest.files.write(other, 0, b"same")
        await ingest.files.flush(other)
        with trio.fail_after(30):
            await backend.put_done.wait()
        await ingest.files.write(file, 0, b"new")
        backend.go_on.set()
        with trio.fail_after(30):
            while ingest.tree.get(other.inode).state != "stored":
                await ingest.uploader.progress.wait()
        assert backend.put_count == 2
        assert catalog.good_backends(Digest.of(b"same")) == {"local"}


async def test_a_file_waits_for_others_for_a_while_only(tmp_path: Path) -> None:
    """Files that come one after the other share commits; the first does not wait until there is a whole batch."""
    async with running_ingest(tmp_path) as (ingest, backend, _):
        backend.go_on.set()
        first = await write_file(ingest, b"first")
        version = ingest.tree.get(first.inode).version_inode
        count = 0
        while ingest.tree.get(first.inode).state == "staged":
            count += 1
            file = ingest.files.create(ingest.tree.create(version, b"%d" % count, **OWNER))
            await ingest.files.write(file, 0, b"%d" % count)
            await ingest.files.flush(file)
            await ingest.files.release(file, writable=True)
            await trio.sleep(LINGER_SECONDS / 2)
        assert count < BATCH_FILES
