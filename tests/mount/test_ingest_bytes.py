"""The bytes of files in ingest/, on a real mount: every way of writing them, and what publish then holds."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import tempfile
from collections.abc import Callable

import pytest

from tests.mount.store import MountedStore, fails, run_tool
from tests.mount.trees import sha256

_MIB = 1 << 20


def _check_published(store: MountedStore, ref: str, expected: dict[str, bytes]) -> None:
    """Publish and compare content, size and digest."""
    package = store.publish(ref)
    for name, content in expected.items():
        path = package / name
        assert path.stat().st_size == len(content), name
        assert path.read_bytes() == content, name
        assert os.getxattr(path, "user.hash.sha256").decode() == sha256(path), name


def test_random_writes(shared_store: MountedStore) -> None:
    numbers = random.Random(1)
    model = bytearray()
    path = shared_store.ingest("random/1") / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    for step in range(300):
        offset, data = numbers.randrange(2 * _MIB), numbers.randbytes(numbers.randrange(1, 70_000))
        os.pwrite(descriptor, data, offset)
        model.extend(bytes(max(0, offset + len(data) - len(model))))
        model[offset : offset + len(data)] = data
        if step % 50 == 25:
            size = numbers.randrange(2 * _MIB)
            os.ftruncate(descriptor, size)
            model = model[:size] + bytes(max(0, size - len(model)))
        start = numbers.randrange(len(model) + 1)
        assert os.pread(descriptor, 50_000, start) == model[start : start + 50_000]
        assert os.fstat(descriptor).st_size == len(model)
    os.close(descriptor)
    assert path.read_bytes() == model
    _check_published(shared_store, "random/1", {"file": bytes(model)})


def test_writes_after_the_file_was_stored(shared_store: MountedStore) -> None:
    box = shared_store.ingest("rewritten/1")
    path = box / "file"
    path.write_bytes(b"first" * 100_000)
    shared_store.wait_stored(path)
    old = os.getxattr(path, "user.castore.digest")
    with path.open("r+b") as file:
        file.seek(250_000)
        file.write(b"changed")
        file.flush()
        # While it changes there is no digest: the old one is of other bytes.
        with fails(errno.ENODATA):
            os.getxattr(path, "user.castore.digest")
        assert shared_store.state_of(path) == "receiving"
    shared_store.wait_stored(path)
    assert os.getxattr(path, "user.castore.digest") not in (old, b"")
    _check_published(shared_store, "rewritten/1", {"file": b"first" * 50_000 + b"changed" + (b"first" * 50_000)[7:]})


def test_changes_while_it_is_hashed(shared_store: MountedStore) -> None:
    box = shared_store.ingest("hashing/1")
    content = bytearray(random.Random(3).randbytes(_MIB) * 48)
    path = box / "file"
    with path.open("wb") as file:
        file.seek(len(content) - 1)  # back to front, so that all of it is hashed after the close
        file.write(content[-1:])
        file.seek(0)
        file.write(content)
    for number in range(5):
        # Opened and closed again while, most likely, the bytes of before are still being hashed.
        offset = number * 9 * _MIB
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"changed")
        content[offset : offset + 7] = b"changed"
    _check_published(shared_store, "hashing/1", {"file": bytes(content)})


def test_append(shared_store: MountedStore) -> None:
    box = shared_store.ingest("appended/1")
    expected = b""
    for number in range(20):
        with (box / "log").open("ab") as file:
            line = b"line %d\n" % number
            file.write(line)
            expected += line
    # Two at once, each with its own idea of where the end is.
    first, second = (os.open(box / "both", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for _ in range(2))
    for number in range(50):
        os.write(first, b"a%02d" % number)
        os.write(second, b"b%02d" % number)
    os.close(first)
    os.close(second)
    both = b"".join(b"a%02d" % number + b"b%02d" % number for number in range(50))
    run_tool("sh", "-c", "for i in 1 2 3; do echo $i >> shell; done", cwd=box)
    _check_published(shared_store, "appended/1", {"log": expected, "both": both, "shell": b"1\n2\n3\n"})


def test_truncate(shared_store: MountedStore) -> None:
    box = shared_store.ingest("cut/1")
    content = random.Random(2).randbytes(500_000)
    for name in ("shorter", "longer", "empty", "by-open", "open-file"):
        (box / name).write_bytes(content)
        shared_store.wait_stored(box / name)
    os.truncate(box / "shorter", 123_456)
    os.truncate(box / "longer", 700_000)
    os.truncate(box / "empty", 0)
    with (box / "by-open").open("wb") as file:
        file.write(b"new")
    with (box / "open-file").open("r+b") as file:
        os.ftruncate(file.fileno(), 400_000)
        assert os.fstat(file.fileno()).st_size == 400_000
        os.ftruncate(file.fileno(), 450_000)
        assert os.pread(file.fileno(), 60_000, 390_000) == content[390_000:400_000] + bytes(50_000)
    run_tool("truncate", "-s", "+10", box / "empty")
    with fails(errno.EINVAL):
        os.truncate(box / "empty", -1)
    expected = {
        "shorter": content[:123_456],
        "longer": content + bytes(200_000),
        "empty": bytes(10),
        "by-open": b"new",
        "open-file": content[:400_000] + bytes(50_000),
    }
    _check_published(shared_store, "cut/1", expected)


def test_sparse(shared_store: MountedStore) -> None:
    path = shared_store.ingest("holes/1") / "file"
    with path.open("wb") as file:
        file.seek(20 * _MIB)
        file.write(b"end")
    assert path.stat().st_size == 20 * _MIB + 3
    staged = shared_store.state / "staging/data" / f"{path.stat().st_ino:x}"
    assert staged.stat().st_blocks * 512 < _MIB
    # Only there: whoever asks the mount is told of no hole.
    assert path.stat().st_blocks * 512 >= 20 * _MIB
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 20 * _MIB + 3
    _check_published(shared_store, "holes/1", {"file": bytes(20 * _MIB) + b"end"})


def test_mmap_writes(shared_store: MountedStore) -> None:
    path = shared_store.ingest("mapping/1") / "file"
    with path.open("w+b") as file:
        file.truncate(3 * _MIB)
        with mmap.mmap(file.fileno(), 3 * _MIB) as mapping:
            mapping[0:5] = b"begin"
            mapping[2 * _MIB : 2 * _MIB + 3] = b"mid"
            mapping.flush()
            with path.open("rb") as other:
                other.seek(2 * _MIB)
                assert other.read(3) == b"mid"
            mapping[3 * _MIB - 3 :] = b"end"
    expected = bytearray(3 * _MIB)
    expected[0:5], expected[2 * _MIB : 2 * _MIB + 3], expected[-3:] = b"begin", b"mid", b"end"
    _check_published(shared_store, "mapping/1", {"file": bytes(expected)})


def test_a_mapping_keeps_the_file_open(make_store: Callable[..., MountedStore]) -> None:
    store = make_store('publish_wait = "300ms"')
    store.mount()
    path = store.ingest("mapping/2") / "file"
    with path.open("w+b") as file:
        file.truncate(_MIB)
        mapping = mmap.mmap(file.fileno(), _MIB)
    mapping[100:105] = b"after"
    # The descriptor is closed, but the mapping can still write: publish must not go by it.
    with fails(errno.EBUSY):
        path.parent.rename(store.package("mapping/2"))
    mapping.close()
    _check_published(store, "mapping/2", {"file": bytes(100) + b"after" + bytes(_MIB - 105)})


def test_unlinked_open_file(shared_store: MountedStore) -> None:
    box = shared_store.ingest("unlinked/1")
    with (box / "gone").open("w+b") as file:
        file.write(b"still here" * 1000)
        file.flush()
        (box / "gone").unlink()
        assert os.listdir(box) == []
        assert os.pread(file.fileno(), 20, 0) == b"still herestill here"
        os.pwrite(file.fileno(), b"written", 5)
        os.ftruncate(file.fileno(), 12)
        status = os.fstat(file.fileno())
        assert (status.st_size, status.st_nlink) == (12, 0)
        assert os.pread(file.fileno(), 20, 0) == b"stillwritten"
        (box / "gone").write_text("another one")
        assert os.pread(file.fileno(), 20, 0) == b"stillwritten"
    assert (box / "gone").read_text() == "another one"
    (box / "gone").unlink()
    data = shared_store.state / "staging/data"
    assert not (data / f"{status.st_ino:x}").exists()
    (box / "stays").write_text("x")
    _check_published(shared_store, "unlinked/1", {"stays": b"x"})


def test_exclusive_create(shared_store: MountedStore) -> None:
    box = shared_store.ingest("exclusive/1")
    with (box / "lock").open("x") as file:
        file.write("mine")
    with fails(errno.EEXIST):
        (box / "lock").open("x")
    (box / "link").symlink_to("nowhere")
    with fails(errno.EEXIST):
        (box / "link").open("x")
    racers = [
        subprocess.Popen(["sh", "-c", f"set -C; echo {number} > raced"], cwd=box, stderr=subprocess.DEVNULL)
        for number in range(8)
    ]
    assert sorted(racer.wait() == 0 for racer in racers) == [False] * 7 + [True]
    assert (box / "lock").read_text() == "mine"


def test_direct_and_sync_flags(shared_store: MountedStore) -> None:
    box = shared_store.ingest("flags/1")
    content = os.urandom(64 * 1024)
    for name, flag in (("dsync", os.O_DSYNC), ("sync", os.O_SYNC), ("direct", os.O_DIRECT)):
        buffer = mmap.mmap(-1, len(content))  # page-aligned, as O_DIRECT wants it
        buffer[:] = content
        descriptor = os.open(box / name, os.O_WRONLY | os.O_CREAT | flag)
        os.write(descriptor, buffer)
        os.close(descriptor)
        buffer.close()
    _check_published(shared_store, "flags/1", {"dsync": content, "sync": content, "direct": content})


def test_fallocate_and_copy_range(shared_store: MountedStore) -> None:
    box = shared_store.ingest("ranges/1")
    with (box / "reserved").open("wb") as file:
        # The system's own is refused; the library's does without it.
        run_tool("sh", "-c", "! fallocate --length 1 reserved 2>/dev/null", cwd=box)
        os.posix_fallocate(file.fileno(), 0, 100_000)
    with fails(errno.EOPNOTSUPP):
        os.open(box, os.O_TMPFILE | os.O_RDWR)
    with tempfile.TemporaryFile(dir=box) as unnamed:
        unnamed.write(b"does without it, too")
    (box / "source").write_bytes(b"s" * 300_000)
    with (box / "source").open("rb") as source, (box / "target").open("wb") as target:
        left = 300_000
        while left:
            left -= os.copy_file_range(source.fileno(), target.fileno(), left)
    _check_published(shared_store, "ranges/1", {"reserved": bytes(100_000), "target": b"s" * 300_000})


def test_staged_bytes_are_private_and_flat(shared_store: MountedStore) -> None:
    box = shared_store.ingest("private/1")
    (box / "dir").mkdir()
    path = box / "dir/wide open"
    path.write_text("staged")
    path.chmod(0o777)
    os.chown(path, 1234, 1234)
    data = shared_store.state / "staging/data"
    for folder in (shared_store.state, data.parent, data):
        assert (folder.stat().st_mode & 0o7777, folder.stat().st_uid) == (0o700, os.getuid())
    staged = data / f"{path.stat().st_ino:x}"
    assert staged.read_text() == "staged"
    for item in os.scandir(data):
        status = item.stat(follow_symlinks=False)
        assert item.is_file(follow_symlinks=False)
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o600, os.getuid(), os.getgid())
    shared_store.publish("private/1")
    assert not staged.exists()


@pytest.mark.parametrize("reader", ["cat", "dd"])
def test_reading_while_it_is_written(shared_store: MountedStore, reader: str) -> None:
    path = shared_store.ingest(f"growing-{reader}/1") / "file"
    with path.open("wb", buffering=0) as file:
        for number in range(10):
            file.write(b"%d" % number * 10_000)
            command = ("cat", path) if reader == "cat" else ("dd", f"if={path}", "bs=64k", "status=none")
            assert len(run_tool(*command)) == 10_000 * (number + 1)
