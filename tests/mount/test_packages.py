"""What is published, on a real mount: nothing changes it; by-digest/ and .castore/ show it. Not how it came there."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.store import MountedStore, fails, run_tool, wait_until
from tests.mount.trees import assert_same, make_tree, sha256, snapshot


@pytest.fixture(scope="module")
def package(shared_store: MountedStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published package, for all tests of this file."""
    source = tmp_path_factory.mktemp("tree") / "source"
    make_tree(source, attributes=True)
    run_tool("cp", "-a", f"{source}/.", shared_store.ingest("fixed/1"))
    return shared_store.publish("fixed/1")


def _try(path: Path, flags: int) -> Callable[[], None]:
    return lambda: os.close(os.open(path, flags))


def _writes(folder: Path, file: Path, link: Path, outside: Path) -> dict[str, Callable[[], object]]:
    """Every kind of write, at a directory, a file and a symbolic link that are there."""
    return {
        "open to write": _try(file, os.O_WRONLY),
        "open to read and write": _try(file, os.O_RDWR),
        "open to append": _try(file, os.O_WRONLY | os.O_APPEND),
        "open and cut": _try(file, os.O_RDONLY | os.O_TRUNC),
        "open or create": _try(folder / "new", os.O_WRONLY | os.O_CREAT),
        "create": _try(folder / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL),
        "truncate": lambda: os.truncate(file, 1),
        "mkdir": lambda: os.mkdir(folder / "new"),
        "mknod": lambda: os.mknod(folder / "new", 0o100644),
        "mkfifo": lambda: os.mkfifo(folder / "new"),
        "symlink": lambda: os.symlink("x", folder / "new"),
        "link": lambda: os.link(file, folder / "new"),
        "unlink": lambda: os.unlink(file),
        "unlink a link": lambda: os.unlink(link),
        "rmdir": lambda: os.rmdir(folder),
        "rename": lambda: os.rename(file, folder / "new"),
        "rename a directory": lambda: os.rename(folder, folder.with_name("new")),
        "rename out": lambda: os.rename(file, outside / "new"),
        "rename in": lambda: os.rename(outside / "there", folder / "new"),
        "rename over": lambda: os.rename(outside / "there", file),
        "chmod": lambda: os.chmod(file, 0o600),
        "chmod of a directory": lambda: os.chmod(folder, 0o700),
        "chown": lambda: os.chown(file, 1, 1),
        "chown of a link": lambda: os.lchown(link, 1, 1),
        "utime": lambda: os.utime(file),
        "utime of a link": lambda: os.utime(link, ns=(1, 1), follow_symlinks=False),
        "setxattr": lambda: os.setxattr(file, "user.new", b"x"),
        "setxattr of a directory": lambda: os.setxattr(folder, "user.new", b"x"),
        "set a computed attribute": lambda: os.setxattr(file, "user.castore.digest", b"x"),
        "removexattr": lambda: os.removexattr(file, "user.comment"),
    }


def test_no_kind_of_write(shared_store: MountedStore, package: Path) -> None:
    outside = shared_store.ingest("outside/1")
    (outside / "there").write_text("x")
    before = snapshot(package)
    for what, write in _writes(package / "bin", package / "bin/tool", package / "lib/current", outside).items():
        with fails(errno.EROFS, what):
            write()
    assert_same(package, before)
    assert os.listdir(outside) == ["there"]


