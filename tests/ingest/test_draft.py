"""The entries of a draft: long paths within their bound and in little memory; hard links far from each other."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from castore.catalog.connection import create_workspace
from castore.catalog.records import Kind
from castore.catalog.workspace import Node, WorkspaceStore
from castore.errors import NameTooLong
from castore.ingest.draft import Draft, manifest_entries, write_draft
from castore.ingest.labels import Labels
from castore.registry.manifest_rules import PATH_BYTES_MAX

ROOT = 1000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WorkspaceStore]:
    create_workspace(tmp_path / "workspace.db")
    opened = WorkspaceStore(tmp_path / "workspace.db")
    yield opened
    opened.close()


def _add(
    store: WorkspaceStore, inode: int, parent: int, name: bytes, kind: Kind = Kind.DIRECTORY, links: int = 1
) -> None:
    target = b"anywhere" if kind is Kind.SYMLINK else b""
    store.insert_node(Node(inode, ROOT, kind, 0o755, 0, 0, 0, 0, 0, 0, links, target, ""))
    store.insert_link(inode, parent, name, inode)


def _deep(store: WorkspaceStore, levels: int, name: bytes) -> int:
    """A directory in a directory in a directory; the last of them."""
    with store.transaction():
        _add(store, ROOT, 3, b"1")
        for inode in range(ROOT, ROOT + levels):
            _add(store, inode + 1, inode, name)
    return ROOT + levels


def test_a_path_that_no_rebuild_would_read_is_refused(store: WorkspaceStore) -> None:
    levels = PATH_BYTES_MAX // 256 + 1
    _deep(store, levels, b"d" * 255)
    lengths: list[int] = []
    tracemalloc.start()
    try:
        with pytest.raises(NameTooLong, match=f"more than {PATH_BYTES_MAX} bytes"):
            lengths.extend(len(entry.path) for entry in manifest_entries(store, ROOT, None))
        assert tracemalloc.get_traced_memory()[1] < 16 * PATH_BYTES_MAX
    finally:
        tracemalloc.stop()
    assert PATH_BYTES_MAX - 256 < lengths[-1] <= PATH_BYTES_MAX


def test_links_of_one_file_far_from_each_other(store: WorkspaceStore) -> None:
    last = _deep(store, 30, b"deep")
    _add(store, 5000, last - 10, b"first", Kind.SYMLINK, links=3)
    for number, (parent, name) in enumerate([(last, b"second"), (last - 5, b"third")]):
        store.insert_link(6000 + number, parent, name, 5000)
    linked = {entry.path: entry.link_to for entry in manifest_entries(store, ROOT, None) if entry.kind is Kind.SYMLINK}
    deep = [b"deep"] * 30
    first = b"/".join([*deep[:20], b"first"])
    assert linked == {first: None, b"/".join([*deep[:25], b"third"]): first, b"/".join([*deep, b"second"]): first}


async def test_a_draft_ends_with_its_task(store: WorkspaceStore, tmp_path: Path) -> None:
    """A rename has two minutes; a tree that is deep all over would take longer."""
    _deep(store, 4000, b"d" * 255)
    root = store.node(ROOT)
    assert root is not None
    draft = Draft(
        name="n",
        version="1",
        name_node=root,
        root=root,
        owner=None,
        labels=Labels("producer", "standard", 0),
        backend_ids=("local",),
        published_at_ns=0,
        shares_inodes=False,
    )
    with trio.move_on_after(0.2) as scope:
        await trio.to_thread.run_sync(write_draft, tmp_path / "manifest", draft, store.path, lambda inode: tmp_path)
    assert scope.cancelled_caught
