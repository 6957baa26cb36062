"""No lookup of the mount scans a table: its cost does not grow with the catalog. Times are scripts/bench-scale's."""

from __future__ import annotations

import pytest

from castore.catalog.connection import open_reader
from castore.catalog.reader import CatalogReader
from castore.digest import Digest
from tests.catalog.catalogs import Catalog

DIGEST = Digest("sha256", bytes(32))

LOOKUPS = {
    "entry": lambda reader: reader.entry(5000),
    "file": lambda reader: reader.file(5000),
    "lookup": lambda reader: reader.lookup(5000, b"name"),
    "children": lambda reader: reader.children(5000, 0, 256),
    "files_after a number": lambda reader: reader.files_after(5000, 0, 64, 1 << 18),
    "files_after a name": lambda reader: reader.files_after(5000, b"name", 64, 1 << 18),
    "directory_after a number": lambda reader: reader.directory_after(5000, 0),
    "directory_after a name": lambda reader: reader.directory_after(5000, b"name"),
    "attributes": lambda reader: reader.attributes(5000),
    "package_name": lambda reader: reader.package_name("name"),
    "package_name_by_inode": lambda reader: reader.package_name_by_inode(5000),
    "package_names": lambda reader: reader.package_names(0, 256),
    "tag": lambda reader: reader.tag("name", "stable"),
    "tag_by_inode": lambda reader: reader.tag_by_inode(5000),
    "tags": lambda reader: reader.tags("name"),
    "package": lambda reader: reader.package("name", "1"),
    "package_by_root": lambda reader: reader.package_by_root(5000),
    "names": lambda reader: reader.names("na", 256),
    "versions": lambda reader: reader.versions("name", "1", 256),
    "blob": lambda reader: reader.blob(5000),
    "blob_by_digest": lambda reader: reader.blob_by_digest(DIGEST),
    "blob_digest": lambda reader: reader.blob_digest(5000),
    "digests": lambda reader: reader.digests("sha256", b"", b"\xff", 256),
    "locations": lambda reader: reader.locations(5000),
    "good_backends": lambda reader: reader.good_backends(DIGEST),
    "paths_of": lambda reader: reader.paths_of(5000, 20),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_lookup_searches(catalog: Catalog, name: str) -> None:
    statements: list[str] = []
    database = open_reader(catalog.path)
    with CatalogReader.open(catalog.path) as reader:
        reader._database.conn.set_trace_callback(statements.append)
        LOOKUPS[name](reader)
    assert statements
    scans = {f"SCAN {row[0]}" for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    for statement in statements:
        plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {statement}")]
        assert plan
        assert not [step for step in plan if " ".join(step.split()[:2]) in scans], (statement, plan)
    database.close()
