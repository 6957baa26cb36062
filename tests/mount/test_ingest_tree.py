"""Names in ingest/, on a real mount: renames, links, removals, and what may lie where. Not the bytes of files."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
from pathlib import Path

from tests.mount.store import MountedStore, fails, run_tool

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE, _WHITEOUT = 1, 2, 4


def _renameat2(source: Path, target: Path, flags: int) -> None:
    if _LIBC.renameat2(_AT_FDCWD, bytes(source), _AT_FDCWD, bytes(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(source))


def test_rename_over_and_across(shared_store: MountedStore) -> None:
    box = shared_store.ingest("renames/1")
    for folder in ("one/two", "three"):
        (box / folder).mkdir(parents=True)
    (box / "one/file").write_text("first")
    inode = (box / "one/file").stat().st_ino
    (box / "three/file").write_text("replaced")
    (box / "one/file").rename(box / "three/file")
    assert (box / "three/file").read_text() == "first"
    assert (box / "three/file").stat().st_ino == inode
    assert os.listdir(box / "one") == ["two"]
    (box / "three").rename(box / "one/two/three")
    assert (box / "one/two/three/file").read_text() == "first"
    assert os.listdir(box) == ["one"]
    # An empty directory can be replaced by a directory, nothing else can.
    (box / "empty").mkdir()
    (box / "one/two/three").rename(box / "empty")
    (box / "other").mkdir()
    with fails(errno.ENOTEMPTY):
        (box / "other").rename(box / "empty")
    with fails(errno.ENOTDIR):
        (box / "other").rename(box / "empty/file")
    with fails(errno.EISDIR):
        (box / "empty/file").rename(box / "other")
    with fails(errno.EINVAL):
        (box / "one").rename(box / "one/two/one")
    with fails(errno.ENOENT):
        (box / "absent").rename(box / "present")
    package = shared_store.publish("renames/1")
    assert (package / "empty/file").read_text() == "first"


def test_temporary_file_and_rename(shared_store: MountedStore) -> None:
    box = shared_store.ingest("replaced/1")
    (box / "config").write_text("old")
    with (box / "config").open() as reader:
        (box / ".config.tmp").write_text("new")
        (box / ".config.tmp").rename(box / "config")
        assert reader.read() == "old"
    assert (box / "config").read_text() == "new"
    package = shared_store.publish("replaced/1")
    assert os.listdir(package) == ["config"]
    assert (package / "config").read_text() == "new"


def test_rename_flags(shared_store: MountedStore) -> None:
    box = shared_store.ingest("flags/1")
    (box / "a").write_text("a")
    (box / "b").write_text("b")
    with fails(errno.EEXIST):
        _renameat2(box / "a", box / "b", _NOREPLACE)
    with fails(errno.EINVAL):
        _renameat2(box / "a", box / "b", _EXCHANGE)
    with fails(errno.EINVAL):
        _renameat2(box / "a", box / "c", _WHITEOUT)
    assert ((box / "a").read_text(), (box / "b").read_text()) == ("a", "b")
    _renameat2(box / "a", box / "c", _NOREPLACE)
    assert sorted(os.listdir(box)) == ["b", "c"]
    shared_store.publish("flags/1")
    with fails(errno.EINVAL):
        _renameat2(shared_store.ingest("flags/2"), shared_store.package("flags/1"), _EXCHANGE)


def test_hard_links_inside_a_version(shared_store: MountedStore) -> None:
    box = shared_store.ingest("linked/1")
    (box / "sub").mkdir()
    (box / "file").write_text("one")
    (box / "sub/again").hardlink_to(box / "file")
    (box / "soft").symlink_to("file")
    os.link(box / "soft", box / "soft2", follow_symlinks=False)
    assert (box / "file").stat().st_nlink == 2
    assert (box / "file").samefile(box / "sub/again")
    with (box / "sub/again").open("a") as file:
        file.write(" and more")
    (box / "file").chmod(0o640)
    assert (box / "file").read_text() == "one and more"
    # Renaming one name of a file over another does nothing at all, says rename(2).
    os.rename(box / "file", box / "sub/again")
    assert (box / "file").exists()
    assert (box / "sub/again").exists()
    (box / "third").hardlink_to(box / "file")
    (box / "file").unlink()
    package = shared_store.publish("linked/1")
    assert (package / "third").samefile(package / "sub/again")
    assert (package / "third").stat().st_nlink == 2
    assert (package / "third").stat().st_mode & 0o777 == 0o640
    assert (package / "sub/again").read_text() == "one and more"
    assert (package / "soft").lstat().st_ino == (package / "soft2").lstat().st_ino


def test_hard_links_across_versions(shared_store: MountedStore, tmp_path: Path) -> None:
    box, other = shared_store.ingest("across/1"), shared_store.ingest("across/2")
    (box / "file").write_text("one")
    with fails(errno.EPERM):
        (other / "file").hardlink_to(box / "file")
    with fails(errno.EPERM):
        (other.parent / "file").hardlink_to(box / "file")
    with fails(errno.EXDEV):  # another file system: the kernel's answer
        (tmp_path / "file").hardlink_to(box / "file")
    package = shared_store.publish("across/1")
    with fails(errno.EPERM):
        (other / "file").hardlink_to(package / "file")
    assert os.listdir(other) == []


def test_moves_between_versions(shared_store: MountedStore) -> None:
    box, other = shared_store.ingest("moved/1"), shared_store.ingest("moved/2")
    (box / "tree/sub").mkdir(parents=True)
    (box / "tree/file").write_text("moves")
    (box / "tree/sub/again").hardlink_to(box / "tree/file")
    shared_store.wait_stored(box / "tree/file")
    (box / "tree").rename(other / "tree")
    # Half of a hard link cannot move: `mv` then copies, as it does between disks.
    (other / "split").hardlink_to(other / "tree/file")
    (other / "soft").symlink_to("x")
    os.link(other / "soft", other / "soft2", follow_symlinks=False)
    for name in ("split", "soft"):
        with fails(errno.EXDEV):
            (other / name).rename(box / name)
    run_tool("mv", other / "split", other / "soft", f"{box}/")
    assert (box / "split").read_text() == "moves"
    assert (box / "split").stat().st_nlink == 1
    first, second = shared_store.publish("moved/1"), shared_store.publish("moved/2")
    assert sorted(os.listdir(first)) == ["soft", "split"]
    assert (second / "tree/sub/again").read_text() == "moves"
    assert sorted(os.listdir(second)) == ["soft2", "tree"]


def test_an_open_file_that_moves_to_another_version(shared_store: MountedStore) -> None:
    box, other = shared_store.ingest("carried/1"), shared_store.ingest("carried/2")
    with (box / "file").open("w") as file:
        file.write("begun")
        file.flush()
        (box / "file").rename(other / "file")
        # The writer is the other version's business now.
        shared_store.publish("carried/1")
        with fails(errno.EBUSY):
            other.rename(shared_store.package("carried/2"))
        file.write(" and ended")
    assert (shared_store.publish("carried/2") / "file").read_text() == "begun and ended"


def test_versions_can_be_renamed_and_removed(shared_store: MountedStore) -> None:
    box = shared_store.ingest("draft/0.9")
    (box / "file").write_text("draft")
    box.rename(box.with_name("1.0"))
    box.parent.rename(shared_store.mnt / "ingest/final")
    assert (shared_store.publish("final/1.0") / "file").read_text() == "draft"
    assert not (shared_store.mnt / "packages/draft").exists()
    (shared_store.ingest("final/1.1") / "file").touch()
    with fails(errno.ENOTEMPTY):
        (shared_store.mnt / "ingest/final/1.1").rmdir()
    run_tool("rm", "-r", shared_store.mnt / "ingest/final")
    assert (shared_store.package("final/1.0") / "file").read_text() == "draft"


def test_what_lies_where(shared_store: MountedStore) -> None:
    ingest = shared_store.mnt / "ingest"
    top = shared_store.ingest("where/1").parent
    (top / "1/file").touch()
    (top / "1/dir").mkdir()
    for folder in (ingest, top):
        with fails(errno.EPERM):
            (folder / "file").write_text("not here")
        with fails(errno.EPERM):
            (folder / "link").symlink_to("not here")
        with fails(errno.EPERM):
            (top / "1/file").rename(folder / "file")
        with fails(errno.EPERM):
            os.mknod(folder / "file", 0o644)
    with fails(errno.EPERM):
        (top / "1").rename(ingest / "where2")
    with fails(errno.EPERM):
        top.rename(shared_store.ingest("elsewhere/1") / "where")
    # A version's directory may become a VERSION, and a VERSION a directory of another one.
    (top / "1/dir").rename(top / "2")
    (top / "2").rename(top / "1/dir2")
    assert sorted(os.listdir(top / "1")) == ["dir2", "file"]
    for name in ("packages", "ingest", "by-digest", ".castore"):
        assert (shared_store.mnt / name).is_dir()
    assert sorted(os.listdir(shared_store.mnt)) == [".castore", "by-digest", "ingest", "packages"]
    with fails(errno.EROFS):
        (shared_store.mnt / "other").mkdir()
    with fails(errno.EROFS):
        (shared_store.mnt / "file").write_text("")


def test_devices_sockets_and_fifos(shared_store: MountedStore) -> None:
    box = shared_store.ingest("special/1")
    with fails(errno.EPERM):
        os.mkfifo(box / "fifo")
    with fails(errno.EPERM):
        os.mknod(box / "null", 0o020666, os.makedev(1, 3))
    with fails(errno.EPERM):
        os.mknod(box / "disk", 0o060600, os.makedev(7, 0))
    folder = os.open(box, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening, fails(errno.EPERM):
        listening.bind(f"/proc/self/fd/{folder}/socket")  # the whole path is too long for an address
    os.close(folder)
    os.mknod(box / "regular", 0o100640)
    assert os.listdir(box) == ["regular"]
    assert (box / "regular").stat().st_mode == 0o100640


def test_removing_while_it_is_stored(store: MountedStore) -> None:
    box = store.ingest("fleeting/1")
    # Files come and go while the uploader picks, reads and records them; none may be missed or harm it.
    for number in range(200):
        (box / f"{number % 7}").write_bytes(b"%d" % number * (1 + number % 5 * 30_000))
        if number % 3:
            (box / f"{number % 7}").unlink()
    for number in range(20):
        run_tool("sh", "-c", f"mkdir -p d && echo {number} > d/x && rm -r d", cwd=box)
    expected = {path.name: path.read_bytes() for path in box.iterdir()}
    package = store.publish("fleeting/1")
    assert {path.name: path.read_bytes() for path in package.iterdir()} == expected
    assert os.listdir(store.state / "staging/data") == []
    assert store.status()["staged_bytes"] == 0


def test_working_directory_and_removal(shared_store: MountedStore) -> None:
    box = shared_store.ingest("cwd/1")
    (box / "dir").mkdir()
    child = subprocess.run(
        ["sh", "-c", "rmdir ../dir && touch file"], cwd=box / "dir", capture_output=True, text=True, check=False
    )
    assert child.returncode == 1
    assert "No such file or directory" in child.stderr
