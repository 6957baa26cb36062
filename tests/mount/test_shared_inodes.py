"""Equal large files of several packages are one inode, so one page cache: what that saves, and what stays as it was."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from castore.blobs.siblings import SIBLING_BYTES
from castore.catalog.sharing import SHARED_BYTES
from tests.mount.store import MountedStore, run_tool, wait_until

MTIME_NS = 1_700_000_000_123_456_789


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o644)
    os.utime(path, ns=(MTIME_NS, MTIME_NS))


@pytest.fixture
def data() -> bytes:
    return os.urandom(SHARED_BYTES)


@pytest.fixture
def source(tmp_path: Path, data: bytes) -> Path:
    """A directory with a large file and a small one."""
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder / "large", data)
    write(folder / "small", data[1:])
    return folder


def take(store: MountedStore, source: Path, ref: str) -> Path:
    store.castore("package", "import", str(source), ref)
    return store.package(ref)


def number(path: Path) -> int:
    """The inode number, which a listing gives, too."""
    [listed] = [entry.inode() for entry in os.scandir(path.parent) if entry.name == path.name]
    assert path.stat().st_ino == listed
    return listed


def told(path: Path | int) -> tuple[int, ...]:
    """What `stat` tells but the device, which each mount has anew; the number first."""
    status = os.stat(path)
    owner, times = (status.st_uid, status.st_gid), (status.st_mtime_ns, status.st_ctime_ns, status.st_atime_ns)
    return (status.st_ino, status.st_mode, status.st_nlink, status.st_size, *owner, *times)


def reads(store: MountedStore) -> int:
    """How many reads the daemon was asked for since its start."""
    return int(store.status()["reads"]["reads"])


def test_the_second_package_is_read_from_the_page_cache(shared_store: MountedStore, source: Path, data: bytes) -> None:
    first, second = (take(shared_store, source, f"cached/{version}") for version in "12")
    assert told(first / "large") == told(second / "large")
    assert number(first / "large") == number(second / "large")
    assert number(first / "small") != number(second / "small"), "there it does not pay"
    assert SHARED_BYTES > SIBLING_BYTES, "or siblings of the first would be fetched for a read of the second"
    before = reads(shared_store)
    assert (first / "large").read_bytes() == data
    after = reads(shared_store)
    assert after > before
    assert (second / "large").read_bytes() == data
    assert reads(shared_store) == after
    assert (second / "small").read_bytes() == data[1:]
    assert reads(shared_store) > after
    assert os.getxattr(second / "large", "user.castore.status") == b"stored"


def test_what_differs_has_an_inode_of_its_own(shared_store: MountedStore, source: Path, data: bytes) -> None:
    large = source / "large"
    first = take(shared_store, source, "differs/first")

    def of_its_own(version: str) -> Path:
        package = take(shared_store, source, f"differs/{version}")
        assert number(package / "large") != number(first / "large"), version
        write(large, data)
        return package

    os.utime(large, ns=(MTIME_NS, MTIME_NS + 1))
    of_its_own("time")
    large.chmod(0o640)
    of_its_own("mode")
    write(large, data[::-1])
    of_its_own("bytes")
    os.setxattr(large, "user.note", b"mine")
    package = of_its_own("attribute")
    assert os.getxattr(package / "large", "user.note") == b"mine"
    assert os.listxattr(first / "large") == []
    os.removexattr(large, "user.note")
    os.link(large, source / "link")
    package = of_its_own("link")
    assert number(package / "large") == number(package / "link")
    assert [(package / name).stat().st_nlink for name in ("large", "link")] == [2, 2]


def test_several_of_one_package(shared_store: MountedStore, source: Path, data: bytes) -> None:
    """They share the number of another package's file, and none with each other."""
    write(source / "copy", data)
    first, second = (take(shared_store, source, f"copies/{version}") for version in "12")
    assert number(first / "large") != number(first / "copy")
    assert number(second / "large") == number(second / "copy")
    assert number(second / "large") in (number(first / "large"), number(first / "copy"))
    assert [(second / name).stat().st_nlink for name in ("large", "copy")] == [1, 1]


