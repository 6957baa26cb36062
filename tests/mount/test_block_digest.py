"""`block_digest` of a backend, on a mount: what a forged block comes to, with short checksums and with sha256."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from castore.catalog.reader import CatalogReader
from castore.catalog.records import Blob, LocationStatus
from castore.digest import BLOCK_SIZE_BYTES, SHA256_BLOCKS, XXH3, Digest
from castore.registry.manifest import read_manifest
from castore.storage.layout import key_of
from tests.forgery import forge
from tests.mount.store import MountedStore, fails
from tests.mount.test_disk_cache import configure

BLOCKS = 3


def set_block_digest(store: MountedStore, block_digest: str) -> None:
    """Of the backend; counts from the next mount on."""
    lines = [line for line in store.config.read_text().splitlines() if not line.startswith("block_digest")]
    place = lines.index('type = "local"')
    store.config.write_text("\n".join([*lines[: place + 1], f'block_digest = "{block_digest}"', *lines[place + 1 :]]))


@pytest.fixture
def make(make_store: Callable[..., MountedStore]) -> Callable[[str], MountedStore]:
    """Mounts a store that is set so, and has no disk cache: reads ask the backend."""

    def made(block_digest: str) -> MountedStore:
        store = make_store()
        configure(store, max_bytes=0)
        set_block_digest(store, block_digest)
        store.mount()
        return store

    return made


def publish(store: MountedStore, ref: str, data: bytes) -> Path:
    (store.ingest(ref) / "a").write_bytes(data)
    return store.publish(ref) / "a"


def blob_of(store: MountedStore, data: bytes) -> Blob:
    with CatalogReader.open(store.state / "catalog.db") as catalog:
        blob = catalog.blob_by_digest(Digest.of(data))
    assert blob is not None
    return blob


@contextmanager
def forged(store: MountedStore, data: bytes) -> Iterator[bytes]:
    """The second block of a stored file is another one, with the same short checksum."""
    item = store.objects / key_of(Digest.of(data))
    second = data[BLOCK_SIZE_BYTES : 2 * BLOCK_SIZE_BYTES]
    altered = data[:BLOCK_SIZE_BYTES] + forge(second) + data[2 * BLOCK_SIZE_BYTES :]
    item.write_bytes(altered)
    yield altered
    item.write_bytes(data)


def sha256_of_blocks(data: bytes) -> bytes:
    size = BLOCK_SIZE_BYTES
    return b"".join(hashlib.sha256(data[start : start + size]).digest() for start in range(0, len(data), size))


def test_sha256_refuses_a_forged_block(make: Callable[[str], MountedStore]) -> None:
    store = make(SHA256_BLOCKS)
    data = os.urandom(BLOCKS * BLOCK_SIZE_BYTES - 1)
    path = publish(store, "safe/1", data)
    with forged(store, data):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(file.fileno(), 1000, 0) == data[:1000]
            with fails(errno.EIO):
                os.pread(file.fileno(), 1000, BLOCK_SIZE_BYTES)
        assert os.getxattr(path, "user.castore.status") == str(LocationStatus.FAILED).encode()
    assert path.read_bytes() == data


def test_short_checksums_do_not_see_it(make: Callable[[str], MountedStore]) -> None:
    """They are for accidents: that is why there is another choice. Verify sees it all the same."""
    store = make(XXH3)
    data = os.urandom(BLOCKS * BLOCK_SIZE_BYTES - 1)
    path = publish(store, "unsafe/1", data)
    with forged(store, data) as altered:
        assert path.read_bytes() == altered
        assert store.run("storage", "verify").returncode == 1


def test_it_is_in_the_catalog_and_in_the_manifest(make: Callable[[str], MountedStore]) -> None:
    """However the bytes were written: front to back, or in another order, which hashes them from the disk."""
    store = make(SHA256_BLOCKS)
    data = {name: os.urandom(BLOCKS * BLOCK_SIZE_BYTES - 1) for name in ("forwards", "backwards", "cut")}
    box = store.ingest("safe/1")
    (box / "forwards").write_bytes(data["forwards"])
    with (box / "backwards").open("wb", buffering=0) as file:
        os.pwrite(file.fileno(), data["backwards"][100_000:], 100_000)
        os.pwrite(file.fileno(), data["backwards"][:100_000], 0)
    with (box / "cut").open("wb", buffering=0) as file:
        file.write(b"not this")
        file.truncate(0)
        file.seek(0)
        file.write(data["cut"])
    store.publish("safe/1")
    for content in data.values():
        summary = blob_of(store, content).summary
        assert (summary.checksum_algorithm, summary.checksums) == (SHA256_BLOCKS, sha256_of_blocks(content))
    [manifest] = (path for path in (store.objects / "manifest-sha256").rglob("*") if path.is_file())
    entries = {entry.path.decode(): entry.blob for entry in read_manifest(manifest)[1] if entry.blob is not None}
    assert {name: blob.checksums for name, blob in entries.items()} == {
        name: sha256_of_blocks(content) for name, content in data.items()
    }


def test_bytes_that_come_again_get_the_better_checksums(make: Callable[[str], MountedStore]) -> None:
    store = make(XXH3)
    data = os.urandom(BLOCKS * BLOCK_SIZE_BYTES - 1)
    first = publish(store, "known/1", data)
    store.umount()
    set_block_digest(store, SHA256_BLOCKS)
    store.mount()
    assert blob_of(store, data).summary.checksum_algorithm == XXH3
    second = publish(store, "known/2", data)
    assert blob_of(store, data).summary.checksums == sha256_of_blocks(data)
    with forged(store, data):
        for path in (first, second):
            with fails(errno.EIO):
                path.read_bytes()
    store.umount()
    set_block_digest(store, XXH3)
    store.mount()
    publish(store, "known/3", data)
    assert blob_of(store, data).summary.checksum_algorithm == SHA256_BLOCKS, "and keep them"


def test_files_that_are_staged_when_it_is_set_are_hashed_again(make: Callable[[str], MountedStore]) -> None:
    store = make(XXH3)
    stored, staged = (os.urandom(BLOCKS * BLOCK_SIZE_BYTES - 1) for _ in range(2))
    box = store.ingest("later/1")
    (box / "stored").write_bytes(stored)
    store.wait_stored(box / "stored")
    time_ns = (box / "stored").stat().st_mtime_ns
    (box / "staged").write_bytes(staged)
    store.kill()
    set_block_digest(store, SHA256_BLOCKS)
    store.mount()
    package = store.publish("later/1")
    assert (package / "stored").stat().st_mtime_ns == time_ns
    for name, content in (("stored", stored), ("staged", staged)):
        assert (package / name).read_bytes() == content
        assert blob_of(store, content).summary.checksums == sha256_of_blocks(content)


def test_imported_files_have_it(make: Callable[[str], MountedStore], tmp_path: Path) -> None:
    store = make(SHA256_BLOCKS)
    data = os.urandom(BLOCKS * BLOCK_SIZE_BYTES - 1)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").write_bytes(data)
    store.castore("package", "import", str(tmp_path / "tree"), "imported/1")
    assert (store.package("imported/1") / "a").read_bytes() == data
    assert blob_of(store, data).summary.checksums == sha256_of_blocks(data)
