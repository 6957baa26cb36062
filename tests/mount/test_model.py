"""ingest/ against a plain directory, by random operations with publishes, kills and restarts in between."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.model import SENTENCES, Twins, World
from tests.mount.model_machine import PUBLISH_WAIT, run_examples
from tests.mount.store import MountedStore, fails

EXAMPLES = 40
SEED = 1


def _make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "bytes": lambda path: path.write_bytes(b"other"),
    "size": lambda path: os.truncate(path, 4),
    "mode": lambda path: path.chmod(0o600),
    "owner": lambda path: os.chown(path, 1, -1),
    "time": lambda path: os.utime(path, ns=(6, 6)),
    "attribute": lambda path: os.setxattr(path, "user.a", b""),
    "link": lambda path: path.with_name("more").hardlink_to(path),
    "name": lambda path: path.rename(path.with_name("other")),
    "kind": _make_directory,
}


def test_a_mount_is_a_disk_but_for_what_is_written_down(
    make_store: Callable[..., MountedStore], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    store = make_store(PUBLISH_WAIT)
    store.mount()
    world = World(store, tmp_path / "disk")
    run_examples(world, count=EXAMPLES, number=SEED)
    world.check_packages()
    assert "Traceback" not in store.log()
    # A run in which little happens would prove little.
    assert world.packages, world.said()
    assert world.kills + world.restarts > 0, world.said()
    assert world.steps > 10 * EXAMPLES, world.said()


@pytest.mark.parametrize("what", CHANGES)
def test_what_differs_is_noticed(shared_store: MountedStore, tmp_path: Path, what: str) -> None:
    (tmp_path / "disk").mkdir()
    world = World(shared_store, tmp_path / "disk")
    world.name_count = 1000 + list(CHANGES).index(what)
    twins = Twins(world)
    twins.do("mkdir", "1", 0o755)
    twins.open(0, "1/file", os.O_WRONLY | os.O_CREAT, 0o644)
    twins.do("write", 0, 0, b"bytes")
    twins.do("futimens", 0, 5)
    twins.close(0)
    twins.compare(read=True)
    changed = twins.there.root / "1/file"
    CHANGES[what](changed)
    if what in ("bytes", "size"):
        os.utime(changed, ns=(5, 5))
    with pytest.raises(AssertionError, match="1/"):
        twins.compare(read=True)


def test_every_difference_is_written_down() -> None:
    semantics = (Path(__file__).parents[2] / "docs/SEMANTICS.md").read_text()
    text = re.sub(r"\s+", " ", semantics)
    assert [sentence for sentence in SENTENCES if sentence not in text] == []


def test_directories_have_one_link(shared_store: MountedStore) -> None:
    box = shared_store.ingest("links/1")
    (box / "one/two").mkdir(parents=True)
    for path in (box, box / "one"):
        assert path.stat().st_nlink == 1
    assert (shared_store.publish("links/1") / "one").stat().st_nlink == 1


def test_a_removed_directory_answers_nothing(shared_store: MountedStore) -> None:
    path = shared_store.ingest("removed/1") / "folder"
    path.mkdir()
    folder = os.open(path, os.O_RDONLY)
    path.rmdir()
    with fails(errno.ENOENT):
        os.fstat(folder)
    with fails(errno.ENOENT):
        os.listdir(folder)
    os.close(folder)