def test_no_write_beside_versions(shared_store: MountedStore, package: Path) -> None:
    outside = shared_store.ingest("outside/2")
    (outside / "there").write_text("x")
    packages = shared_store.mnt / "packages"
    for folder in (packages, package.parent, package):
        for write in (
            lambda folder=folder: os.mkdir(folder / "new"),
            lambda folder=folder: os.symlink("x", folder / "new"),
            _try(folder / "new", os.O_WRONLY | os.O_CREAT),
            lambda folder=folder: os.chmod(folder, 0o777),
            lambda folder=folder: os.utime(folder),
        ):
            with fails(errno.EROFS):
                write()
        # To packages/NAME a version may be moved, but nothing else.
        with fails(errno.EINVAL if folder == package.parent else errno.EROFS):
            (outside / "there").rename(folder / "new")
    for gone in (packages / "fixed/latest", package / "lib/current"):
        with fails(errno.EROFS):
            gone.unlink()
    for directory in (package, package.parent, package / "empty"):
        with fails(errno.EROFS):
            directory.rmdir()
    with fails(errno.EROFS):
        package.rename(package.with_name("2"))
    done = subprocess.run(["rm", "-rf", package.parent], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr


def test_the_rest_of_the_mount_is_read_only(shared_store: MountedStore, package: Path) -> None:
    digest = sha256(package / "bin/tool")
    blob = shared_store.mnt / f"by-digest/sha256/{digest[:2]}/{digest[2:4]}/{digest}"
    status = shared_store.mnt / ".castore/status.json"
    for file in (blob, status):
        for what, write in _writes(file.parent, file, file, shared_store.ingest("outside/3")).items():
            if what in ("rename in", "rename over"):
                continue
            with fails(errno.EROFS, f"{file}: {what}"):
                write()
    for folder in (shared_store.mnt, shared_store.mnt / "ingest"):
        with fails(errno.EPERM if folder.name == "ingest" else errno.EROFS):
            folder.chmod(0o700)


def test_modes_allow_what_they_say(package: Path) -> None:
    assert os.access(package / "bin/tool", os.R_OK | os.X_OK)
    assert not os.access(package / "share/read-only", os.X_OK)


def test_reading_changes_no_time(package: Path) -> None:
    before = (package / "bin/tool").stat()
    (package / "bin/tool").read_bytes()
    after = (package / "bin/tool").stat()
    assert (before.st_atime_ns, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_atime_ns,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
    assert (package / "share/3000000").stat().st_blocks * 512 >= 3_000_000


def test_the_kernel_keeps_what_was_read(shared_store: MountedStore, package: Path) -> None:
    path = package / "share/1048577"
    content = path.read_bytes()
    asked = shared_store.status()["reads"]
    assert path.read_bytes() == content
    assert shared_store.status()["reads"] == asked


def test_by_digest(shared_store: MountedStore, package: Path) -> None:
    top = shared_store.mnt / "by-digest"
    assert os.listdir(top) == ["sha256"]
    first = [f"{number:02x}" for number in range(256)]
    assert sorted(os.listdir(top / "sha256")) == sorted(os.listdir(top / "sha256/a7")) == first
    for path in (top, top / "sha256", top / "sha256/a7", top / "sha256/a7/00"):
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, os.getuid())
    files = [path for path in package.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    for path in files:
        digest = sha256(path)
        blob = top / "sha256" / digest[:2] / digest[2:4] / digest
        assert blob.read_bytes() == path.read_bytes()
        assert blob.stat().st_size == path.stat().st_size
        assert (stat.S_IMODE(blob.stat().st_mode), blob.stat().st_uid) == (0o400, os.getuid())
        assert digest in os.listdir(blob.parent)
        assert os.getxattr(blob, "user.hash.sha256").decode() == digest
        assert os.getxattr(blob, "user.castore.backend") == b"local"
        # A digest stands in its own folder and in no other.
        assert not (blob.parent.with_name("00" if digest[2:4] != "00" else "01") / digest).exists()
    for absent in ("sha512", "sha256/zz", "sha256/A7", "sha256/a7/0", f"sha256/00/00/{'0' * 64}", "sha256/00/00/short"):
        assert not (top / absent).exists()


def test_blobs_are_there_once_stored(shared_store: MountedStore) -> None:
    path = shared_store.ingest("unpublished/1") / "file"
    path.write_bytes(b"not published yet")
    digest = sha256(path)
    blob = shared_store.mnt / f"by-digest/sha256/{digest[:2]}/{digest[2:4]}/{digest}"
    shared_store.wait_stored(path)
    wait_until(blob.exists, "the blob is known", 3.0)
    assert blob.read_bytes() == b"not published yet"


def test_equal_files_are_stored_once(shared_store: MountedStore) -> None:
    for version in ("1", "2"):
        box = shared_store.ingest(f"equal/{version}")
        for name in ("a", "b"):
            (box / name).write_bytes(b"same" * 50_000)
        shared_store.publish(f"equal/{version}")
    digest = sha256(shared_store.package("equal/1") / "a")
    found = run_tool("find", shared_store.objects / "sha256", "-type", "f", "-name", digest).splitlines()
    assert len(found) == 1
    assert Path(found[0]).read_bytes() == b"same" * 50_000


def test_status_document(shared_store: MountedStore, package: Path) -> None:
    folder = shared_store.mnt / ".castore"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "status.json").stat().st_mode) == 0o400
    assert "status.json" in os.listdir(folder)
    before = shared_store.status()
    assert before["mountpoint"] == str(shared_store.mnt)
    assert before["pid"] == shared_store.pid
    box = shared_store.ingest("counted/1")
    (box / "file").write_bytes(b"c" * 12_345)
    shared_store.wait_stored(box / "file")
    version = next(version for version in shared_store.status()["versions"] if version["ref"] == "counted/1")
    assert (version["stored_files"], version["total_files"], version["stored_bytes"]) == (1, 1, 12_345)
    shared_store.publish("counted/1")
    after = shared_store.status()
    assert after["package_count"] == before["package_count"] + 1
    assert after["package_bytes"] == before["package_bytes"] + 12_345
    assert "counted/1" not in [version["ref"] for version in after["versions"]]
    # Each open makes it anew; each reader reads one whole document.
    assert json.loads(run_tool("cat", folder / "status.json")).keys() == after.keys()
    assert json.loads(run_tool("dd", "bs=100", f"if={folder}/status.json")).keys() == after.keys()


def test_everything_reads_the_same_after_a_restart(store: MountedStore, tmp_path: Path) -> None:
    make_tree(tmp_path / "source", attributes=True)
    run_tool("cp", "-a", f"{tmp_path}/source/.", store.ingest("lasting/1"))
    package = store.publish("lasting/1")
    before, listing = snapshot(package), snapshot(package.parent)
    store.umount()
    store.mount()
    assert_same(package, before)
    assert_same(package, tmp_path / "source")
    assert_same(package.parent, listing)
    assert os.readlink(package.with_name("latest")) == "1"
