"""Publish by rename, on a real mount: what it keeps, what it refuses and why. Not what packages are afterwards."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from castore.digest import MANIFEST_ALGORITHM
from castore.registry.manifest import read_manifest
from tests.mount.crash_round import rows
from tests.mount.store import MountedStore, fails, run_tool, wait_until
from tests.mount.trees import assert_same, make_tree, sha256, snapshot


def _error(path: Path) -> str:
    return os.getxattr(path, "user.castore.error").decode()


def test_a_name_answers_before_it_is_listed(shared_store: MountedStore) -> None:
    packages = shared_store.mnt / "packages"
    # Asked for too early, and answered: no such directory.
    assert not (packages / "early").exists()
    box = shared_store.ingest("early/1")
    assert (packages / "early").is_dir()
    assert "early" not in os.listdir(packages)
    assert os.listdir(packages / "early") == []
    inode = (packages / "early").stat().st_ino
    run_tool("mv", box, f"{packages}/early/")
    assert "early" in os.listdir(packages)
    assert (packages / "early").stat().st_ino == inode
    assert sorted(os.listdir(packages / "early")) == ["1", "latest"]


def test_an_empty_name_goes_again(shared_store: MountedStore) -> None:
    ingest, packages = shared_store.mnt / "ingest", shared_store.mnt / "packages"
    (ingest / "fleeting").mkdir()
    assert (packages / "fleeting").is_dir()
    (ingest / "fleeting").rename(ingest / "renamed")
    wait_until(lambda: not (packages / "fleeting").exists(), "the old name is gone", 3.0)
    assert (packages / "renamed").is_dir()
    (ingest / "renamed").rmdir()
    wait_until(lambda: not (packages / "renamed").exists(), "the name is gone", 3.0)
    kept = rows(shared_store.state / "staging/workspace.db", "SELECT name FROM names")
    assert not {("fleeting",), ("renamed",)} & set(kept)


def test_a_version_inside_another_one_has_no_labels(shared_store: MountedStore) -> None:
    """A rebuild from a backend refuses them there, and with them all of the package."""
    box = shared_store.ingest("nested/1")
    for name in ("user.castore.producer", "user.castore.retention_class", "user.kept"):
        os.setxattr(box, name, b"label")
    inside = shared_store.ingest("nested/2") / "inside"
    box.rename(inside)
    assert os.listxattr(inside) == ["user.kept"]
    _, entries = read_manifest(_manifest(shared_store, shared_store.publish("nested/2")))
    assert [(entry.path, entry.attributes) for entry in entries][1:] == [(b"inside", {b"user.kept": b"label"})]


def test_a_manifest_that_takes_long_to_write_is_put(make_store: Callable[..., MountedStore]) -> None:
    store = make_store('publish_wait = "10ms"')
    store.mount()
    box = store.ingest("long/1")
    (box / "SHA256SUMS").write_bytes(b"#\n" * 6_000_000)
    store.wait_stored(box / "SHA256SUMS")
    box.rename(store.package("long/1"))


def test_latest_is_the_version_published_last(shared_store: MountedStore) -> None:
    latest = shared_store.package("newest/latest")
    for version in ("1.10", "1.9", "0.1", "2.0-rc1"):
        (shared_store.ingest(f"newest/{version}") / "which").write_text(version)
        shared_store.publish(f"newest/{version}")
        wait_until(lambda version=version: os.readlink(latest) == version, "latest follows", 3.0)  # type: ignore[misc]
        assert (latest / "which").read_text() == version
    assert sorted(os.listdir(latest.parent)) == ["0.1", "1.10", "1.9", "2.0-rc1", "latest"]
    assert latest.lstat().st_size == len("2.0-rc1")


def test_the_name_keeps_owner_and_mode(shared_store: MountedStore) -> None:
    top = shared_store.ingest("kept/1").parent
    os.chown(top, 1234, 5678)
    top.chmod(0o2751)
    shared_store.publish("kept/1")
    os.chown(top, 0, 0)
    top.chmod(0o700)
    shared_store.ingest("kept/2")
    shared_store.publish("kept/2")
    status = (shared_store.mnt / "packages/kept").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 5678, 0o751)


def test_inode_numbers_are_kept(store: MountedStore, tmp_path: Path) -> None:
    make_tree(tmp_path / "source")
    box = store.ingest("numbers/1")
    run_tool("cp", "-a", f"{tmp_path}/source/.", box)

    def numbers(root: Path) -> dict[str, int]:
        return {str(path.relative_to(root)): path.lstat().st_ino for path in [root, *root.rglob("*")]}

    before = numbers(box)
    package = store.publish("numbers/1")
    assert numbers(package) == before
    top = package.parent.stat().st_ino, package.with_name("latest").lstat().st_ino
    store.umount()
    store.mount()
    assert numbers(package) == before
    assert (package.parent.stat().st_ino, package.with_name("latest").lstat().st_ino) == top
    assert len(set(before.values())) == len(before) - 3  # three further hard links


def test_what_is_open_survives(shared_store: MountedStore, tmp_path: Path) -> None:
    make_tree(tmp_path / "source")
    box = shared_store.ingest("open/1")
    run_tool("cp", "-a", f"{tmp_path}/source/.", box)
    content = (box / "share/3000000").read_bytes()
    file = (box / "share/3000000").open("rb")
    assert file.read(1000) == content[:1000]
    fresh = (box / "share/1048577").open("rb")
    folder = os.open(box / "lib", os.O_RDONLY | os.O_DIRECTORY)
    listing = os.scandir(box / "lib")
    first = next(listing).name
    child = subprocess.Popen(
        ["sh", "-c", "read line; env pwd -P && cat ../bin/tool && ls && cd -P deep && ls er"],
        cwd=box / "lib",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    package = shared_store.publish("open/1")
    assert file.read() == content[1000:]
    assert fresh.read() == (tmp_path / "source/share/1048577").read_bytes()
    assert os.fstat(file.fileno()).st_ino == (package / "share/3000000").stat().st_ino
    names = set(os.listdir(tmp_path / "source/lib"))
    assert set(os.listdir(folder)) == names
    assert sorted([first, *(entry.name for entry in listing)]) == sorted(names)
    again = os.open("deep/tool", os.O_RDONLY, dir_fd=folder)
    assert os.read(again, 9) == b"#!/bin/sh"
    with fails(errno.EROFS):
        os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=folder)
    output, _ = child.communicate("go\n")
    assert child.returncode == 0
    assert output.splitlines()[0] == os.path.realpath(package / "lib")
    for descriptor in (folder, again):
        os.close(descriptor)
    for stream in (file, fresh):
        stream.close()
    listing.close()


def test_an_unlinked_file_is_read_on(shared_store: MountedStore) -> None:
    box = shared_store.ingest("orphaned/1")
    (box / "temporary").write_bytes(b"t" * 300_000)
    (box / "stays").write_text("s")
    with (box / "temporary").open("rb") as file:
        (box / "temporary").unlink()
        package = shared_store.publish("orphaned/1")
        assert os.listdir(package) == ["stays"]
        assert file.read() == b"t" * 300_000
        assert os.fstat(file.fileno()).st_size == 300_000
    shown = shared_store.castore("package", "show", "orphaned/1", "--json")
    assert '"file_count": 1' in shown
    assert '"size_bytes": 1' in shown


def _manifest(store: MountedStore, package: Path) -> Path:
    """Where the object of a package's manifest lies."""
    algorithm, _, hexa = os.getxattr(package, "user.castore.digest").decode().partition(":")
    assert algorithm == MANIFEST_ALGORITHM
    return store.objects / MANIFEST_ALGORITHM / hexa[:2] / hexa[2:4] / hexa


