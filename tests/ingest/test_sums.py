"""`SHA256SUMS` and `manifest-sha256.txt`: every way that sha256sum and BagIt write them, and every way to disagree."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from castore.catalog.connection import create_workspace
from castore.catalog.records import Kind
from castore.catalog.workspace import Node, WorkspaceStore
from castore.digest import BlobHasher
from castore.errors import SumsMismatch
from castore.ingest.sums import LINE_BYTES_MAX, check_sums

ROOT = 1000


class Version:
    """A version in a workspace, with its bytes beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        create_workspace(folder / "workspace.db")
        self.store = WorkspaceStore(folder / "workspace.db")
        self._inodes = itertools.count(ROOT)
        self.add(3, b"1", Kind.DIRECTORY)

    def add(self, parent: int, name: bytes, kind: Kind, target: bytes = b"") -> int:
        inode = next(self._inodes)
        self.store.insert_node(Node(inode, ROOT, kind, 0o755, 0, 0, 0, 0, 0, 0, 1, target, ""))
        self.store.insert_link(inode, parent, name, inode)
        return inode

    def file(self, parent: int, name: bytes, data: bytes) -> None:
        inode = self.add(parent, name, Kind.FILE)
        self.path(inode).write_bytes(data)
        hasher = BlobHasher()
        hasher.update(data)
        self.store.set_summary(inode, hasher.finish())

    def path(self, inode: int) -> Path:
        return self.folder / f"{inode:x}"

    def check(self) -> None:
        check_sums(self.store, ROOT, self.path)


@pytest.fixture
def version(tmp_path: Path) -> Iterator[Version]:
    """A version with some files: plain, in a folder, with odd names, and links to them."""
    made = Version(tmp_path)
    made.file(ROOT, b"plain", b"one")
    folder = made.add(ROOT, b"dir", Kind.DIRECTORY)
    made.file(folder, b"a b", b"two")
    made.file(ROOT, b"new\nline\\and%0A", b"three")
    made.add(ROOT, b"link", Kind.SYMLINK, b"./dir/../plain")
    made.add(folder, b"up", Kind.SYMLINK, b"../plain")
    made.add(ROOT, b"folder", Kind.SYMLINK, b"dir")
    made.add(ROOT, b"out", Kind.SYMLINK, b"../../plain")
    made.add(ROOT, b"absolute", Kind.SYMLINK, b"/plain")
    made.add(ROOT, b"loop", Kind.SYMLINK, b"loop")
    yield made
    made.store.close()


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


GOOD = [
    b"%s  plain\n" % digest(b"one"),
    b"%s *plain" % digest(b"one"),
    b"%s  ./dir/a b\r\n\n# a remark\n" % digest(b"two"),
    b"%s  plain\n" % digest(b"one").upper(),
    b"\\%s  new\\nline\\\\and%%0A\n" % digest(b"three"),
    b"%s  link\n%s  dir/up\n%s  folder/a b\n" % (digest(b"one"), digest(b"one"), digest(b"two")),
    b"",
]
BAD = [
    (b"%s  plain\n" % digest(b"two"), r"line 1: 'plain' has other bytes"),
    (b"%s  plain\n%s  gone\n" % (digest(b"one"), digest(b"one")), r"line 2: there is no file 'gone'"),
    (b"%s  dir\n" % digest(b"one"), "there is no file 'dir'"),
    (b"%s  ../plain\n" % digest(b"one"), "there is no file"),
    (b"%s  out\n" % digest(b"one"), "there is no file"),
    (b"%s  absolute\n" % digest(b"one"), "there is no file"),
    (b"%s  loop\n" % digest(b"one"), "there is no file"),
    (b"hello\n", "line 1: not a SHA-256 digest"),
    (b"abc  plain\n", "line 1: not a SHA-256 digest"),
]


@pytest.mark.parametrize("listing", GOOD)
def test_agrees(version: Version, listing: bytes) -> None:
    version.file(ROOT, b"SHA256SUMS", listing)
    version.check()


@pytest.mark.parametrize(("listing", "says"), BAD)
def test_disagrees(version: Version, listing: bytes, says: str) -> None:
    version.file(ROOT, b"SHA256SUMS", listing)
    with pytest.raises(SumsMismatch, match=says):
        version.check()


def test_bagit_encodes_line_ends_by_percent(version: Version) -> None:
    name = b"new%0Aline\\and%250A"
    version.file(ROOT, b"manifest-sha256.txt", b"%s  %s\n" % (digest(b"three"), name))
    version.check()


def test_both_lists_are_checked(version: Version) -> None:
    version.file(ROOT, b"SHA256SUMS", b"%s  plain\n" % digest(b"one"))
    version.file(ROOT, b"manifest-sha256.txt", b"%s  plain\n" % digest(b"two"))
    with pytest.raises(SumsMismatch, match=r"manifest-sha256\.txt line 1"):
        version.check()


def test_a_list_elsewhere_is_only_a_file(version: Version) -> None:
    folder = version.add(ROOT, b"other", Kind.DIRECTORY)
    version.file(folder, b"SHA256SUMS", b"no list at all")
    version.check()


def test_what_sha256sum_writes(version: Version, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "dir").mkdir(parents=True)
    (tree / "plain").write_bytes(b"one")
    (tree / "dir/a b").write_bytes(b"two")
    (tree / "new\nline\\and%0A").write_bytes(b"three")
    (tree / "link").symlink_to("plain")
    names = ["plain", "dir/a b", "new\nline\\and%0A", "link"]
    listing = subprocess.run(["sha256sum", *names], cwd=tree, capture_output=True, check=True).stdout
    version.file(ROOT, b"SHA256SUMS", listing)
    version.check()


def test_a_long_list_takes_no_memory(version: Version) -> None:
    version.file(ROOT, b"SHA256SUMS", b"##\n" * 300_000)
    tracemalloc.start()
    try:
        version.check()
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_line_of_any_length_is_refused_as_such(version: Version) -> None:
    version.file(ROOT, b"SHA256SUMS", b"#\n" + bytes(2 * LINE_BYTES_MAX))
    with pytest.raises(SumsMismatch, match=f"line 2: longer than {LINE_BYTES_MAX} bytes"):
        version.check()
