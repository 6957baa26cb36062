"""Reading a directory for an import: what changes under it is noticed, and nothing stays open."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from castore.errors import AccessDenied, NotFound, NotPermitted, SourceChanged, TreeError
from castore.ingest.bulk_source import Copied, Count, Item, Leave, LinkedFiles, Walk, copy_files, count, mapped, shown
from castore.ingest.disk_room import DiskRoom


class Meddling(Count):
    """Does something once when the first bytes were read, as another program might."""

    __slots__ = ("_bytes", "_meddle")

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle: Callable[[], object] | None = None
        super().__init__()
        self._meddle = meddle

    @property
    def size_bytes(self) -> int:
        return self._bytes

    @size_bytes.setter
    def size_bytes(self, value: int) -> None:
        self._bytes = value
        if self._meddle is not None:
            meddle, self._meddle = self._meddle, None
            meddle()


async def copy(
    root: Path, target: Path, *, before: Callable[[], object] = int, meddle: Callable[[], object] = int
) -> Copied:
    """List a directory with one file, do something, and copy the file while something else is done."""
    with Walk(os.fsencode(root)) as walk:
        item = next(step for step in walk.steps() if isinstance(step, Item))
        before()
        room = DiskRoom(target.parent)
        (copied,) = await trio.to_thread.run_sync(copy_files, [item], [target], Meddling(meddle), room)
    return copied


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").write_bytes(b"x" * 2_500_000)
    os.utime(tmp_path / "root/file", ns=(0, 10**18))
    return tmp_path / "root"


async def test_a_copy(root: Path, tmp_path: Path) -> None:
    copied = await copy(root, tmp_path / "copy")
    data = (root / "file").read_bytes()
    assert (tmp_path / "copy").read_bytes() == data
    assert copied.summary.digest.hex == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "copy").stat().st_mtime_ns == 10**18


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2_000_000)
        file.write(b"y")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: path.write_bytes(b"longer" * 1_000_000), id="grows"),
        pytest.param(lambda path: os.truncate(path, 5), id="shrinks"),
        pytest.param(_overwrite, id="overwritten"),
    ],
)
async def test_a_file_that_changes_while_it_is_read(
    root: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    with pytest.raises(SourceChanged, match="root/file: changed while it was read"):
        await copy(root, tmp_path / "copy", meddle=lambda: change(root / "file"))


async def test_a_file_that_changes_before_it_is_read(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceChanged, match="root/file: changed while it was read"):
        await copy(root, tmp_path / "copy", before=lambda: os.truncate(root / "file", 7))
    with pytest.raises(SourceChanged, match="root/file: went away while it was imported"):
        await copy(root, tmp_path / "copy", before=(root / "file").unlink)


async def test_no_link_is_followed_in_the_place_of_a_file(root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 2_500_000)

    def swap() -> None:
        (root / "file").unlink()
        (root / "file").symlink_to(tmp_path / "secret")

    with pytest.raises(TreeError, match="root/file: "):
        await copy(root, tmp_path / "copy", before=swap)
    assert not (tmp_path / "copy").exists()


async def test_holes_stay_holes(root: Path, tmp_path: Path) -> None:
    (root / "file").unlink()
    with (root / "file").open("wb") as file:
        file.truncate(50_000_000)
        file.seek(20_000_000)
        file.write(b"middle")
    await copy(root, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (root / "file").read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 5_000_000


def test_a_directory_that_changes_while_it_is_read(root: Path) -> None:
    with Walk(os.fsencode(root)) as walk:
        steps = walk.steps()
        next(steps)
        os.utime(root, ns=(0, 1))
        with pytest.raises(SourceChanged, match="root: changed while it was read"):
            list(steps)


def test_a_name_that_goes_away(root: Path) -> None:
    with Walk(os.fsencode(root)) as walk:
        steps = walk.steps()
        next(steps)
        (root / "file").unlink()
        (root / "file2").write_text("")
        with pytest.raises(SourceChanged):
            list(steps)


async def test_nothing_stays_open(root: Path) -> None:
    deep = root / "/".join("abcdefgh")
    deep.mkdir(parents=True)
    os.mkfifo(deep / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    with Walk(os.fsencode(root)) as walk, pytest.raises(NotPermitted, match="h/pipe: is a fifo"):
        await trio.to_thread.run_sync(count, walk, Count())
    (deep / "pipe").unlink()
    total = Count()
    with Walk(os.fsencode(root)) as walk:
        await trio.to_thread.run_sync(count, walk, total)
        assert len(os.listdir("/proc/self/fd")) == before
    assert (total.name_count, total.file_count, total.size_bytes) == (1, 1, 2_500_000)
    with Walk(os.fsencode(root)) as walk:
        assert sum(isinstance(step, Leave) for step in walk.steps()) == 9
    assert len(os.listdir("/proc/self/fd")) == before


async def test_names_of_one_file_count_once(root: Path) -> None:
    os.link(root / "file", root / "other")
    os.link(root / "file", root.parent / "outside")
    total = Count()
    with Walk(os.fsencode(root)) as walk:
        await trio.to_thread.run_sync(count, walk, total)
        items = [step for step in walk.steps() if isinstance(step, Item)]
    assert (total.name_count, total.file_count, total.size_bytes) == (2, 1, 2_500_000)
    (root.parent / "outside").unlink()
    linked = LinkedFiles()
    assert linked.find(items[0]) is None
    linked.add(items[0], 7)
    assert linked.find(items[1]) == 7


def test_where_a_walk_may_not_lead(root: Path) -> None:
    inner = root / "inner"
    inner.mkdir()
    for avoid in ((inner.stat().st_dev, inner.stat().st_ino), (inner.stat().st_dev, 0)):
        with Walk(os.fsencode(root), avoid=frozenset({avoid})) as walk, pytest.raises(NotPermitted):
            list(walk.steps())
    with Walk(os.fsencode(root), place=(1, 1)) as walk, pytest.raises(NotFound, match="another directory"):
        list(walk.steps())


def test_how_paths_and_errors_are_shown() -> None:
    assert shown(b"a/b c") == "a/b c"
    assert shown(b"a\n\xff") == "a\\n\\\\xff"
    assert isinstance(mapped(PermissionError(13, "Permission denied"), b"/x"), AccessDenied)
    assert str(mapped(OSError(5, "Input/output error"), b"/x")) == "/x: Input/output error"