def test_the_published_tree_is_the_manifest(shared_store: MountedStore, tmp_path: Path) -> None:
    make_tree(tmp_path / "source", attributes=True)
    box = shared_store.ingest("written/1")
    run_tool("cp", "-a", f"{tmp_path}/source/.", box)
    os.setxattr(box, "user.castore.producer", b"tester")
    began = time.time_ns()
    package = shared_store.publish("written/1")
    path = _manifest(shared_store, package)
    assert sha256(path) == path.name
    header, entries = read_manifest(path)
    assert (header.name, header.version, header.producer) == ("written", "1", "tester")
    assert began <= header.published_at_ns <= time.time_ns()
    items = snapshot(package)
    seen = set()
    for entry in entries:
        name = entry.path or b"."
        item = items[name]
        seen.add(name)
        if entry.link_to is not None:
            assert entry.link_to in seen
            assert entry.link_to in item.links
            continue
        assert (entry.mode, entry.uid, entry.gid, entry.mtime_ns) == (
            item.mode & 0o7777,
            item.uid,
            item.gid,
            item.mtime_ns,
        )
        own = {os.fsencode(key): value for key, value in item.attributes}
        declared = {b"user.castore.producer": b"tester"} if name == b"." else {}
        assert entry.attributes == own | declared
        if entry.blob is not None:
            assert (entry.blob.digest.hex, entry.blob.size_bytes) == (item.content, item.size_bytes)
            hexa = entry.blob.digest.hex
            assert sha256(shared_store.objects / "sha256" / hexa[:2] / hexa[2:4] / hexa) == hexa
        else:
            assert repr(entry.target) == item.content or not entry.target
    assert seen == set(items)


