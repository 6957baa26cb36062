"""Names, on a real mount: all that Linux allows below VERSION, and the rule for NAME and VERSION. Not their parsing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.mount.store import MountedStore, fails, run_tool
from tests.mount.syscalls import listed
from tests.mount.trees import assert_same, snapshot

_NAMES = [
    b"a space",
    b" leading and trailing ",
    b"'single' and \"double\"",
    b"new\nline",
    b"tab\t and return\r and bell\a",
    b"back\\slash and $dollar `tick`",
    b"-rf",
    b"--help",
    b"*?[a-z]{x}",
    b"...",
    b"..hidden",
    b".fuse_hidden0001",
    b"latest",
    b"SHA256SUMS.asc",
    "grüße Ελλάδα 日本語 🙂".encode(),
    "é composed".encode(),
    b"e\xcc\x81 decomposed",
    b"not utf-8 \xff\xfe \xc3",
    b"\x01\x7f\x80",
    b"n" * 255,
    "ü".encode() * 127,
    b"%s%n%00",
    b"Case",
    b"case",
]


@pytest.mark.parametrize("folder", [b"", b"x\xff y/"], ids=["root", "below"])
def test_any_name_that_linux_allows(shared_store: MountedStore, tmp_path: Path, folder: bytes) -> None:
    name = f"names{len(folder)}"
    box = os.fsencode(shared_store.ingest(f"{name}/1")) + b"/" + folder
    os.makedirs(box, exist_ok=True)
    for number, one in enumerate(_NAMES):
        with open(os.path.join(box, one), "wb") as file:
            file.write(b"%d" % number)
        os.symlink(one, os.path.join(box, b"l%d" % number))
        os.mkdir(os.path.join(box, b"d%d" % number))
        os.mkdir(os.path.join(box, b"d%d" % number, one))
    run_tool("cp", "-a", shared_store.mnt / f"ingest/{name}/1", tmp_path / "before")
    package = shared_store.publish(f"{name}/1")
    assert_same(package, tmp_path / "before")
    inside = os.fsencode(package) + b"/" + folder
    assert set(_NAMES) <= set(os.listdir(inside))
    for number, one in enumerate(_NAMES):
        assert os.readlink(os.path.join(inside, b"l%d" % number)) == one
        with open(os.path.join(inside, b"l%d" % number), "rb") as file:
            assert file.read() == b"%d" % number
        assert os.listdir(os.path.join(inside, b"d%d" % number)) == [one]


def test_names_survive_a_restart(store: MountedStore, tmp_path: Path) -> None:
    box = os.fsencode(store.ingest("kept/1"))
    os.mkdir(box + b"/published")
    for one in _NAMES:
        with open(os.path.join(box, b"published", one), "wb") as file:
            file.write(one)
    package = store.publish("kept/1")
    run_tool("cp", "-a", package, store.mnt / "ingest/kept/2")
    before, staged = snapshot(package), snapshot(store.mnt / "ingest/kept/2")
    store.umount()
    store.mount()
    assert_same(package, before)
    assert_same(store.mnt / "ingest/kept/2", staged)


def test_a_name_of_256_bytes(shared_store: MountedStore) -> None:
    box = shared_store.ingest("long/1")
    (box / "file").write_text("here")
    name = "n" * 256
    for path in (box / name, shared_store.mnt / "packages" / name, shared_store.mnt / "ingest" / name):
        with fails(errno.ENAMETOOLONG):
            path.stat()
        with fails(errno.ENAMETOOLONG):
            path.mkdir()
    with fails(errno.ENAMETOOLONG):
        (box / "file").rename(box / name)
    with fails(errno.ENAMETOOLONG):
        (box / name).symlink_to("file")
    with fails(errno.ENAMETOOLONG):
        (box / name).hardlink_to(box / "file")
    with fails(errno.ENAMETOOLONG):
        (box / name).write_text("")
    assert os.listdir(box) == ["file"]


def test_empty_files_and_directories(shared_store: MountedStore) -> None:
    box = shared_store.ingest("empty/1")
    (box / "nothing").touch()
    (box / "also nothing").write_bytes(b"")
    (box / "none/none").mkdir(parents=True)
    package = shared_store.publish("empty/1")
    assert (package / "nothing").read_bytes() == b""
    assert (package / "also nothing").stat().st_size == 0
    assert os.listdir(package / "none/none") == []
    assert sorted(os.listdir(package)) == ["also nothing", "none", "nothing"]


def test_an_empty_package(shared_store: MountedStore) -> None:
    shared_store.ingest("hollow/1")
    assert os.listdir(shared_store.publish("hollow/1")) == []
    assert sorted(os.listdir(shared_store.mnt / "packages/hollow")) == ["1", "latest"]


def test_depth_of_50(shared_store: MountedStore, tmp_path: Path) -> None:
    deep = "/".join(f"level{number}" for number in range(50))
    box = shared_store.ingest("deep/1")
    (box / deep).mkdir(parents=True)
    (box / deep / "bottom").write_text("at the bottom")
    run_tool("cp", "-a", box, tmp_path / "before")
    package = shared_store.publish("deep/1")
    assert (package / deep / "bottom").read_text() == "at the bottom"
    assert_same(package, tmp_path / "before")


def test_10000_files_in_a_directory(shared_store: MountedStore) -> None:
    box = shared_store.ingest("many/1")
    names = {f"file {number:05d}" for number in range(10_000)}
    for name in names:
        (box / name).write_text(name[-1])
    assert _listed_once(box) == names
    gone = sorted(names)[::10]
    for name in gone:
        (box / name).unlink()
    names -= set(gone)
    assert _listed_once(box) == names
    package = shared_store.publish("many/1")
    assert _listed_once(package) == names
    assert int(run_tool("sh", "-c", "ls -l | wc -l", cwd=package)) == len(names) + 1
    for name in sorted(names)[::500]:
        assert (package / name).read_text() == name[-1]
    assert len({entry.inode() for entry in os.scandir(package)}) == len(names)


@pytest.mark.parametrize("buffer_bytes", [32, 32768])
def test_a_listing_begins_with_the_directory_and_the_one_above(shared_store: MountedStore, buffer_bytes: int) -> None:
    """As on a disk: there are programs that take a directory with two entries for an empty one."""
    ref = f"dots/{buffer_bytes}"
    box = shared_store.ingest(ref)
    (box / "in").mkdir()
    for letter in "abc":
        (box / "in" / letter).write_text(letter)
    shared_store.ingest(f"dots/{buffer_bytes}-stays")
    package = shared_store.publish(ref)
    mnt = shared_store.mnt
    shared_store.ingest(ref)
    below = [mnt / "ingest" / ref, package / "in", package, mnt / "by-digest/sha256/00", mnt / ".castore"]
    for folder in {parent for path in below for parent in (path, *path.parents) if parent.is_relative_to(mnt)}:
        entries = listed(str(folder), buffer_bytes)
        assert entries[:2] == [(b".", folder.stat().st_ino), (b"..", (folder / "..").stat().st_ino)] or folder == mnt
        assert [name for name, _ in entries[:2]] == [b".", b".."]
        assert sorted(os.fsdecode(name) for name, _ in entries[2:]) == sorted(os.listdir(folder))
        for name, inode in entries[2:]:
            assert inode == os.lstat(folder / os.fsdecode(name)).st_ino
    assert [name for name, _ in listed(str(package / "in"), buffer_bytes)[2:]] == [b"a", b"b", b"c"]


def _listed_once(folder: Path) -> set[str]:
    names = os.listdir(folder)
    assert len(names) == len(set(names)), "a name is listed twice"
    return set(names)


def test_removing_while_listing(shared_store: MountedStore) -> None:
    box = shared_store.ingest("removing/1")
    for number in range(1_000):
        (box / f"{number}").touch()
    seen = []
    with os.scandir(box) as entries:
        for entry in entries:
            seen.append(entry.name)
            os.unlink(entry.path)
    assert len(seen) == len(set(seen)) == 1_000
    assert os.listdir(box) == []
    run_tool("rm", "-r", box)
    assert not box.exists()


def test_long_symbolic_links(shared_store: MountedStore) -> None:
    box = shared_store.ingest("targets/1")
    targets = ["x" * 4095, "/".join(["y" * 200] * 20), "with\nline", "../" * 100 + "up"]
    for number, target in enumerate(targets):
        (box / f"link{number}").symlink_to(target)
    os.symlink(b"bytes \xff\xfe", os.fsencode(box) + b"/bytes")
    with fails(errno.ENAMETOOLONG):
        (box / "too long").symlink_to("x" * 4096)
    package = shared_store.publish("targets/1")
    for number, target in enumerate(targets):
        assert os.readlink(package / f"link{number}") == target
        assert (package / f"link{number}").lstat().st_size == len(target)
    assert os.readlink(os.fsencode(package) + b"/bytes") == b"bytes \xff\xfe"


_GOOD = ["a", "A-b_c.d", "@scope", "1.0+build~rc1:2", "x" * 128, "9", "libstdc++", "name@version"]
_BAD = [".hidden", "-dash", "_under", "with space", "ümlaut", "a%", "x" * 129, "new\nline", "a,b", "~x", "+x"]


def test_the_rule_for_name_and_version(shared_store: MountedStore) -> None:
    ingest = shared_store.mnt / "ingest"
    top = shared_store.ingest("rule/first").parent
    for good in _GOOD:
        (ingest / good).mkdir()
        (top / good).mkdir()
        assert (ingest / good).is_dir()
        assert (top / good).is_dir()
        (ingest / good).rmdir()
    for bad in _BAD:
        for folder in (ingest, top):
            with fails(errno.EINVAL):
                (folder / bad).mkdir()
            assert not (folder / bad).exists()
        with fails(errno.EINVAL):
            (top / "first").rename(top / bad)
        with fails(errno.EINVAL):
            top.rename(ingest / bad)
    assert sorted(os.listdir(top)) == sorted(["first", *_GOOD])


def test_latest_is_reserved(shared_store: MountedStore) -> None:
    top = shared_store.ingest("reserved/1").parent
    with fails(errno.EINVAL):
        (top / "latest").mkdir()
    with fails(errno.EINVAL):
        (top / "1").rename(top / "latest")
    with fails(errno.EINVAL):
        (top / "1").rename(shared_store.package("reserved/latest"))
    # Only as a VERSION: a NAME may be called so, and anything below VERSION.
    (shared_store.ingest("latest/2") / "latest").mkdir()
    assert (shared_store.publish("latest/2") / "latest").is_dir()
    shared_store.publish("reserved/1")
    # Now there is the link, and the kernel itself puts no directory in the place of a link.
    with fails(errno.ENOTDIR):
        shared_store.ingest("reserved/2").rename(shared_store.package("reserved/latest"))
    assert os.readlink(shared_store.package("reserved/latest")) == "1"
