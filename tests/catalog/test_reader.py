"""Reading the catalog: entries, names, packages, blobs and locations, one by one and in pages."""

from __future__ import annotations

from contextlib import closing
from functools import partial

import pytest

from castore.catalog.connection import open_writer
from castore.catalog.deleting import delete_package
from castore.catalog.records import FailureReason, Kind, Location, LocationStatus, PackageName
from castore.digest import Digest
from tests.catalog.catalogs import MANIFEST, ROOT, TOP, Catalog, summary_of


@pytest.fixture
def published(catalog: Catalog) -> Catalog:
    """A catalog with the package zlib/1.3."""
    blobs = catalog.fill_version()
    catalog.change(lambda transaction: transaction.add_locations([(blob, "local") for blob in blobs]))
    catalog.publish()
    return catalog


def test_an_empty_one(catalog: Catalog) -> None:
    reader = catalog.reader
    nothing: list[object] = [
        reader.entry(ROOT),
        reader.lookup(TOP, b"a"),
        reader.package_name("a"),
        reader.package("a", "1"),
        reader.package("a", "latest"),
        reader.package_by_root(1),
        reader.blob(1),
        reader.blob_digest(1),
    ]
    assert nothing == [None] * len(nothing)
    empty: list[object] = [reader.package_names(0, 10), reader.children(1, 0, 10), reader.locations(1)]
    assert empty == [[], [], []]
    assert (reader.attributes(1), reader.location_counts()) == ({}, [])


def test_entries(published: Catalog) -> None:
    reader = published.reader
    root = reader.lookup(2010, b"1.3")
    assert root is not None
    assert (root.inode, root.entry_id, root.kind, root.mode) == (ROOT, ROOT, Kind.DIRECTORY, 0o755)
    folder = reader.lookup(ROOT, b"dir")
    assert folder is not None
    assert folder.mode == 0o750, "of a folder's mode, too, only the permissions are kept"
    file = reader.lookup(folder.inode, b"\xff one")
    link = reader.lookup(ROOT, b"hard link")
    assert file is not None
    assert link is not None
    assert (file.inode, link.inode, link.entry_id) == (2003, 2003, 2005)
    assert (file.blob_id, file.size_bytes, file.nlink, file.uid) == (link.blob_id, 3, 2, 7)
    assert reader.entry(2003) == file
    assert reader.entry(2005) == link
    symbolic = reader.lookup(ROOT, b"link")
    assert symbolic is not None
    assert (symbolic.kind, symbolic.target, symbolic.size_bytes, symbolic.blob_id) == (
        Kind.SYMLINK,
        b"dir/\xff one",
        9,
        0,
    )
    assert reader.attributes(2003) == {b"user.note": b"\0\xff"}
    assert reader.lookup(ROOT, b"DIR") is None


def test_children_in_pages(published: Catalog) -> None:
    """Each page goes on behind the last cookie, whatever its size."""
    whole = published.reader.children(ROOT, 0, 100)
    assert [entry.entry_id for entry in whole] == sorted(entry.entry_id for entry in whole)
    for size in (1, 2, 3):
        paged, after = [], 0
        while page := published.reader.children(ROOT, after, size):
            assert len(page) <= size
            paged += page
            after = page[-1].entry_id
        assert paged == whole


def test_names(published: Catalog) -> None:
    reader = published.reader
    name = PackageName("zlib", 2010, 2011, 1, 2, 0o755, 5, "1.3")
    assert reader.package_name("zlib") == name
    assert reader.package_name_by_inode(name.inode) == reader.package_name_by_inode(name.latest_inode) == name
    assert reader.package_names(0, 10) == [name]
    assert reader.package_names(2010, 10) == []


def test_packages(published: Catalog) -> None:
    reader = published.reader
    package = reader.package("zlib", "1.3")
    assert package is not None
    assert package.ref == "zlib/1.3"
    assert package == reader.package("zlib", "latest") == reader.package_by_root(ROOT)
    assert list(reader.packages()) == [package]
    assert reader.totals() == (1, 3)
    assert reader.package("zlib", "1.4") is None


def test_blobs_and_locations(published: Catalog) -> None:
    reader = published.reader
    one = summary_of(b"one")
    blob = reader.blob_by_digest(one.digest)
    assert blob is not None
    assert blob.summary == one
    assert reader.blob(blob.blob_id) == blob
    assert reader.blob_digest(blob.blob_id) == (one.digest, 3)
    [location] = reader.locations(blob.blob_id)
    assert location == Location(one.digest, "local", LocationStatus.STORED, "", location.stored_at_ns, 0)
    assert location.stored_at_ns > 0
    published.change(lambda transaction: transaction.fail_location(one.digest, "local", FailureReason.SIZE_MISMATCH))
    assert reader.location_counts() == [("local", LocationStatus.FAILED, 1, 3), ("local", LocationStatus.STORED, 2, 10)]
    assert reader.good_backends(one.digest) == set()
    assert reader.good_backends(MANIFEST.digest) == {"local"}
    assert reader.blob_by_digest(Digest("manifest-sha256", one.digest.raw)) is None


def test_digests_in_pages(catalog: Catalog) -> None:
    """By raw bytes, within a range, of one algorithm."""
    summaries = [summary_of(bytes([number])) for number in range(50)]
    for summary in [*summaries, MANIFEST]:
        catalog.change(lambda transaction, summary=summary: transaction.ensure_blob(summary))  # type: ignore[misc]
    ordered = sorted(summary.digest.raw for summary in summaries)
    found, low = [], b""
    while page := catalog.reader.digests("sha256", low, b"\xff" * 33, 7):
        found += [digest.raw for _, digest, _ in page]
        low = found[-1] + b"\0"
    assert found == ordered
    part = [digest.raw for _, digest, size in catalog.reader.digests("sha256", b"\x40", b"\x80", 100) if size == 1]
    assert part == [raw for raw in ordered if 0x40 <= raw[0] < 0x80]


def test_where_a_blob_is_used(published: Catalog) -> None:
    reader = published.reader
    blob = reader.blob_by_digest(summary_of(b"one").digest)
    assert blob is not None
    uses, count = reader.paths_of(blob.blob_id, 10)
    assert {(use.ref, use.path) for use in uses} == {("zlib/1.3", b"dir/\xff one"), ("zlib/1.3", b"hard link")}
    assert count == 2
    assert len(reader.paths_of(blob.blob_id, 1)[0]) == 1


def test_a_deleted_package_uses_nothing(published: Catalog) -> None:
    """Its names come first, and yet those of packages that are published are found."""
    blob = published.reader.blob_by_digest(summary_of(b"one").digest)
    assert blob is not None
    published.change(partial(delete_package, name="zlib", version="1.3", uid=0, now_ns=8))
    assert published.reader.paths_of(blob.blob_id, 1) == ([], 0)
    with closing(open_writer(published.path).conn) as raw:
        columns = "kind, mode, uid, gid, mtime_ns, ctime_ns, size_bytes, nlink, blob_id, target"
        for entry_id, parent, name, like in ((3001, 2010, "1.4", 2001), (3002, 3001, "again", 2003)):
            raw.execute(
                f"INSERT INTO entries (entry_id, inode, parent_id, name, {columns}) "
                f"SELECT ?, ?, ?, CAST(? AS BLOB), {columns} FROM entries WHERE entry_id = ?",
                (entry_id, entry_id, parent, name, like),
            )
        raw.commit()
    uses, count = published.reader.paths_of(blob.blob_id, 1)
    assert ([(use.ref, use.path) for use in uses], count) == ([("zlib/1.4", b"again")], 1)