def test_publish_over_a_version(shared_store: MountedStore) -> None:
    (shared_store.ingest("twice/1") / "file").write_text("first")
    package = shared_store.publish("twice/1")
    box = shared_store.ingest("twice/1")
    (box / "file").write_text("second")
    before = snapshot(box)
    with fails(errno.EEXIST):
        box.rename(package)
    assert "published already" in _error(box)
    done = subprocess.run(["mv", "-T", box, package], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File exists" in done.stderr
    again = shared_store.run("package", "publish", "twice/1")
    assert again.returncode == 2
    assert "published already" in again.stderr
    assert_same(box, before)
    assert (package / "file").read_text() == "first"


def test_a_file_open_for_writing(make_store: Callable[..., MountedStore]) -> None:
    store = make_store('publish_wait = "60s"')
    store.mount()
    box = store.ingest("busy/1")
    with (box / "file").open("w") as file:
        file.write("half")
        file.flush()
        began = time.monotonic()
        with fails(errno.EBUSY):
            box.rename(store.package("busy/1"))
        assert time.monotonic() - began < 30, "it waited"
        assert _error(box) == "a file is open for writing"
        file.write(" and whole")
    package = store.publish("busy/1")
    assert (package / "file").read_text() == "half and whole"


def test_what_is_not_stored_in_time(make_store: Callable[..., MountedStore]) -> None:
    store = make_store('publish_wait = "200ms"')
    store.mount()
    box = store.ingest("slow/1")
    (box / "file").write_text("x")
    store.wait_stored(box / "file")
    aside = store.objects.with_name("objects.away")
    store.objects.rename(aside)  # the backend cannot be reached
    (box / "more").write_bytes(b"m" * 100_000)
    with fails(errno.EBUSY):
        box.rename(store.package("slow/1"))
    assert "1 of 2 files (100000 bytes) are not stored yet" in _error(box)
    assert not store.package("slow/1").exists()
    assert (box / "more").exists()
    aside.rename(store.objects)
    package = store.publish("slow/1")
    assert (package / "more").read_bytes() == b"m" * 100_000


@pytest.mark.parametrize("listing", ["SHA256SUMS", "manifest-sha256.txt"])
def test_sums_are_checked(shared_store: MountedStore, listing: str) -> None:
    name = f"sums-{listing[0].lower()}"
    box = shared_store.ingest(f"{name}/1")
    (box / "data").mkdir()
    (box / "data/a").write_text("a")
    (box / "data/b").write_text("b")
    digests = {file: sha256(box / "data" / file) for file in "ab"}
    (box / listing).write_text(f"{digests['a']}  data/a\n{digests['a']}  data/b\n")
    target = shared_store.package(f"{name}/1")
    shared_store.wait_stored(box / listing)
    with fails(errno.EBADMSG):
        box.rename(target)
    assert _error(box) == f"{listing} line 2: 'data/b' has other bytes than listed"
    (box / listing).write_text(f"{digests['a']}  data/a\n{digests['b']}  data/c\n")
    with fails(errno.EBADMSG):
        box.rename(target)
    assert "there is no file 'data/c'" in _error(box)
    assert (box / "data/b").read_text() == "b"
    assert not target.exists()
    (box / listing).write_text(f"{digests['a']}  data/a\n{digests['b']}  data/b\n")
    assert (shared_store.publish(f"{name}/1") / "data/b").read_text() == "b"


def test_where_publish_does_not_go(shared_store: MountedStore) -> None:
    box = shared_store.ingest("astray/1")
    (box / "dir").mkdir()
    (box / "file").write_text("x")
    shared_store.ingest("other/1")
    shared_store.publish("other/1")
    packages = shared_store.mnt / "packages"
    with fails(errno.EINVAL):
        box.rename(packages / "other/2")  # a version of another NAME
    with fails(errno.EINVAL):
        (box / "dir").rename(packages / "astray/2")  # not a VERSION
    with fails(errno.EINVAL):
        (box / "file").rename(packages / "astray/2")
    for target in (packages / "astray2", packages / "other/1/x", shared_store.mnt / "astray"):
        for source in (box, box.parent, box / "file"):
            with fails(errno.EROFS):
                source.rename(target)
    for source in (packages / "other/1", packages / "other"):
        with fails(errno.EROFS):
            source.rename(box / "back")
    with fails(errno.EROFS):
        box.rename(shared_store.mnt / "by-digest/sha256/x")
    # Under another VERSION it may be published.
    box.rename(packages / "astray/2")
    assert (packages / "astray/2/file").read_text() == "x"


def test_tried_over_and_over_while_the_backend_is_away(store: MountedStore) -> None:
    """Some lines in the log and one manifest that may have to be removed, however often it is tried."""
    stored = store.ingest("away/1")
    (stored / "a").write_bytes(b"stored before")
    store.wait_stored(stored / "a")
    objects = store.objects.rename(store.root / "elsewhere")
    waits = store.ingest("away/2")
    for number in range(20):
        (waits / f"{number}").write_bytes(b"%d" % number)
    wait_until(lambda: "is left alone" in store.log(), "the backend is left alone")
    for _ in range(20):
        for box in (stored, waits):
            with fails(errno.EBUSY):
                box.rename(store.package(f"away/{box.name}"))
    lines = [line for line in store.log().splitlines() if "WARNING" in line]
    assert len(lines) < 10, lines
    assert len(rows(store.state / "staging/workspace.db", "SELECT * FROM publishing")) <= 1
    objects.rename(store.objects)
    for box in (stored, waits):
        store.publish(f"away/{box.name}")
    assert len(list(store.objects.glob("manifest-sha256/*/*/*"))) == 2
    assert rows(store.state / "staging/workspace.db", "SELECT * FROM publishing") == []