def test_a_publish_keeps_numbers(shared_store: MountedStore, source: Path) -> None:
    """Whoever has a file of ingest/ open knows it by its number."""
    first = take(shared_store, source, "kept/1")
    run_tool("cp", "-a", source, shared_store.ingest("kept/2").parent / "3")
    with (shared_store.mnt / "ingest/kept/3/large").open("rb") as file:
        before = os.fstat(file.fileno()).st_ino
        package = shared_store.publish("kept/3")
        assert os.fstat(file.fileno()).st_ino == number(package / "large") == before
    assert number(first / "large") != before


def test_open_in_ingest_while_it_is_imported(shared_store: MountedStore, source: Path, data: bytes) -> None:
    """Its number there goes on to be answered: to whoever has the file open nothing changes."""
    first = take(shared_store, source, "open/1")
    (source / "SHA256SUMS").write_text(f"{'0' * 64}  large\n")
    assert shared_store.run("package", "import", str(source), "open/2").returncode == 2
    with (shared_store.mnt / "ingest/open/2/large").open("rb") as file:
        before = os.fstat(file.fileno()).st_ino
        assert before != number(first / "large")
        (source / "SHA256SUMS").unlink()
        second = take(shared_store, source, "open/2")
        assert number(second / "large") == number(first / "large")
        status = os.fstat(file.fileno())
        assert (status.st_ino, status.st_mtime_ns, status.st_nlink) == (before, MTIME_NS, 1)
        assert file.read() == data
        with Path(f"/proc/self/fd/{file.fileno()}").open("rb") as again:
            assert os.fstat(again.fileno()).st_ino == before
            assert again.read() == data


def test_programs_see_no_hard_links(shared_store: MountedStore, source: Path, tmp_path: Path) -> None:
    for version in "12":
        take(shared_store, source, f"links/{version}")
    package = shared_store.mnt / "packages/links"
    assert number(package / "1/large") == number(package / "2/large")
    run_tool("cp", "-a", package, tmp_path / "copied")
    run_tool("rsync", "-aH", f"{package}/", tmp_path / "synced")
    for folder in ("copied", "synced"):
        assert len({(tmp_path / folder / version / "large").stat().st_ino for version in "12"}) == 2
    run_tool("tar", "-cf", tmp_path / "tar", "-C", package, ".")
    with tarfile.open(tmp_path / "tar") as archive:
        assert [member.name for member in archive if member.islnk()] == []
    size = int(run_tool("du", "-sB1", "--apparent-size", package).split()[0])
    assert size >= 2 * (source / "large").stat().st_size + 2 * (source / "small").stat().st_size


def test_numbers_stay_when_mounted_anew(make_store: Callable[..., MountedStore], source: Path) -> None:
    store = make_store()
    packages = [take(store, source, f"{name}/1") / "large" for name in "ab"]  # nothing is mounted
    store.mount()
    seen = [told(path) for path in packages]
    assert seen[0] == seen[1]
    store.kill()
    store.mount("-o", "ro")
    assert [told(path) for path in packages] == seen
    store.umount()
    store.mount()
    assert [number(path) for path in packages] == [seen[0][0]] * 2
    assert [told(path) for path in packages] == seen


def test_no_package_needs_another(store: MountedStore, source: Path, data: bytes) -> None:
    """The one that a number came with is deleted, restored and purged, beside an open file and before a restart."""
    first, second = take(store, source, "a/1"), take(store, source, "b/1")
    seen = told(second / "large")

    def delete(path: Path) -> None:
        store.castore("package", "delete", "/".join(path.parts[-2:]), "--yes")
        wait_until(lambda: not path.exists(), f"{path} is hidden", 10)

    def purge() -> None:
        done = store.castore("storage", "gc", "--json", "--delete", "--grace", "0s")
        assert json.loads(done)["expired_packages"]
        store.castore("catalog", "check")

    with (second / "large").open("rb") as file:
        assert file.read(10) == data[:10]
        delete(first)
        assert told(second / "large") == seen
        store.castore("package", "restore", "a/1")
        wait_until(first.exists, "a/1 is there again", 10)
        assert told(first / "large") == seen
        delete(first)
        purge()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == data[10:]
        assert told(file.fileno()) == told(second / "large") == seen
    third = take(store, source, "c/1")
    store.umount()
    store.mount()
    for package in (third, second):
        with (package / "large").open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert file.read() == data
            assert told(file.fileno()) == seen
        assert os.getxattr(package / "large", "user.castore.status") == b"stored"
    delete(second)
    purge()
    assert told(third / "large") == seen
