"""A backend that fails under a real mount: publish says why, reads never give wrong bytes, what is mended is used."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from castore.catalog.reader import CatalogReader
from castore.catalog.records import LocationStatus
from castore.events import LOCATION_FAILED
from castore.storage.backends.durable import ROOT_MARK
from castore.storage.layout import key_of
from tests.mount.crash_round import rows
from tests.mount.store import MountedStore, fails, run_tool, wait_until

Fault = Callable[[MountedStore], Any]

BLOCK_BYTES = 128 * 1024


# what can happen to the folder of a local backend


@contextmanager
def gone(store: MountedStore) -> Iterator[None]:
    store.objects.rename(store.root / "elsewhere")
    yield
    (store.root / "elsewhere").rename(store.objects)


@contextmanager
def an_empty_mountpoint(store: MountedStore) -> Iterator[None]:
    """As the folder looks when the disk that belongs there is not mounted."""
    with gone(store):
        store.objects.mkdir()
        yield
        store.objects.rmdir()


@contextmanager
def read_only(store: MountedStore) -> Iterator[None]:
    run_tool("mount", "--bind", store.objects, store.objects)
    try:
        run_tool("mount", "-o", "remount,bind,ro", store.objects)
        yield
    finally:
        run_tool("umount", store.objects)


@contextmanager
def full(store: MountedStore) -> Iterator[None]:
    """A disk with room for its mark, and not for much more."""
    run_tool("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", store.objects)
    try:
        (store.objects / ROOT_MARK).touch()
        yield
    finally:
        run_tool("umount", store.objects)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (gone, "{objects} is not there: mount it or run `castore init`"),
        (an_empty_mountpoint, "{objects} has no CASTORE-OBJECTS.txt: mount it or run `castore init`"),
        (read_only, "Read-only file system"),
        (full, "No space left on device"),
    ],
)
def test_publish_says_why_and_succeeds_later(store: MountedStore, fault: Fault, reason: str) -> None:
    box = store.ingest("fault/1")
    with fault(store):
        (box / "a").write_bytes(os.urandom(300_000))
        data = (box / "a").read_bytes()
        with fails(errno.EBUSY):
            box.rename(store.package("fault/1"))
        expected = reason.format(objects=store.objects)
        assert expected in os.getxattr(box, "user.castore.error").decode()
        assert expected in json.loads(store.castore("status", "--json"))["daemon"]["versions"][0]["error"]
        assert expected in store.castore("status")
        assert store.state_of(box / "a").startswith("failed: ")
        assert store.run("package", "publish", "fault/1").stderr.splitlines()[-1].startswith("castore: error: ")
        assert (box / "a").read_bytes() == data
        assert not store.package("fault/1").exists()
    assert (store.publish("fault/1") / "a").read_bytes() == data


def test_publish_without_rights_at_the_backend(make_store: Callable[..., MountedStore]) -> None:
    """A daemon that may not do all that root may: EACCES, which waiting does not mend."""
    store = make_store()
    capability = "-dac_override"
    arguments = ("mount", str(store.mnt), "--background", "--json")
    mounted = run_tool(
        "setpriv", f"--bounding-set={capability}", f"--inh-caps={capability}",
        sys.executable, "-m", "castore.cli", "--config", store.config, *arguments,
    )  # fmt: skip
    store.pid = json.loads(mounted)["pid"]
    box = store.ingest("denied/1")
    store.objects.chmod(0o500)
    (box / "a").write_text("a")
    with fails(errno.EACCES):
        box.rename(store.package("denied/1"))
    assert "Permission denied" in os.getxattr(box, "user.castore.error").decode()
    store.objects.chmod(0o700)
    assert (store.publish("denied/1") / "a").read_text() == "a"


# objects that are not what they were


def published(store: MountedStore, data: bytes) -> tuple[Path, Path]:
    """A published file of these bytes, and its object. The daemon has read neither."""
    (store.ingest("heal/1") / "a").write_bytes(data)
    path = store.publish("heal/1") / "a"
    with CatalogReader.open(store.state / "catalog.db") as catalog:
        entry = catalog.entry(path.stat().st_ino)
        assert entry is not None
        known = catalog.blob_digest(entry.blob_id)
        assert known is not None
    return path, store.objects / key_of(known[0])


def read_or_errno(descriptor: int, offset: int) -> bytes | int | None:
    """Half a block of a file, or what the read of it fails with."""
    try:
        return os.pread(descriptor, BLOCK_BYTES // 2, offset)
    except OSError as exc:
        return exc.errno


def flip(item: Path) -> None:
    with item.open("r+b") as file:
        file.seek(2 * BLOCK_BYTES + 7)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def cut(item: Path) -> None:
    os.truncate(item, 2 * BLOCK_BYTES + 7)


def delete(item: Path) -> None:
    item.unlink()


def replace_by_a_fifo(item: Path) -> None:
    """Opening it would wait for a writer, for ever."""
    item.unlink()
    os.mkfifo(item)


def replace_by_a_folder(item: Path) -> None:
    item.unlink()
    item.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason", "good_bytes"),
    [
        (flip, "digest_mismatch", 2 * BLOCK_BYTES),
        (cut, "size_mismatch", 0),
        (delete, "missing", 0),
        (replace_by_a_fifo, "missing", 0),
        (replace_by_a_folder, "missing", 0),
    ],
)
def test_a_damaged_object(store: MountedStore, damage: Callable[[Path], None], reason: str, good_bytes: int) -> None:
    """Never wrong bytes, never a short file; the location is failed, with an event; bytes that come again heal it."""
    data = os.urandom(5 * BLOCK_BYTES + 123)
    path, item = published(store, data)
    damage(item)
    with path.open("rb", buffering=0) as file:
        answers = {offset: read_or_errno(file.fileno(), offset) for offset in range(0, len(data), BLOCK_BYTES // 2)}
    for offset, answer in answers.items():
        right = data[offset : offset + BLOCK_BYTES // 2]
        assert answer in ((right,) if offset < good_bytes else (right, errno.EIO)), offset
    assert errno.EIO in answers.values()
    with fails(errno.EIO):
        path.read_bytes()
    digest = os.getxattr(path, "user.castore.digest").decode()
    assert os.getxattr(path, "user.castore.status") == b"failed"
    assert os.getxattr(path, "user.castore.backend") == b"local"
    with CatalogReader.open(store.state / "catalog.db") as catalog:
        entry = catalog.entry(path.stat().st_ino)
        assert entry is not None
        [location] = catalog.locations(entry.blob_id)
        assert (location.status, location.reason) == (LocationStatus.FAILED, reason)
    query = f"SELECT subject, data FROM events WHERE type = '{LOCATION_FAILED}'"
    [(subject, text)] = rows(store.state / "catalog.db", query)
    event = json.loads(text)
    assert (subject, event["backend_id"], event["reason"]) == (digest, "local", reason)
    status = store.run("status", "--json")
    assert status.returncode == 1
    assert json.loads(status.stdout)["daemon"]["failed_location_count"] == 1
    if damage is replace_by_a_folder:
        item.rmdir()  # nothing is put over a folder
    again = store.ingest("heal/2") / "b"
    again.write_bytes(data)
    store.wait_stored(again)
    assert path.read_bytes() == data
    assert os.getxattr(path, "user.castore.status") == b"stored"
    # Counts that took long are given again for a while.
    wait_until(lambda: store.run("status").returncode == 0, "the status is well again")


def test_a_failed_location_is_tried_when_there_is_no_other(store: MountedStore) -> None:
    """An operator may have put the object back: nothing has to be told of that."""
    data = os.urandom(300_000)
    path, item = published(store, data)
    item.rename(store.root / "kept")
    with fails(errno.EIO):
        path.read_bytes()
    (store.root / "kept").rename(item)
    assert path.read_bytes() == data


def test_what_was_read_is_served_without_its_backend(store: MountedStore) -> None:
    data = os.urandom(1_000_000)
    path, _ = published(store, data)
    assert path.read_bytes() == data
    with gone(store):
        assert path.read_bytes() == data
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == data, "from the daemon's own memory"
        by_digest = store.mnt / "by-digest/sha256" / "/".join(key_of_path(path))
        assert by_digest.read_bytes() == data
        assert os.getxattr(path, "user.castore.status") == b"stored", "a backend that is away makes nothing failed"


def key_of_path(path: Path) -> tuple[str, str, str]:
    """Where by-digest/ has a published file."""
    text = os.getxattr(path, "user.hash.sha256").decode()
    return text[:2], text[2:4], text


def test_uncached_reads_without_the_backend_fail_and_come_back(store: MountedStore) -> None:
    data = os.urandom(300_000)
    path, _ = published(store, data)
    with gone(store):
        with fails(errno.EIO):
            path.read_bytes()
        assert os.getxattr(path, "user.castore.status") == b"stored"
    wait_until(lambda: path.read_bytes() == data, "it reads again")
