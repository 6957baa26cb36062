"""fio writes into ingest/ and verifies what it wrote through the published path: each block says where it belongs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from castore.digest import BLOCK_SIZE_BYTES, Digest
from castore.storage.layout import key_of
from tests.mount.daemons import descriptor
from tests.mount.store import WAIT_SECONDS, MountedStore
from tests.mount.test_disk_cache import configure
from tests.places import PLACES, Place

WRITES = {
    "sequential": ("--rw=write", "--bs=64k", "--ioengine=psync"),
    "random": ("--rw=randwrite", "--bs=4k", "--ioengine=psync"),
    "unaligned": ("--rw=write", "--bs=5000", "--ioengine=psync"),
    "mapped": ("--rw=randwrite", "--bs=16k", "--ioengine=mmap"),
}
"""How files are written, each with a sha256 in every block of fio's; by two processes."""
READS = {
    "in order": ("--rw=read", "--ioengine=psync"),
    "random": ("--rw=randread", "--ioengine=psync"),
    "mapped": ("--rw=randread", "--ioengine=mmap"),
    "direct, 16 at a time": ("--rw=randread", "--ioengine=libaio", "--iodepth=16", "--direct=1"),
}


def fio(folder: Path, name: str, *how: str) -> subprocess.CompletedProcess[str]:
    """One job of two processes. Options that come later win."""
    block = next(option for option in WRITES[name] if option.startswith("--bs="))
    common = ("--size=4m", block, "--verify=sha256", "--verify_fatal=1", "--verify_dump=0", "--verify_state_save=0")
    return subprocess.run(
        ["fio", f"--name={name}", f"--directory={folder}", "--numjobs=2", "--randrepeat=1", *common, *how],
        cwd=folder.parents[3],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS * 2,
        check=False,
    )


def write(folder: Path, *names: str) -> None:
    for name in names:
        done = fio(folder, name, *WRITES[name], "--do_verify=0", "--fallocate=none")
        assert done.returncode == 0, done.stdout + done.stderr


def verify(folder: Path, name: str, how: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return fio(folder, name, *how, "--verify_only", "--readonly")


def drop_page_cache(package: Path) -> None:
    """What the kernel keeps of a package's files."""
    for path in package.iterdir():
        with descriptor(path, os.O_RDONLY) as file:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_what_fio_wrote_it_verifies(make_store: Callable[..., MountedStore], place: Place) -> None:
    """In every order, by mappings and past the page cache; by way of the backend, of the disk cache and of memory."""
    store = make_store(place=place)
    configure(store, same_disk="true")
    store.mount()
    write(store.ingest("fio/1"), *WRITES)
    package = store.publish("fio/1")
    store.umount()
    shutil.rmtree(store.root / "cache", ignore_errors=True)
    store.mount()
    for how, options in READS.items():
        for name in WRITES:
            done = verify(package, name, options)
            assert done.returncode == 0, f"{name}, {how}: {done.stdout}{done.stderr}"
        drop_page_cache(package)
    reads = store.status()["reads"]
    assert reads["fetched_bytes"] >= sum(path.stat().st_size for path in package.iterdir())
    assert reads["cache_hits"] + reads["disk_hits"] >= 3 * reads["fetched_bytes"] // BLOCK_SIZE_BYTES
    assert reads["bad_blocks"] == reads["disk_bad"] == 0


def test_fio_is_told_of_a_damaged_object(make_store: Callable[..., MountedStore]) -> None:
    store = make_store()
    configure(store, max_bytes=0)
    store.mount()
    box = store.ingest("fio/1")
    write(box, "sequential")
    digest = Digest.of((box / "sequential.0.0").read_bytes())
    package = store.publish("fio/1")
    item = store.objects / key_of(digest)
    data = bytearray(item.read_bytes())
    data[3_000_000] ^= 1
    item.write_bytes(data)
    done = verify(package, "sequential", READS["in order"])
    assert done.returncode != 0
    assert "Input/output error" in done.stdout + done.stderr
