"""Which files of a version show the inode of an equal one, and which rows answer for a number that several show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from castore.catalog.sharing import EQUAL_LOOKED_AT, SHARED_BYTES, SharedInode, equal_files, share_inodes
from tests.catalog.catalogs import ROOT, Catalog

OWNER = (100, 200)
FILE = 2004
"""The file of `fill_version` that is made large here; what a package has of its bytes is `other`."""


@pytest.fixture
def large(catalog: Catalog) -> Catalog:
    """A version with one large file that nothing is special about."""
    blobs = catalog.fill_version()
    catalog.store.update_node(FILE, size_bytes=SHARED_BYTES, mtime_ns=7)
    catalog.change(lambda transaction: transaction.add_locations([(blob, "local") for blob in blobs]))
    return catalog


def insert(catalog: Catalog, number: int, **columns: int) -> None:
    """An entry of another package that equals that file but for some columns."""
    row: dict[str, Any] = {"mode": 0o755, "uid": 100, "gid": 200, "mtime_ns": 7, "nlink": 1, "shared": 0} | columns
    catalog.change(
        lambda transaction: transaction.execute(
            f"INSERT INTO entries SELECT {number}, 1, CAST('{number}' AS BLOB), {number}, 2, :mode, :uid, :gid, "
            ":mtime_ns, 3, size_bytes, :nlink, blob_id, x'', :shared FROM blobs WHERE size_bytes = 0",
            row,
        )
    )


def found(catalog: Catalog) -> list[SharedInode]:
    return catalog.change(lambda transaction: equal_files(transaction, ROOT, OWNER))


def test_an_equal_file(large: Catalog) -> None:
    assert found(large) == []
    insert(large, 1500)
    assert found(large) == [SharedInode(FILE, 1500, 3)]
    insert(large, 1600, shared=1400)
    assert found(large) == [SharedInode(FILE, 1400, 3)], "the newest one, and the number that it shows"
    large.change(lambda transaction: transaction.execute("DELETE FROM entries WHERE shared_inode <> 0"))
    large.store.update_node(FILE, size_bytes=SHARED_BYTES - 1)
    assert found(large) == []


@pytest.mark.parametrize("column", ["mode", "uid", "gid", "mtime_ns", "nlink"])
def test_what_differs(large: Catalog, column: str) -> None:
    insert(large, 1500, **{column: 2})
    assert found(large) == []


def test_what_has_attributes(large: Catalog) -> None:
    insert(large, 1500)
    large.change(lambda transaction: transaction.execute("INSERT INTO entry_attributes VALUES (1500, x'61', x'')"))
    assert found(large) == []
    large.change(lambda transaction: transaction.execute("DELETE FROM entry_attributes"))
    large.store.set_attribute(FILE, b"user.note", b"")
    assert found(large) == []


@pytest.mark.parametrize(("others", "is_found"), [(EQUAL_LOOKED_AT - 1, True), (EQUAL_LOOKED_AT, False)])
def test_how_many_are_looked_at(large: Catalog, others: int, is_found: bool) -> None:
    insert(large, 1500)
    for number in range(others):
        insert(large, 1501 + number, mtime_ns=8)
    assert bool(found(large)) is is_found


def test_a_number_outlives_its_row(large: Catalog) -> None:
    """Whatever asks by number finds one that shows it; so does the file itself by its own."""
    insert(large, 1500)
    shared = found(large)
    large.publish(owner=OWNER)
    large.change(lambda transaction: share_inodes(transaction, shared))

    def shown(ask: Callable[[int], Any], number: int) -> tuple[int, int, int]:
        entry = ask(number)
        return entry.entry_id, entry.shown_inode, entry.ctime_ns

    assert shown(large.reader.entry, 1500) == (1500, 1500, 3)
    large.change(lambda transaction: transaction.execute("DELETE FROM entries WHERE entry_id = 1500"))
    for number in (1500, FILE):
        assert shown(large.reader.entry, number) == (FILE, 1500, 3)
        file = large.reader.file(number)
        assert file is not None
        assert file[0] == large.reader.entry(number)
        assert file[1] == large.reader.blob(file[0].blob_id)
    listed = {entry.entry_id: entry.shown_inode for entry in large.reader.children(ROOT, 0, 100)}
    assert listed[FILE] == 1500
    assert listed[2006] == 2006
    assert large.reader.entry(1499) is None
    assert large.reader.file(1499) is None
