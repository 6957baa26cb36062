"""The workspace: names and nodes as a file system needs them, states, and what publish and recovery do with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from castore.catalog.records import Kind
from castore.catalog.workspace import Publishing, StateCount, WorkspaceStore
from castore.errors import StateError
from tests.catalog.catalogs import ROOT, TOP, Catalog, node, summary_of


@pytest.fixture
def store(catalog: Catalog) -> WorkspaceStore:
    """A workspace with ingest/zlib/1.3."""
    catalog.fill_version()
    return catalog.store


def reread(store: WorkspaceStore, inode: int) -> object:
    """A node as the file has it, not as the store remembers it."""
    other = WorkspaceStore(store.path, read_only=True)
    try:
        return other.node(inode)
    finally:
        other.close()


def names(store: WorkspaceStore, parent: int) -> dict[bytes, int]:
    return {name: child.inode for _, name, child in store.children(parent, 0, 1000)}


def test_names_and_nodes(store: WorkspaceStore) -> None:
    assert names(store, 3) == {b"zlib": TOP}
    assert names(store, ROOT) == {b"dir": 2002, b"two": 2004, b"hard link": 2003, b"link": 2006}
    file = store.child(2002, b"\xff one")
    assert file == store.node(2003) == reread(store, 2003)
    assert file is not None
    assert (file.kind, file.state, file.size_bytes, file.nlink) == (Kind.FILE, "staged", 3, 2)
    assert store.child(ROOT, b"TWO") is None
    assert store.parent_of(2002) == (ROOT, b"dir")
    assert (store.parent_of(9), store.node(9), store.summary(9), store.error(9)) == (None, None, None, "")
    assert (store.is_empty(2002), store.is_empty(2004)) == (False, True)
    assert store.versions() == [("zlib", "1.3", ROOT)]
    assert next(store.tree(ROOT))[2] == b"1.3"
    assert [child.inode for _, _, _, child in store.tree(ROOT)] == [2001, 2002, 2004, 2003, 2006, 2003]


def test_children_in_pages(store: WorkspaceStore) -> None:
    whole = store.children(ROOT, 0, 100)
    after, paged = 0, []
    while page := store.children(ROOT, after, 1):
        paged += page
        after = page[-1][0]
    assert paged == whole


def test_a_transaction_that_fails_leaves_nothing(store: WorkspaceStore) -> None:
    before = store.node(2004)

    def change() -> None:
        with store.transaction():
            store.update_node(2004, mode=0o600)
            with store.transaction():
                store.delete_link(ROOT, b"two")
            changed = store.node(2004)
            assert changed is not None
            assert changed.mode == 0o600
            raise KeyError

    with pytest.raises(KeyError):
        change()
    assert store.node(2004) == reread(store, 2004) == before
    assert b"two" in names(store, ROOT)


def test_what_is_remembered_is_what_is_stored(store: WorkspaceStore) -> None:
    """After every kind of change: nodes are kept in memory."""
    digest = summary_of(b"").digest
    changes: list[Callable[[], object]] = [
        lambda: store.update_node(2004, mode=0o600, mtime_ns=5),
        lambda: store.touch(2004, 77),
        lambda: store.set_summary(2004, summary_of(b"four")),
        lambda: store.clear_summary(2004),
        lambda: store.set_summary(2004, summary_of(b"")),
        lambda: store.take_staged(10),
        lambda: store.move_state(2004, digest, state="failed", error="why"),
        lambda: store.restage(),
        lambda: store.move_subtree(2004, 5000),
        lambda: store.delete_link(ROOT, b"two"),
        lambda: store.delete_node(2004),
    ]
    for number, change in enumerate(changes):
        store.node(2004)
        change()
        assert store.node(2004) == reread(store, 2004), number


def test_states(store: WorkspaceStore) -> None:
    one, two = summary_of(b"one"), summary_of(b"")
    assert store.state_counts(ROOT) == [StateCount("staged", 2, 3)]
    taken = store.take_staged(1)
    assert len(taken) == 1
    assert store.take_staged(10) + taken == [(2004, ROOT, two), (2003, ROOT, one)]
    assert store.take_staged(10) == []
    assert store.move_state(2003, one.digest, state="stored")
    assert not store.move_state(2004, one.digest, state="stored"), "its bytes are others"
    assert store.move_state(2004, two.digest, state="failed", error="full")
    assert store.any_in_state(ROOT, "staged", "failed") == (2004, "full")
    assert store.any_in_state(ROOT, "receiving") is store.any_in_state(9, "failed") is None
    assert {count.state: count.file_count for count in store.state_counts()} == {"stored": 1, "failed": 1}
    assert (store.restage(version_inode=9), store.restage(version_inode=ROOT)) == (0, 1)
    assert (store.error(2004), store.any_in_state(ROOT, "staged")) == ("", (2004, ""))
    store.clear_summary(2004)
    assert [found.inode for found in store.receiving()] == [2004]
    assert store.restage(state="receiving") == 0, "without a digest there is nothing to put"
    assert store.staged_bytes_by_user() == {7: 3, 1: 0}


def test_rename_keeps_the_cookie(store: WorkspaceStore) -> None:
    [cookie] = [cookie for cookie, name, _ in store.children(ROOT, 0, 100) if name == b"two"]
    store.move_link(ROOT, b"two", 2002, b"2")
    assert [(cookie, b"2")] == [(found, name) for found, name, _ in store.children(2002, 0, 100) if name == b"2"]
    assert not store.insert_link(9999, 2002, b"2", 2003), "the name is taken"
    assert store.parent_of(2003) != (2002, b"2")


def test_what_may_move_to_another_version(store: WorkspaceStore) -> None:
    """Not what is linked from outside of it; stored files are routed anew there."""
    assert not store.subtree_is_closed(2002)
    assert store.subtree_is_closed(ROOT)
    store.delete_link(ROOT, b"hard link")
    store.update_node(2003, nlink=1)
    assert store.subtree_is_closed(2002)
    store.move_state(2003, summary_of(b"one").digest, state="stored")
    store.move_subtree(2002, 5000)
    moved = [store.node(inode) for inode in (2002, 2003, 2004)]
    assert [found.version_inode for found in moved if found is not None] == [5000, 5000, ROOT]
    assert store.any_in_state(5000, "staged") == (2003, "")


def test_without_a_name(store: WorkspaceStore) -> None:
    store.update_node(2004, nlink=0)
    store.delete_link(ROOT, b"two")
    assert [found.inode for found in store.unlinked()] == [2004]
    assert store.any_in_state(ROOT, "staged") == (2003, "")
    store.delete_node(2004)
    assert store.unlinked() == []


def test_attributes(store: WorkspaceStore) -> None:
    store.set_attribute(2004, b"user.a", b"1")
    store.set_attribute(2004, b"user.a", b"\xff")
    assert store.attributes(2004) == {b"user.a": b"\xff"}
    assert store.remove_attribute(2004, b"user.a")
    assert not store.remove_attribute(2004, b"user.a")
    store.set_attribute(2004, b"user.a", b"1")
    store.delete_link(ROOT, b"two")
    store.delete_node(2004)
    assert store.attributes(2004) == {}


def test_inodes_of_a_name_are_fixed(store: WorkspaceStore) -> None:
    store.add_names("zlib", 1, 2)
    assert store.names("zlib") == (2010, 2011)
    assert store.name_of(2010) == store.name_of(2011) == "zlib"
    assert (store.names("other"), store.name_of(1)) == (None, None)


def test_first_names_get_their_inode_as_cookie(store: WorkspaceStore) -> None:
    """The first name of a file was removed: for entries, one of the others takes its place."""
    store.delete_link(2002, b"\xff one")
    store.settle_cookies(ROOT)
    assert {(cookie, child.inode) for cookie, _, child in store.children(ROOT, 0, 100)} == {
        (inode, inode) for inode in (2002, 2003, 2004, 2006)
    }


def test_notes_of_publishes(store: WorkspaceStore) -> None:
    first, second = (Publishing(ROOT, "zlib", "1.3", bytes([number]) * 32) for number in (1, 2))
    store.begin_publishing(first)
    store.begin_publishing(second)
    assert store.publishings() == [first, second]
    store.end_publishing(ROOT, first.manifest)
    assert store.publishings() == [second]


def test_forgetting_a_version(store: WorkspaceStore) -> None:
    with store.transaction():
        store.insert_node(node(3000, version_inode=3000))
        store.insert_link(3000, TOP, b"other", 3000)
    removed = []
    while some := store.remove_version(ROOT, 2):
        assert len(some) <= 2
        removed += [found.inode for found, _ in some]
    assert sorted(removed) == [2001, 2002, 2003, 2004, 2006]
    assert names(store, TOP) == {b"other": 3000}
    assert store.attributes(2003) == {}
    assert store.node(ROOT) is None


def test_two_stores_at_once(store: WorkspaceStore) -> None:
    """Publish reads with a connection of its own while names go on being made."""
    other = WorkspaceStore(store.path, read_only=True)
    seen = other.tree(ROOT)
    next(seen)
    store.update_node(2004, mode=0o600)
    assert len(list(seen)) == 5
    with pytest.raises(StateError, match="readonly"):
        other.update_node(2004, mode=0)
    other.close()


def test_sync_needs_no_log(store: WorkspaceStore) -> None:
    store.sync()
    store._execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.sync()
