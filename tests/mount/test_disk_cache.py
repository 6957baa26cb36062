"""The disk cache of mounts: through restarts, dead backends, kill -9, and shared by daemons. Not its files' details."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from castore.failpoint import VARIABLE
from tests.mount.store import MountedStore, fails, wait_until
from tests.places import PLACES, Place

MIB = 1024 * 1024


def configure(store: MountedStore, **settings: object) -> None:
    """Set [cache] anew; counts from the next mount on."""
    table = {"dir": json.dumps(str(store.root / "cache")), **settings}
    before, _, rest = store.config.read_text().partition("[cache]\n")
    rest = rest[rest.index("[ingest]") :]
    lines = "".join(f"{key} = {value}\n" for key, value in table.items())
    store.config.write_text(f"{before}[cache]\n{lines}{rest}")


def cache_of(store: MountedStore) -> dict[str, Any]:
    document: dict[str, Any] = store.status()["cache"]
    return document


def wait_kept(store: MountedStore) -> None:
    """Until what was read is in the cache."""
    wait_until(lambda: cache_of(store)["queued_bytes"] == 0, "the cache is written")


def cached_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "blocks").rglob("*.*") if path.is_file())


@pytest.fixture
def make_cached(make_store: Callable[..., MountedStore]) -> Callable[..., MountedStore]:
    """A mounted store whose cache keeps whatever is read."""

    def make(place: Place | None = None, **settings: object) -> MountedStore:
        store = make_store(place=place)
        configure(store, **({"same_disk": "true", "seed": "false"} | settings))
        store.mount()
        return store

    return make


def publish(store: MountedStore, files: dict[str, bytes], ref: str = "lib/1") -> Path:
    box = store.ingest(ref)
    for name, data in files.items():
        (box / name).write_bytes(data)
    return store.publish(ref)


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_cached_files_are_read_after_a_restart_while_the_backend_is_down(
    make_cached: Callable[..., MountedStore], place: Place
) -> None:
    store = make_cached(place)
    files = {"large": os.urandom(20 * MIB + 17), "small": b"small", "empty": b"", "never read": os.urandom(100)}
    package = publish(store, files)
    for name in ("large", "small", "empty"):
        assert (package / name).read_bytes() == files[name]
    store.umount()
    shutil.rmtree(store.state / "staging")
    with place.unreachable("main"):
        store.mount()
        for name in ("large", "small", "empty"):
            assert (package / name).read_bytes() == files[name]
        with pytest.raises(OSError, match="Errno"):
            (package / "never read").read_bytes()
        assert cache_of(store)["hit_count"] >= 160
        assert cache_of(store)["bad_count"] == 0
    assert (package / "never read").read_bytes() == files["never read"]


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_what_is_published_is_in_the_cache(make_cached: Callable[..., MountedStore], place: Place) -> None:
    store = make_cached(place, seed="true")
    files = {"small": b"small", "8 MiB": os.urandom(8 * MIB), "larger": os.urandom(8 * MIB + 1)}
    box = store.ingest("lib/1")
    for name, data in files.items():
        (box / name).write_bytes(data)
        os.utime(box / name, (0, 0))
    with (box / "8 MiB").open("rb") as reader:
        package = store.publish("lib/1")
        wait_kept(store)
        used = cache_of(store)["used_bytes"]
        assert 8 * MIB <= used < 9 * MIB
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert reader.read() == files["8 MiB"]
    store.umount()
    with place.unreachable("main"):
        store.mount()
        for name in ("small", "8 MiB"):
            assert (package / name).read_bytes() == files[name]
        with pytest.raises(OSError, match="Errno"):
            (package / "larger").read_bytes()
    assert (package / "larger").read_bytes() == files["larger"]


def test_a_daemon_that_is_killed_while_it_hands_over_to_the_cache(make_cached: Callable[..., MountedStore]) -> None:
    store = make_cached(seed="true")
    store.umount()
    os.environ[VARIABLE] = "publish.forgetting:2"
    try:
        store.mount()
    finally:
        del os.environ[VARIABLE]
    files = {f"{number}": os.urandom(MIB + number) for number in range(4)}
    box = store.ingest("lib/1")
    for name, data in files.items():
        (box / name).write_bytes(data)
    with pytest.raises(OSError, match="Errno"):
        store.publish("lib/1")
    wait_until(lambda: not Path(f"/proc/{store.pid}").exists(), "the daemon is dead")
    store.pid = 0
    assert len(cached_files(store.root / "cache")) == 2
    store.mount()
    assert {name: (store.package("lib/1") / name).read_bytes() for name in files} == files
    assert list((store.state / "staging/data").iterdir()) == []
    assert cache_of(store)["bad_count"] == 0


def test_an_altered_file_is_noticed_and_mended(make_cached: Callable[..., MountedStore]) -> None:
    store = make_cached()
    data = os.urandom(3 * MIB)
    package = publish(store, {"file": data})
    assert (package / "file").read_bytes() == data
    store.umount()
    (file,) = cached_files(store.root / "cache")
    with file.open("r+b") as stream:
        stream.seek(MIB)
        stream.write(b"damage")
    store.mount()
    assert (package / "file").read_bytes() == data
    assert cache_of(store)["bad_count"] == 1
    wait_kept(store)
    assert file.read_bytes() == data
    assert store.log().count("in the disk cache are damaged") == 1
    assert store.status()["failed_location_count"] == 0


def test_a_daemon_that_is_killed_while_it_fills_leaves_a_cache_that_serves(
    make_cached: Callable[..., MountedStore],
) -> None:
    store = make_cached()
    data = os.urandom(64 * MIB)
    package = publish(store, {"file": data})
    for _ in range(3):
        descriptor = os.open(package / "file", os.O_RDONLY)
        os.pread(descriptor, 24 * MIB, 0)
        store.kill()
        with fails(errno.ENOTCONN):
            os.close(descriptor)
        store.mount()
    with (package / "file").open("rb") as stream:
        assert stream.read() == data
    wait_kept(store)
    store.umount()
    store.mount()
    assert (package / "file").read_bytes() == data
    assert cache_of(store)["miss_count"] == 0


def test_two_stores_share_a_folder_and_one_is_killed(make_store: Callable[..., MountedStore], tmp_path: Path) -> None:
    """The same bytes in both, and a bound that both together reach."""
    shared = tmp_path / "shared"
    stores = [make_store(), make_store()]
    names = [f"file{number}" for number in range(12)]
    files = {name: os.urandom(3 * MIB) for name in names}
    for store in stores:
        configure(store, dir=json.dumps(str(shared)), max_bytes=24 * MIB, same_disk="true", seed="false")
        store.mount()
        publish(store, files)
    one, other = stores
    for name in names[:4]:
        assert (one.package("lib/1") / name).read_bytes() == files[name]
    wait_kept(one)
    for name in names[:4]:
        assert (other.package("lib/1") / name).read_bytes() == files[name]
    assert cache_of(other)["miss_count"] == 0
    for number, name in enumerate(names):
        if number == 8:
            one.kill(signal.SIGKILL)
        for store in stores if number < 8 else [other]:
            assert (store.package("lib/1") / name).read_bytes() == files[name]
        assert sum(path.stat().st_blocks * 512 for path in cached_files(shared)) <= 24 * MIB
    wait_kept(other)
    one.mount()
    for name in names:
        assert (one.package("lib/1") / name).read_bytes() == files[name]
    for store in stores:
        assert cache_of(store)["bad_count"] == 0
        assert cache_of(store)["max_bytes"] == 24 * MIB


def test_a_mount_does_without_a_folder_that_cannot_be_used(make_cached: Callable[..., MountedStore]) -> None:
    store = make_cached()
    package = publish(store, {"file": b"bytes"})
    store.umount()
    shutil.rmtree(store.root / "cache")
    (store.root / "cache").write_text("not a folder")
    store.mount()
    assert (package / "file").read_bytes() == b"bytes"
    assert store.status()["cache"] is None
    assert store.log().count("this mount has no disk cache") == 1
    health = json.loads((store.mnt / ".castore/health.json").read_text())
    assert health["status"] == "warn"
    assert "this mount has no disk cache" in health["checks"]["service:notices"][0]["output"]


def test_no_bytes_at_most_is_no_cache(make_cached: Callable[..., MountedStore]) -> None:
    store = make_cached(max_bytes=0)
    package = publish(store, {"file": b"bytes"})
    assert (package / "file").read_bytes() == b"bytes"
    assert store.status()["cache"] is None
    assert not (store.root / "cache").exists()


def test_a_local_backend_on_the_same_disk_is_not_copied(make_store: Callable[..., MountedStore]) -> None:
    store = make_store()
    store.mount()
    package = publish(store, {"file": os.urandom(MIB)})
    (package / "file").read_bytes()
    wait_kept(store)
    assert cached_files(store.root / "cache") == []


def test_a_cleared_cache_is_filled_again(make_cached: Callable[..., MountedStore]) -> None:
    store = make_cached()
    data = os.urandom(2 * MIB)
    package = publish(store, {"file": data})
    assert (package / "file").read_bytes() == data
    wait_kept(store)
    assert store.castore("cache", "clear") == "removed 1 files, 2.0 MiB, and 0 small blobs\n"
    assert cached_files(store.root / "cache") == []
    store.umount()
    store.mount()
    assert (package / "file").read_bytes() == data
    wait_kept(store)
    assert len(cached_files(store.root / "cache")) == 1


def test_damage_in_cache_and_backend_is_an_error(make_cached: Callable[..., MountedStore]) -> None:
    store = make_cached()
    package = publish(store, {"file": os.urandom(100_000)})
    (package / "file").read_bytes()
    store.umount()
    objects = [path for path in (store.objects / "sha256").rglob("*") if path.is_file()]
    for path in [*cached_files(store.root / "cache"), *objects]:
        with path.open("r+b") as stream:
            stream.write(b"damage")
    store.mount()
    with fails(errno.EIO):
        (package / "file").read_bytes()
    assert cache_of(store)["bad_count"] >= 1
    assert store.status()["failed_location_count"] == 1
