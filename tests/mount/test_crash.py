"""`kill -9` of the daemon, then a restart over the dead mount: what must still be there. In rounds, and one by one."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
import trio

from castore.catalog.reader import CatalogReader
from castore.catalog.workspace import Publishing, WorkspaceStore
from castore.catalog.writer import CatalogWriter
from castore.digest import MANIFEST_ALGORITHM, Digest
from castore.storage.backends.local import LocalBackend
from castore.storage.source import BytesSource
from tests.mount.crash_round import CrashRounds, rows
from tests.mount.daemons import descriptor
from tests.mount.store import WAIT_SECONDS, MountedStore, wait_until

ROUNDS = 6


@pytest.mark.parametrize("seed", [1, 2])
def test_rounds_of_kills(make_store: Callable[..., MountedStore], seed: int) -> None:
    store = make_store()
    store.mount()
    rounds = CrashRounds(store, seed)
    for _ in range(ROUNDS // 2):
        rounds.run()
    rounds.check_all()


def kill_and_mount(store: MountedStore) -> None:
    store.kill()
    store.mount()


def staged_names(store: MountedStore) -> set[str]:
    return {path.name for path in (store.state / "staging/data").iterdir()}


def test_closed_while_still_being_hashed(store: MountedStore) -> None:
    box = store.ingest("big/1")
    (box / "occupies the hashing").touch()
    os.truncate(box / "occupies the hashing", 64 << 30)
    data = os.urandom(5_000_000)
    with open(box / "big", "wb") as file:
        file.seek(1_000_000)
        file.write(data[1_000_000:])
        file.seek(0)
        file.write(data[:1_000_000])
    status = (box / "big").stat()
    assert store.state_of(box / "big") == "receiving"
    (box / "occupies the hashing").unlink()
    kill_and_mount(store)
    assert (box / "big").stat().st_mtime_ns == status.st_mtime_ns
    package = store.publish("big/1")
    assert (package / "big").stat().st_mtime_ns == status.st_mtime_ns
    assert (package / "big").read_bytes() == data


def test_written_but_not_closed_is_kept_as_far_as_it_came(store: MountedStore) -> None:
    box = store.ingest("open/1")
    with descriptor(box / "a") as file:
        os.write(file, b"12345")
        kill_and_mount(store)
    assert (box / "a").read_bytes() == b"12345"
    assert (store.publish("open/1") / "a").read_bytes() == b"12345"


def test_mapped_and_synced_is_kept(store: MountedStore) -> None:
    path = store.ingest("map/1") / "a"
    path.write_bytes(bytes(8192))
    with descriptor(path) as file, mmap.mmap(file, 8192) as mapping:
        mapping[4096:4101] = b"hello"
        mapping.flush()
        kill_and_mount(store)
    assert path.read_bytes()[4096:4101] == b"hello"


def test_unlinked_but_open_leaves_nothing(store: MountedStore) -> None:
    box = store.ingest("gone/1")
    with descriptor(box / "a") as unlinked, descriptor(box / "b") as replaced:
        os.write(unlinked, bytes(100_000))
        os.write(replaced, bytes(50_000))
        (box / "a").unlink()
        (box / "c").write_bytes(b"new")
        (box / "c").rename(box / "b")
        assert len(staged_names(store)) == 3
        kill_and_mount(store)
    assert sorted(path.name for path in box.iterdir()) == ["b"]
    assert staged_names(store) == {f"{(box / 'b').stat().st_ino:x}"}
    assert store.status()["staged_bytes"] == 3


def test_uploads_resume(store: MountedStore) -> None:
    box = store.ingest("up/1")
    objects = store.objects.rename(store.root / "elsewhere")
    for number in range(20):
        (box / f"{number}").write_bytes(os.urandom(1000))
    wait_until(lambda: store.state_of(box / "7").startswith("failed"), "puts fail without their backend")
    store.kill()
    objects.rename(store.objects)
    store.mount()
    wait_until(lambda: store.status()["queue"]["stored"]["file_count"] == 20, "all are stored without being asked for")


def test_inode_numbers_are_not_given_again(store: MountedStore) -> None:
    box = store.ingest("inode/1")
    (box / "a").write_text("a")
    (box / "b").write_text("b")
    kept, gone = (box / "a").stat().st_ino, (box / "b").stat().st_ino
    (box / "b").unlink()
    kill_and_mount(store)
    assert (box / "a").stat().st_ino == kept
    (box / "c").write_text("c")
    assert (box / "c").stat().st_ino not in (kept, gone)


def test_leftovers_of_dead_processes_go(make_store: Callable[..., MountedStore]) -> None:
    store = make_store('sweep_after = "0s"')
    store.mount()
    package = store.ingest("left/1")
    (package / "a").write_text("a")
    store.publish("left/1")
    store.kill()
    (store.state / "staging/data/fff").write_text("nobody's")
    (store.state / "staging/data/not a number").write_text("nobody's")
    (store.state / "staging/manifests/fff").write_text("nobody's")
    half_put = next(path for path in store.objects.glob("sha256/*/*")) / ".castore-put-0123456789abcdef"
    half_put.write_text("half")
    os.utime(half_put, (time.time() - 7200,) * 2)
    with closing(CatalogWriter(store.state / "catalog.db")) as catalog:
        intended = [(Digest.of(b"never came"), "local")]
        catalog.run_sync(lambda transaction: transaction.add_intents(intended, owner="a process that is gone"))
    store.mount()
    assert staged_names(store) == set()
    wait_until(lambda: not half_put.exists(), "the half put is swept")
    wait_until(lambda: not list((store.state / "staging/manifests").iterdir()), "no manifest is left")
    assert rows(store.state / "catalog.db", "SELECT * FROM put_intents") == []


@pytest.mark.parametrize("ended_by", ["mount", "umount --force"])
def test_killed_while_the_kernel_is_told(make_store: Callable[..., MountedStore], ended_by: str) -> None:
    """A thread in the kernel waits there for a rename that nobody will answer: it keeps the daemon from its end.

    The rename holds ingest/told, and a version of it that a command published has to be forgotten there.
    """
    store = make_store('publish_wait = "30s"')
    store.mount()
    waits, told = store.ingest("told/1"), store.ingest("told/2")
    (told / "a").write_text("a")
    answers: list[int | None] = []

    def publish() -> None:
        try:
            waits.rename(store.package("told/1"))
        except OSError as exc:
            answers.append(exc.errno)

    # A process of its own has the file open: closing its copy, a child of this one would wait for the daemon, too.
    script = f"import os; n = os.open({str(waits / 'b')!r}, os.O_WRONLY | os.O_CREAT); os.write(n, b'b'); "
    script += "os.close(os.dup(n)); print(flush=True); input()"  # written and closed, and not yet released
    with subprocess.Popen([sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, stderr=DEVNULL) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"\n"
        renaming = threading.Thread(target=publish)
        renaming.start()
        wait_until(lambda: "request_wait_answer" in where_it_waits(os.getpid()), "the publish waits")
        arguments = ["castore.cli", "--config", str(store.config), "package", "publish", "told/2"]
        command = subprocess.Popen([sys.executable, "-m", *arguments], stderr=DEVNULL)
        pid = store.pid
        wait_until(lambda: "fuse_reverse_inval_entry" in where_it_waits(pid), "the kernel is told, and waits")
        os.kill(pid, signal.SIGKILL)
        store.pid = 0
        command.kill()
        command.wait()
        if ended_by == "mount":
            store.mount()
        else:
            store.castore("umount", "--force", str(store.mnt))
        renaming.join(WAIT_SECONDS)
        assert not renaming.is_alive()
        holder.kill()
    if ended_by != "mount":
        store.mount()
    assert answers == [errno.ECONNABORTED]
    assert (store.package("told/2") / "a").read_text() == "a"
    assert (store.ingest("told/1") / "b").read_text() == "b"


def where_it_waits(pid: int) -> set[str]:
    """What the kernel does for each thread of a process."""
    return {path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/wchan")}


def stop_in_publish(store: MountedStore, ref: str) -> tuple[int, Path]:
    """A version, stored, whose daemon is killed; its inode, and a copy of the staging folder as of then."""
    box = store.ingest(ref)
    (box / "a").write_text("a")
    store.wait_stored(box / "a")
    inode = box.stat().st_ino
    store.kill()
    return inode, Path(shutil.copytree(store.state / "staging", store.root / "staging copy"))


def note_publish(store: MountedStore, inode: int, ref: str, manifest: Digest) -> None:
    name, version = ref.split("/")
    with closing(WorkspaceStore(store.state / "staging/workspace.db")) as workspace:
        workspace.begin_publishing(Publishing(inode, name, version, manifest.raw))


def test_killed_before_the_transaction(store: MountedStore) -> None:
    """The manifest is put, the package is not there: the version is whole in ingest/, and the manifest goes."""
    inode, _ = stop_in_publish(store, "half/1")
    manifest = Digest.of(b"a manifest", MANIFEST_ALGORITHM)
    trio.run(LocalBackend("local", store.objects).put, manifest, BytesSource(b"a manifest"))
    (store.state / f"staging/manifests/{inode:x}").write_bytes(b"a manifest")
    note_publish(store, inode, "half/1", manifest)
    store.mount()
    assert not store.package("half/1").exists()
    assert (store.ingest("half/1") / "a").read_text() == "a"
    wait_until(lambda: not list((store.objects / "manifest-sha256").rglob("?" * 64)), "the manifest is deleted")
    wait_until(lambda: not list((store.state / "staging/manifests").iterdir()), "its file is deleted")
    assert (store.publish("half/1") / "a").read_text() == "a"


def test_killed_after_the_transaction(store: MountedStore) -> None:
    """The package is there, the version is not yet forgotten: it goes from ingest/, and the package is whole."""
    inode, copy = stop_in_publish(store, "half/1")
    store.mount()
    store.publish("half/1")
    store.kill()
    with CatalogReader.open(store.state / "catalog.db") as catalog:
        package = catalog.package("half", "1")
        assert package is not None
    shutil.rmtree(store.state / "staging")
    copy.rename(store.state / "staging")
    note_publish(store, inode, "half/1", package.manifest_digest)
    store.mount()
    assert list((store.mnt / "ingest/half").iterdir()) == []
    assert (store.package("half/1") / "a").read_text() == "a"
    assert staged_names(store) == set()
    assert rows(store.state / "staging/workspace.db", "SELECT * FROM publishing") == []
    assert len(list((store.objects / "manifest-sha256").rglob("?" * 64))) == 1
