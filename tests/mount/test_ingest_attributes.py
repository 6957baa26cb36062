"""Modes, owners, times, extended attributes, fsync and room of ingest/, on a real mount. Not bytes and names."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.store import MountedStore, fails, run_tool
from tests.mount.syscalls import forced_stat

_OLD_NS = 987_654_321_123_456_789


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_modes(shared_store: MountedStore) -> None:
    box = shared_store.ingest("modes/1")
    for mode in (0o000, 0o400, 0o644, 0o755, 0o777):
        path = box / f"{mode:o}"
        path.write_text("x")
        path.chmod(mode)
        assert _mode(path) == mode
    old = os.umask(0o027)
    try:
        (box / "masked").touch()
        (box / "masked-dir").mkdir()
    finally:
        os.umask(old)
    assert (_mode(box / "masked"), _mode(box / "masked-dir")) == (0o640, 0o750)
    package = shared_store.publish("modes/1")
    for mode in (0o000, 0o400, 0o644, 0o755, 0o777):
        assert _mode(package / f"{mode:o}") == mode


def test_set_uid_bits_are_dropped(shared_store: MountedStore) -> None:
    box = shared_store.ingest("suid/1")
    (box / "tool").write_text("x")
    (box / "tool").chmod(0o6755)
    assert _mode(box / "tool") == 0o755
    os.close(os.open(box / "made", os.O_WRONLY | os.O_CREAT, 0o4711))
    assert _mode(box / "made") == 0o711
    (box / "sticky").write_text("x")
    (box / "sticky").chmod(0o1644)
    assert _mode(box / "sticky") == 0o644
    run_tool("install", "-m", "4755", "/bin/true", box / "installed")
    (box / "dir").mkdir()
    (box / "dir").chmod(0o3775)
    os.chown(box / "dir", 0, 1234)
    (box / "dir/below").mkdir()
    (box / "dir/file").touch()
    assert _mode(box / "dir") & 0o1000
    package = shared_store.publish("suid/1")
    for name, mode in (("tool", 0o755), ("made", 0o711), ("sticky", 0o644), ("installed", 0o755)):
        assert _mode(package / name) == mode, name
    assert [path for path in package.rglob("*") if _mode(path) & 0o7000] == []


def test_set_gid_directories_pass_their_group_on(shared_store: MountedStore) -> None:
    box = shared_store.ingest("sgid/1")
    os.chown(box, 0, 1234)
    box.chmod(0o2775)
    (box / "dir").mkdir()
    (box / "dir/file").touch()
    assert (box / "dir").stat().st_gid == (box / "dir/file").stat().st_gid == 1234
    assert _mode(box / "dir") & stat.S_ISGID
    assert not _mode(box / "dir/file") & stat.S_ISGID


@pytest.mark.parametrize("keep", [True, False], ids=["keep_owner", "default"])
def test_owners(make_store: Callable[..., MountedStore], keep: bool) -> None:
    store = make_store("keep_owner = true" if keep else "")
    store.mount()
    box = store.ingest("owned/1")
    (box / "file").write_text("x")
    (box / "link").symlink_to("file")
    os.chown(box, 77, 78)
    os.chown(box / "file", 1234, 5678)
    os.chown(box / "link", 4321, 8765, follow_symlinks=False)
    assert (box / "file").stat().st_uid == 1234
    assert ((box / "link").lstat().st_uid, (box / "link").lstat().st_gid) == (4321, 8765)
    package = store.publish("owned/1")
    found = [(path.lstat().st_uid, path.lstat().st_gid) for path in (package, package / "file", package / "link")]
    # Without keep_owner all entries belong to whom the version's directory belonged.
    assert found == ([(77, 78), (1234, 5678), (4321, 8765)] if keep else [(77, 78)] * 3)


def test_times(shared_store: MountedStore) -> None:
    box = shared_store.ingest("times/1")
    began = time.time_ns()
    (box / "new").write_text("x")
    assert began <= (box / "new").stat().st_mtime_ns <= time.time_ns()
    (box / "link").symlink_to("new")
    (box / "dir").mkdir()
    for name in ("new", "link", "dir"):
        os.utime(box / name, ns=(5, _OLD_NS), follow_symlinks=False)
        assert (box / name).lstat().st_mtime_ns == _OLD_NS
        assert began <= (box / name).lstat().st_ctime_ns <= time.time_ns()
    with (box / "open").open("w") as file:
        file.write("written before the time is set")
        file.flush()
        os.utime(file.fileno(), ns=(_OLD_NS, _OLD_NS))
        (box / "ahead").write_text("x")
    os.utime(box / "ahead", ns=(0, 4_000_000_000_000_000_001))
    os.utime(box / "dir", ns=(0, -1_500_000_000))
    (box / "touched").touch()
    run_tool("touch", "-d", "1999-12-31T23:59:59.987654321Z", box / "touched")
    shared_store.wait_stored(box / "open")
    package = shared_store.publish("times/1")
    times = {path.name: path.lstat().st_mtime_ns for path in package.iterdir()}
    assert times == {
        "new": _OLD_NS,
        "link": _OLD_NS,
        "dir": -1_500_000_000,
        "open": _OLD_NS,
        "ahead": 4_000_000_000_000_000_001,
        "touched": 946_684_799_987_654_321,
    }


def test_the_time_of_the_last_change_goes_on(shared_store: MountedStore) -> None:
    """`tar` fails when it differs before and after it reads a file; `git` and backups go by it."""
    box = shared_store.ingest("changed/1")
    path = box / "file"
    path.write_text("x")
    changes: tuple[Callable[[], object], ...] = (
        lambda: path.open("a").close(),
        lambda: run_tool("sh", "-c", "echo more >> file", cwd=box),
        lambda: os.truncate(path, 100_000),
        lambda: os.utime(path, ns=(5, _OLD_NS)),
        lambda: path.write_bytes(bytes(3_000_000)),
        lambda: path.chmod(0o600),
    )
    seen = [forced_stat(str(path)).st_ctime_ns]
    for number, change in enumerate(changes):
        change()
        at_once = path.stat()
        status = forced_stat(str(path))
        assert (at_once.st_ctime_ns, at_once.st_mtime_ns) == (status.st_ctime_ns, status.st_mtime_ns), number
        assert status.st_ctime_ns >= status.st_mtime_ns, number
        assert (status.st_ctime_ns > seen[-1]) == (number > 0), number
        seen.append(status.st_ctime_ns)
    with path.open("r+b") as file:
        file.write(b"y")
        os.utime(file.fileno(), ns=(5, _OLD_NS))
        assert forced_stat(str(path)).st_ctime_ns > seen[-1]
    run_tool("sh", "-c", "truncate -s 5M holes; echo end >> holes; tar -cf tar holes", cwd=box)


def test_directories_say_when_their_names_changed(shared_store: MountedStore) -> None:
    box = shared_store.ingest("touched/1")
    for change in (
        lambda: (box / "a").touch(),
        lambda: (box / "a").rename(box / "b"),
        lambda: (box / "c").symlink_to("b"),
        lambda: (box / "c").unlink(),
        lambda: (box / "d").mkdir(),
        lambda: (box / "d").rmdir(),
    ):
        os.utime(box, ns=(_OLD_NS, _OLD_NS))
        change()
        assert box.stat().st_mtime_ns > _OLD_NS


def test_own_extended_attributes(shared_store: MountedStore) -> None:
    box = shared_store.ingest("attributes/1")
    (box / "file").write_text("x")
    (box / "dir").mkdir()
    values = {"user.text": b"hello", "user.empty": b"", "user.bytes": bytes(range(256)), "user.large": b"v" * 60_000}
    for path in (box, box / "file", box / "dir"):
        for name, value in values.items():
            os.setxattr(path, name, value)
        assert sorted(os.listxattr(path)) == sorted(values)
    os.setxattr(box / "file", "user.text", b"changed", os.XATTR_REPLACE)
    with fails(errno.EEXIST):
        os.setxattr(box / "file", "user.text", b"new", os.XATTR_CREATE)
    with fails(errno.ENODATA):
        os.setxattr(box / "file", "user.absent", b"new", os.XATTR_REPLACE)
    os.removexattr(box / "dir", "user.large")
    with fails(errno.ENODATA):
        os.removexattr(box / "dir", "user.large")
    with fails(errno.ENODATA):
        os.getxattr(box / "dir", "user.large")
    with fails(errno.EOPNOTSUPP):
        os.setxattr(box / "file", "trusted.own", b"x")
    package = shared_store.publish("attributes/1")
    assert {name: os.getxattr(package / "file", name) for name in os.listxattr(package / "file")} == {
        **values,
        "user.text": b"changed",
    }
    assert sorted(os.listxattr(package)) == sorted(values)
    assert sorted(os.listxattr(package / "dir")) == sorted(set(values) - {"user.large"})
    with fails(errno.EROFS):
        os.setxattr(package / "file", "user.text", b"no")
    with fails(errno.EROFS):
        os.removexattr(package / "file", "user.text")


def test_too_many_attributes(shared_store: MountedStore) -> None:
    box = shared_store.ingest("attributes/2")
    os.setxattr(box, "user.first", b"v" * 40_000)
    with fails(errno.E2BIG):
        os.setxattr(box, "user.second", b"v" * 40_000)
    os.setxattr(box, "user.first", b"")
    os.setxattr(box, "user.second", b"v" * 40_000)


def test_computed_attributes(shared_store: MountedStore) -> None:
    box = shared_store.ingest("computed/1")
    path = box / "file"
    path.write_text("hello\n")
    shared_store.wait_stored(path)
    digest = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    expected = {"state": b"stored", "digest": f"sha256:{digest}".encode()}
    for name, value in expected.items():
        assert os.getxattr(path, f"user.castore.{name}") == value
    assert os.getxattr(path, "user.hash.sha256") == digest.encode()
    computed = (
        "user.castore.state",
        "user.castore.digest",
        "user.hash.sha256",
        "user.castore.status",
        "user.castore.x",
    )
    for name in (*computed, "user.castore.producer"):
        with fails(errno.EPERM):
            os.setxattr(path, name, b"mine")
    for name, number in (("user.castore.state", errno.EEXIST), ("user.castore.x", errno.EPERM)):
        with fails(number):
            os.setxattr(path, name, b"mine", os.XATTR_CREATE)
    assert os.listxattr(path) == os.listxattr(box) == []
    with fails(errno.ENODATA):
        os.getxattr(path, "user.castore.nonsense")
    package = shared_store.publish("computed/1")
    expected = {"digest": expected["digest"], "backend": b"local", "status": b"stored"}
    for name, value in expected.items():
        assert os.getxattr(package / "file", f"user.castore.{name}") == value
    assert os.getxattr(package / "file", "user.hash.sha256") == digest.encode()
    assert os.listxattr(package / "file") == os.listxattr(package) == []
    assert run_tool("getfattr", "--only-values", "-n", "user.hash.sha256", package / "file") == digest


def test_producer_and_retention_class(shared_store: MountedStore) -> None:
    box = shared_store.ingest("labelled/1")
    os.chown(box, 54321, -1)  # it is who made the directory, whoever owns it since
    assert os.getxattr(box, "user.castore.producer") == b"root"
    assert os.getxattr(box, "user.castore.retention_class") == b"standard"
    os.setxattr(box, "user.castore.producer", "ci-größe".encode())
    os.setxattr(box, "user.castore.retention_class", b"release")
    for bad in (b"", b"a\nb", b"\xff", b"x" * 129):
        with fails(errno.EINVAL):
            os.setxattr(box, "user.castore.producer", bad)
    with fails(errno.EPERM):
        os.setxattr(box.parent, "user.castore.producer", b"ci")
    package = shared_store.publish("labelled/1")
    assert os.getxattr(package, "user.castore.producer").decode() == "ci-größe"
    assert os.getxattr(package, "user.castore.retention_class") == b"release"
    shown = shared_store.castore("package", "show", "labelled/1")
    assert "ci-größe" in shown
    assert "release" in shown
    assert "by uid 0" in shown


def test_fsync_and_sync(shared_store: MountedStore) -> None:
    box = shared_store.ingest("synced/1")
    (box / "dir").mkdir()
    with (box / "dir/file").open("wb") as file:
        file.write(b"d" * 300_000)
        file.flush()
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    for number in range(40):
        (box / f"{number}").write_bytes(b"%d" % number * 50_000)
    run_tool("sync", box / "dir", box / "0")
    # sync of the version returns when everything below is stored.
    run_tool("sync", box)
    states = {shared_store.state_of(path) for path in box.rglob("*") if path.is_file()}
    assert states == {"stored"}
    run_tool("sync", "-f", box)
    run_tool("sync", box.parent, box.parent.parent, shared_store.publish("synced/1"))


def test_room(make_store: Callable[..., MountedStore]) -> None:
    store = make_store('staging_max_bytes = "10MiB"')
    store.mount()
    room = os.statvfs(store.mnt)
    assert (room.f_bavail * room.f_frsize, room.f_namemax) == (10 << 20, 255)
    box = store.ingest("full/1")
    (box / "most").write_bytes(b"m" * (8 << 20))
    room = os.statvfs(box)
    assert room.f_bavail * room.f_frsize == 2 << 20
    with fails(errno.ENOSPC):
        (box / "too much").write_bytes(b"t" * (3 << 20))
    with fails(errno.ENOSPC):
        os.truncate(box / "most", 12 << 20)
    with fails(errno.ENOSPC):
        os.truncate(box / "most", (1 << 63) - 1)  # a hole counts as its bytes
    (box / "too much").unlink()
    assert (box / "most").read_bytes() == b"m" * (8 << 20)
    (store.publish("full/1") / "most").read_bytes()
    (store.ingest("full/2") / "again").write_bytes(b"a" * (9 << 20))
