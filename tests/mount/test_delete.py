"""Deleting beside a mount: what it shows, what open files read, and that garbage collection takes nothing it needs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO

from castore.catalog.connection import open_writer
from castore.digest import Digest
from castore.failpoint import VARIABLE
from castore.mountinfo import mount_at
from tests.mount.gc_rounds import Rounds, run_rounds
from tests.mount.store import MountedStore, fails, wait_until

LARGE = os.urandom(3_000_000)
NOW = ("storage", "gc", "--json", "--delete", "--grace", "0s")


def publish(store: MountedStore, ref: str, files: dict[str, bytes]) -> Path:
    box = store.ingest(ref)
    for name, data in files.items():
        (box / name).write_bytes(data)
    return store.publish(ref)


def drop_pages(file: IO[bytes]) -> None:
    """What is read next is asked of the daemon."""
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def gone(path: Path) -> bool:
    return path.name not in os.listdir(path.parent) and not os.path.lexists(path)


def objects(store: MountedStore) -> set[str]:
    return {path.name for path in store.objects.rglob("*") if path.is_file() and len(path.name) == 64}


def execute(store: MountedStore, sql: str, *parameters: object) -> list[object]:
    database = open_writer(store.state / "catalog.db").conn
    try:
        return list(database.execute(sql, parameters).fetchall())
    finally:
        database.close()


def test_a_deleted_package_is_hidden_and_can_be_had_back(store: MountedStore) -> None:
    first = publish(store, "demo/1", {"large": LARGE, "small": b"1"})
    second = publish(store, "demo/2", {"small": b"2"})
    assert os.readlink(store.mnt / "packages/demo/latest") == "2"
    store.castore("package", "delete", "demo/2", "--yes")
    wait_until(lambda: gone(second), "demo/2 is hidden", 10)
    wait_until(lambda: os.readlink(store.mnt / "packages/demo/latest") == "1", "latest moves", 10)
    assert "demo/2" not in store.castore("package", "list")
    assert "demo/2" in store.castore("package", "deleted")
    assert "no such package" in store.run("package", "delete", "demo/2", "--yes").stderr
    assert store.run("package", "delete", "demo/1", stdin=subprocess.DEVNULL).returncode == 2  # nobody to ask

    with (first / "large").open("rb") as file:
        store.castore("package", "delete", "demo/1", "--yes")
        wait_until(lambda: gone(first), "demo/1 is hidden", 10)
        wait_until(lambda: "demo" not in os.listdir(store.mnt / "packages"), "packages/demo is not listed", 10)
        drop_pages(file)
        assert file.read() == LARGE
    assert json.loads(store.run(*NOW).stdout)["expired_packages"] != []
    assert store.run("package", "restore", "demo/2").returncode == 2

    third = publish(store, "demo/3", {"small": b"3"})
    store.castore("package", "delete", "demo/3", "--yes")
    store.castore("package", "restore", "demo/3")
    wait_until(lambda: third.exists(), "demo/3 is there again", 10)
    assert (third / "small").read_bytes() == b"3"
    assert os.readlink(store.mnt / "packages/demo/latest") == "3"


def test_restored_as_it_was(store: MountedStore) -> None:
    package = publish(store, "demo/1", {"small": b"1"})
    status = (package / "small").lstat()
    store.castore("package", "delete", "demo/1", "--yes")
    wait_until(lambda: gone(package), "demo/1 is hidden", 10)
    again = publish(store, "demo/1", {"other": b"other"})
    assert "is published" in store.run("package", "restore", "demo/1").stderr
    store.castore("package", "delete", "demo/1", "--yes")
    store.castore("storage", "gc", "--delete")
    store.castore("package", "restore", "demo/1")  # the one that was deleted last
    wait_until(lambda: again.exists(), "demo/1 is there again", 10)
    assert os.listdir(again) == ["other"]
    store.castore("package", "delete", "demo/1", "--yes")
    assert execute(store, "DELETE FROM deleted_packages WHERE file_count = 1 AND deletion_id > 1") == []
    store.castore("package", "restore", "demo/1")
    wait_until(lambda: os.path.exists(package / "small"), "the first one is there again", 10)
    assert (package / "small").lstat() == status
    assert (package / "small").read_bytes() == b"1"


def test_what_is_open_or_staged_stays(store: MountedStore) -> None:
    package = publish(store, "demo/1", {"large": LARGE, "other": b"other"})
    staged = store.ingest("demo/2") / "file"
    staged.write_bytes(b"staged, stored and not published")
    store.wait_stored(staged)
    large = Digest.of(LARGE).hex
    with (package / "large").open("rb") as file:
        file.read(1)
        store.castore("package", "delete", "demo/1", "--yes")
        found = json.loads(store.castore(*NOW))["backends"][0]
        assert found["in_use_count"] == 1
        assert large in objects(store)
        assert Digest.of(b"other").hex not in objects(store)
        drop_pages(file)
        assert file.read() == LARGE[1:]
    wait_until(lambda: json.loads(store.castore(*NOW))["backends"][0]["in_use_count"] == 0, "it is closed")
    assert objects(store) == {Digest.of(b"staged, stored and not published").hex}
    # Nothing has to be stored anew.
    (store.mnt / "ingest/demo/2").rename(store.package("demo/2"))
    assert (store.package("demo/2") / "file").read_bytes() == b"staged, stored and not published"


def test_a_put_waits_for_the_end_of_a_deletion(store: MountedStore) -> None:
    """While a collection lives that marked the object; then, when it is dead, the put ends the deletion itself.

    One that lives long is not waited for any more: the put fails for now, and is tried again.
    """
    data = b"deleted and put again"
    digest = Digest.of(data)
    publish(store, "demo/1", {"file": data})
    store.castore("package", "delete", "demo/1", "--yes")
    turn = os.open(store.state / "run/gc.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(turn, fcntl.LOCK_EX)
    execute(store, "DELETE FROM entries WHERE blob_id <> 0")
    its_blob = "(SELECT blob_id FROM blobs WHERE digest = ?)"
    execute(store, f"UPDATE storage_locations SET status = 'deleting' WHERE blob_id = {its_blob}", digest.raw)
    execute(store, "INSERT INTO deletions VALUES ('sha256', ?, 'local', 21, 0, 1)", digest.raw)
    file = store.ingest("demo/2") / "file"
    file.write_bytes(data)
    wait_until(lambda: store.state_of(file) == "uploading", "its put waits")
    with fails(errno.EBUSY):
        (store.mnt / "ingest/demo/2").rename(store.package("demo/2"))
    wait_until(lambda: "is being deleted just now" in store.state_of(file), "it has waited for DELETION_SECONDS")
    (store.objects / f"sha256/{digest.hex[:2]}/{digest.hex[2:4]}/{digest.hex}").unlink()
    os.close(turn)  # that collection dies
    store.wait_stored(file)
    assert execute(store, "SELECT * FROM deletions") == []
    package = store.publish("demo/2")
    assert (package / "file").read_bytes() == data
    assert digest.hex in objects(store)


def test_a_put_that_dies_in_the_place_of_a_deletion(make_store: Callable[..., MountedStore]) -> None:
    """The object is there all the time: an older catalog has marks of what newer packages need."""
    store = make_store()
    data = b"marked in an older catalog"
    digest = Digest.of(data)
    stored = store.objects / f"sha256/{digest.hex[:2]}/{digest.hex[2:4]}/{digest.hex}"
    os.environ[VARIABLE] = "deletion.taken_over"
    try:
        store.mount()
    finally:
        del os.environ[VARIABLE]
    publish(store, "demo/1", {"file": data})
    its_blob = "(SELECT blob_id FROM blobs WHERE digest = ?)"
    execute(store, f"UPDATE storage_locations SET status = 'deleting' WHERE blob_id = {its_blob}", digest.raw)
    execute(store, "INSERT INTO deletions VALUES ('sha256', ?, 'local', ?, 0, 1)", digest.raw, len(data))
    with (store.ingest("demo/2") / "file").open("wb") as file:
        file.write(data)
    wait_until(lambda: not Path(f"/proc/{store.pid}").exists(), "the daemon has ended")
    store.pid = 0
    assert stored.read_bytes() == data
    assert execute(store, "SELECT * FROM deletions") == []
    assert execute(store, "SELECT digest FROM put_intents") == [(digest.raw,)]
    store.mount()
    assert (store.publish("demo/2") / "file").read_bytes() == data
    wait_until(lambda: execute(store, "SELECT * FROM put_intents") == [], "no intent is left")
    assert stored.read_bytes() == data


def test_deleted_by_another_process_on_a_read_only_mount(store: MountedStore, tmp_path: Path) -> None:
    package = publish(store, "demo/1", {"file": b"file"})
    other = tmp_path / "ro"
    other.mkdir()
    store.castore("mount", str(other), "--background", "-o", "ro")
    try:
        assert (other / "packages/demo/1/file").read_bytes() == b"file"
        store.castore("package", "delete", "demo/1", "--yes")
        wait_until(lambda: gone(other / "packages/demo"), "it is hidden there, too", 10)
        wait_until(lambda: gone(package), "demo/1 is hidden", 10)
    finally:
        store.castore("umount", str(other))
    assert mount_at(other) is None


def test_a_working_directory_inside(store: MountedStore) -> None:
    package = publish(store, "demo/1", {"file": b"file"})
    inside = os.open(package, os.O_RDONLY | os.O_DIRECTORY)
    try:
        store.castore("package", "delete", "demo/1", "--yes")
        wait_until(lambda: gone(package), "demo/1 is hidden", 10)
        assert os.listdir(inside) == ["file"]
        with open(os.open("file", os.O_RDONLY, dir_fd=inside), "rb") as file:
            assert file.read() == b"file"
    finally:
        os.close(inside)


def test_beside_ingest_publish_and_delete(store: MountedStore) -> None:
    """The long form is scripts/gc-rounds."""

    def enough(rounds: Rounds) -> bool:
        return rounds.published > 10 and rounds.collections > 2 and rounds.deleted_objects > 0

    assert enough(run_rounds(store, seconds=8, seed=1, enough=enough))
