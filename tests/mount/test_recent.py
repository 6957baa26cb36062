"""What is remembered of published directories stays within its bounds, and tells the same as the catalog."""

from __future__ import annotations

import os
from collections.abc import Callable

from mount.attributes import absent
from mount.recent import CHILDREN_KEPT, INODES_KEPT, Child, Recent
from tests.mount.store import MountedStore


def page(first: int, count: int) -> list[Child]:
    return [(number, b"%d" % number, absent(0)) for number in range(first, first + count)]


def test_inodes_the_oldest_go_first() -> None:
    recent = Recent()
    for inode in range(INODES_KEPT + 1):
        recent.add(inode)
    assert 0 not in recent
    assert all(inode in recent for inode in range(1, INODES_KEPT + 1))


def test_pages_those_unused_for_longest_go_first() -> None:
    recent, half = Recent(), CHILDREN_KEPT // 2
    recent.keep(1, 0, page(10, half))
    recent.keep(2, 0, page(10, CHILDREN_KEPT - half))
    assert len(recent.page(1, 0) or []) == half
    recent.keep(3, 0, [])
    assert recent.page(2, 0) is None
    assert recent.page(1, 0)
    assert recent.page(3, 0) == []


def test_a_page_that_is_kept_again_counts_once() -> None:
    recent = Recent()
    recent.keep(1, 0, page(10, CHILDREN_KEPT - 1))
    for _ in range(3):
        recent.keep(2, 5, page(10, 1))
    assert recent.page(1, 0)


def test_of_another_catalog_nothing_is_known() -> None:
    recent = Recent()
    recent.add(1)
    recent.keep(1, 0, page(10, CHILDREN_KEPT))
    recent.clear()
    assert 1 not in recent
    assert recent.page(1, 0) is None
    recent.keep(2, 0, page(10, CHILDREN_KEPT))
    assert recent.page(2, 0), "what was forgotten counts no more"


def test_a_page_larger_than_all_is_not_kept() -> None:
    recent = Recent()
    recent.keep(1, 0, page(10, CHILDREN_KEPT + 1))
    assert recent.page(1, 0) is None


def test_listings_are_right_beyond_what_is_kept(make_store: Callable[..., MountedStore]) -> None:
    """Directories of more entries than are kept, read twice, and in pieces."""
    store = make_store()
    store.mount()
    root = store.ingest("many/1")
    names = [f"{number:05d}" for number in range(700)]
    for folder in range(CHILDREN_KEPT // len(names) + 2):
        (root / f"d{folder}").mkdir()
        for name in names:
            (root / f"d{folder}" / name).touch()
    published = store.publish("many/1")
    for _ in range(2):
        for directory in published.iterdir():
            assert sorted(os.listdir(directory)) == names
            assert all(entry.stat().st_size == 0 for entry in os.scandir(directory))
