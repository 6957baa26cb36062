"""`castore catalog check`: a sound catalog is sound, and every rule finds what breaks it. Real SQLite files."""

from __future__ import annotations

import sqlite3 as system_sqlite
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pysqlite3 import dbapi2 as sqlite3

from castore.catalog.checking import FINDINGS_KEPT, CheckReader, CheckResult
from castore.catalog.checks import CHECKS, _name_is_wrong
from castore.catalog.deleting import begin_purge, delete_package, drop_entries
from castore.catalog.tagging import set_tag
from castore.registry.names import is_valid_name
from tests.catalog.catalogs import Catalog, made


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Catalog]:
    """A catalog with one package of each kind of entry, an event, an intent and a probe."""
    with made(tmp_path) as catalog:
        blobs = catalog.fill_version()
        catalog.change(lambda transaction: transaction.add_locations((blob, "local") for blob in blobs))
        catalog.publish()
        change(
            catalog,
            "UPDATE sequences SET next_value = 3000",
            "INSERT INTO events (event_id, type, subject, time_ns, data) VALUES ('e', 't', 's', 1, '{}')",
            "INSERT INTO put_intents VALUES ('sha256', zeroblob(32), 'local', 'me', 1)",
            "INSERT INTO backend_probes VALUES ('local', 1, '', '[]')",
        )
        yield catalog
    catalog.path.unlink()  # what is spoilt on purpose is nobody else's business


def change(catalog: Catalog, *statements: str) -> None:
    """Statements that SQLite's own constraints do not keep from anything."""
    with closing(sqlite3.connect(catalog.path)) as raw:
        raw.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            raw.execute(statement)
        raw.commit()


def results_of(catalog: Catalog) -> dict[str, CheckResult]:
    with CheckReader(catalog.path) as reader:
        return {result.name: result for result in reader.run(lambda *_: None)}


def test_a_sound_catalog(published: Catalog) -> None:
    assert {name: result.kept for name, result in results_of(published).items() if result.count} == {}


def test_a_number_that_is_shown_may_have_lost_its_row(published: Catalog) -> None:
    change(published, "UPDATE entries SET shared_inode = 1999 WHERE entry_id = 2004")
    assert {name: result.kept for name, result in results_of(published).items() if result.count} == {}


def test_an_empty_catalog(catalog: Catalog) -> None:
    assert {name: result.kept for name, result in results_of(catalog).items() if result.count} == {}


BREAKS = [
    ("foreign-keys", "DELETE FROM blobs WHERE algorithm = 'manifest-sha256'", "names what is not in blobs"),
    ("schema", "DROP INDEX locations_by_status", "locations_by_status: is missing"),
    ("schema", "CREATE INDEX mine ON blobs (size_bytes)", "mine: is not castore's"),
    ("schema", "ALTER TABLE events ADD COLUMN more TEXT", "events: is not made as castore makes it"),
    ("types", "UPDATE entries SET mode = 'rwx' WHERE kind = 1", "mode is of another type"),
    ("types", "UPDATE blobs SET digest = 'text' || blob_id", "digest is of another type"),
    ("info", "DELETE FROM catalog_info", "there are 0 rows instead of one"),
    ("info", "UPDATE catalog_info SET catalog_id = ''", "catalog_id is no UUID"),
    ("sequences", "UPDATE sequences SET next_value = 2011", "the next inode is 2011, but 2011 is used"),
    ("sequences", "DELETE FROM sequences", "there is no row for inode"),
    ("names", "UPDATE package_names SET latest_version = '9'", "zlib: latest is 9, which is not published"),
    ("names", "UPDATE package_names SET latest_version = ''", "has versions, but no latest"),
    ("names", "UPDATE package_names SET latest_inode = 2002", "one of its inodes is used twice"),
    ("names", "UPDATE package_names SET mode = 4095", "its owner, group or mode is out of range"),
    ("names", "UPDATE package_names SET name = '../etc'", "../etc: is not a NAME"),
    ("packages", "UPDATE packages SET version = 'latest'", "zlib/latest: is not a VERSION"),
    ("packages", "UPDATE packages SET root_id = 2002", "its root is not the directory packages/NAME/VERSION"),
    ("packages", "UPDATE packages SET root_id = 1", "its root directory is missing"),
    ("packages", "UPDATE packages SET producer = ''", "its producer has no text"),
    ("packages", "UPDATE packages SET backend_ids = '['", "backend_ids is not JSON"),
    ("packages", "UPDATE packages SET backend_ids = '[\"a\",\"a\"]'", "not a list of different backends"),
    ("packages", "UPDATE packages SET manifest_blob_id = 1", "its manifest is a blob of another kind"),
    ("blobs", "UPDATE blobs SET digest = zeroblob(31) WHERE blob_id = 1", "its digest has 31 bytes instead of 32"),
    ("blobs", "UPDATE blobs SET algorithm = 'md5' WHERE blob_id = 1", "an algorithm that is not known"),
    ("blobs", "UPDATE blobs SET checksums = x'' WHERE blob_id = 1", "have 0 bytes instead of 8"),
    ("blobs", "UPDATE blobs SET size_bytes = 1 << 50 WHERE blob_id = 1", "have 8 bytes instead of 68719476736"),
    ("blobs", "UPDATE blobs SET block_size_bytes = 0", "its blocks have 0 bytes"),
    ("locations", "UPDATE storage_locations SET status = 'lost'", "its status is lost"),
    ("locations", "UPDATE storage_locations SET status = 'failed'", "is failed, and does not say why"),
    ("locations", "UPDATE storage_locations SET status = 'verified'", "is verified, but never was looked at"),
    ("intents", "UPDATE put_intents SET owner = ''", "names no backend or no process"),
    ("entries", "UPDATE entries SET name = x'2e2e' WHERE kind = 3", "its name is none that Linux allows"),
    ("entries", "UPDATE entries SET name = x'612f62' WHERE kind = 3", "its name is none that Linux allows"),
    ("entries", "UPDATE entries SET name = x'6100' WHERE kind = 3", "its name is none that Linux allows"),
    ("entries", "UPDATE entries SET name = zeroblob(256) WHERE kind = 3", "its name has 256 bytes"),
    ("entries", "UPDATE entries SET mode = 2541 WHERE kind = 3", "its owner, group or mode is out of range"),
    ("entries", "UPDATE entries SET target = x'' WHERE kind = 3", "no right target"),
    ("entries", "UPDATE entries SET blob_id = 0 WHERE kind = 2", "a file has no blob"),
    ("entries", "UPDATE entries SET size_bytes = 5 WHERE kind = 1", "a directory has bytes"),
    ("parents", "UPDATE entries SET parent_id = 2004 WHERE entry_id = 2006", "its directory 2004 is not there"),
    ("roots", "UPDATE entries SET parent_id = 2010 WHERE entry_id = 2006", "lies in packages/zlib, but no package"),
    ("files", "UPDATE entries SET blob_id = 99 WHERE entry_id = 2004", "its blob is not known"),
    ("files", "UPDATE entries SET size_bytes = 99 WHERE entry_id = 2004", "it has 99 bytes, its blob 0"),
    ("links", "UPDATE entries SET mode = 0 WHERE entry_id = 2005", "differs from the other names of the same inode"),
    ("links", "UPDATE entries SET nlink = 3 WHERE inode = 2003", "says 3 names, and has 2"),
    ("links", "UPDATE entries SET nlink = 2 WHERE entry_id = 2004", "says 2 names, and has 1"),
    ("links", "UPDATE entries SET inode = 9000 WHERE entry_id = 2005", "is a hard link to nothing"),
    ("sequences", "UPDATE entries SET shared_inode = 9000 WHERE entry_id = 2004", "but 9000 is used"),
    ("names", "UPDATE entries SET shared_inode = 2011 WHERE entry_id = 2004", "one of its inodes is used twice"),
    ("shared", "UPDATE entries SET shared_inode = 77 WHERE entry_id = 2004", "shows an inode that is out of range"),
    ("shared", "UPDATE entries SET shared_inode = 1999 WHERE entry_id = 2002", "is no file of its own"),
    ("shared", "UPDATE entries SET shared_inode = 1999 WHERE entry_id = 2005", "is no file of its own"),
    ("shared", "UPDATE entries SET shared_inode = 2004 WHERE entry_id = 2004", "is no file of its own"),
    ("shared", "UPDATE entries SET shared_inode = 2003 WHERE entry_id = 2004", "one of both has attributes"),
    ("shared", "UPDATE entries SET shared_inode = 2006 WHERE entry_id = 2004", "differs from what has the same inode"),
    ("attributes", "UPDATE entry_attributes SET inode = 9000", "has an attribute, but is not there"),
    ("attributes", "UPDATE entry_attributes SET name = x'74727573746564'", "name is none of user.*"),
    ("stored", "DELETE FROM storage_locations WHERE blob_id = 1", "no backend has them"),
    ("stored", "UPDATE packages SET backend_ids = '[\"local\",\"far\"]'", "has no manifest in backend far"),
    ("events", "UPDATE events SET data = '[]'", "its data is no JSON object"),
    ("probes", "UPDATE backend_probes SET findings = '{}'", "its findings are no JSON array"),
    ("trees", "UPDATE packages SET file_count = 7", "says 7 files and 3 bytes, and has 3 files and 3 bytes"),
    ("trees", "UPDATE entries SET parent_id = 2002 WHERE entry_id = 2002", "no package leads to this directory"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "statement", "says"), BREAKS, ids=[f"{row[0]}-{n}" for n, row in enumerate(BREAKS)])
def test_what_is_wrong_is_found(published: Catalog, check: str, statement: str, says: str) -> None:
    change(published, statement)
    result = results_of(published)[check]
    assert result.count == len(result.kept) > 0
    assert any(says in f"{trouble.where}: {trouble.what}" for trouble in result.kept), result.kept
    assert all(trouble.mend for trouble in result.kept)


@pytest.fixture
def hidden(published: Catalog) -> Catalog:
    """The package of `published`, deleted; its NAME has been tagged before."""
    published.change(partial(set_tag, name="zlib", tag="good", version="1.3", uid=0, now_ns=6))
    published.change(partial(set_tag, name="zlib", tag="good", version="", uid=0, now_ns=7))
    published.change(partial(delete_package, name="zlib", version="1.3", uid=0, now_ns=8))
    return published


@pytest.fixture
def tagged(published: Catalog) -> Catalog:
    """The package of `published`, with a tag and a pin."""
    for tag in ("good", "latest"):
        published.change(partial(set_tag, name="zlib", tag=tag, version="1.3", uid=0, now_ns=6))
    return published


DELETED_BREAKS = [
    ("DELETE FROM entries WHERE entry_id = 2001", "zlib/1.3: its root directory is missing"),
    ("UPDATE entries SET parent_id = 2010 WHERE entry_id = 2001", "zlib/1.3: its root is not aside"),
    ("UPDATE deleted_packages SET root_id = 2006", "zlib/1.3: its root is not aside"),
    (
        (
            "INSERT INTO packages SELECT deletion_id, name, version, root_id, producer, retention_class, "
            "publisher_uid, published_at_ns, file_count, size_bytes, manifest_blob_id, backend_ids "
            "FROM deleted_packages"
        ),
        "zlib/1.3: is published, too",
    ),
    ("UPDATE deleted_packages SET manifest_blob_id = 1", "zlib/1.3: its manifest is not known"),
    ("UPDATE deleted_packages SET manifest_blob_id = 99", "zlib/1.3: its manifest is not known"),
]
TAG_BREAKS = [
    ("UPDATE package_tags SET tag = '../x' WHERE tag = 'good'", "zlib/../x: is no TAG"),
    ("UPDATE package_tags SET version = '9' WHERE tag = 'good'", "zlib/good: points to 9, which is not published"),
    ("DELETE FROM packages", "zlib/good: points to 1.3, which is not published"),
    (
        "UPDATE package_names SET latest_version = '9'",
        "zlib/latest: is pinned to 1.3, but latest is another one",
    ),
]


@pytest.mark.parametrize(("statement", "says"), DELETED_BREAKS)
def test_what_is_wrong_with_deleted_packages(hidden: Catalog, statement: str, says: str) -> None:
    assert {name: result.kept for name, result in results_of(hidden).items() if result.count} == {}
    change(hidden, statement)
    assert says in [f"{trouble.where}: {trouble.what}" for trouble in results_of(hidden)["deleted"].kept]


@pytest.mark.parametrize(("statement", "says"), TAG_BREAKS)
def test_what_is_wrong_with_tags(tagged: Catalog, statement: str, says: str) -> None:
    assert {name: result.kept for name, result in results_of(tagged).items() if result.count} == {}
    change(tagged, statement)
    assert says in [f"{trouble.where}: {trouble.what}" for trouble in results_of(tagged)["tags"].kept]


@pytest.mark.parametrize("gone", [(2003,), (2005,), (2002, 2003)])
def test_a_purge_that_is_half_done_is_sound(hidden: Catalog, gone: tuple[int, ...]) -> None:
    """Names of one file go in different transactions. Of a package that can be restored, none may be missing."""
    hidden.change(partial(drop_entries, entry_ids=gone))
    assert results_of(hidden)["links"].count
    hidden.change(partial(begin_purge, deletion_id=1, before_ns=9))
    assert {name: result.kept for name, result in results_of(hidden).items() if result.count} == {}


def test_directories_of_deleted_packages_are_not_adrift(hidden: Catalog) -> None:
    change(hidden, "UPDATE entries SET parent_id = 1999, name = x'78' WHERE entry_id = 2004")
    [trouble] = results_of(hidden)["trees"].kept
    assert trouble.where == "entries"
    change(hidden, "UPDATE entries SET parent_id = 2002 WHERE entry_id = 2002")
    named = {trouble.where for trouble in results_of(hidden)["trees"].kept} - {"entries"}
    assert [name.split()[1] for name in named] == ["2002"]


def test_every_check_is_tried() -> None:
    """But SQLite's own, which has a test of its own."""
    tried = {row[0] for row in BREAKS} | {"deleted", "tags"}
    assert {check.name for check in CHECKS} <= tried


def test_a_damaged_page(published: Catalog) -> None:
    """The others go on, and say what cannot be read."""
    with closing(sqlite3.connect(published.path)) as raw:
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        [page] = raw.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'").fetchone()
        [size] = raw.execute("PRAGMA page_size").fetchone()
    with published.path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    results = results_of(published)
    assert results["sqlite"].count
    assert "cannot be read to the end" in results["events"].kept[0].what
    assert not results["trees"].count


def test_a_place_is_named_by_its_path(published: Catalog) -> None:
    change(published, "UPDATE entries SET size_bytes = 9 WHERE entry_id = 2003")
    [trouble] = [kept for kept in results_of(published)["files"].kept if "2003" in kept.where]
    assert trouble.where == "entry 2003 (zlib/1.3/dir/\udcff one)"


def test_findings_are_counted_and_few_are_kept(published: Catalog) -> None:
    """Memory does not grow with what is wrong."""
    change(
        published,
        "WITH RECURSIVE n(i) AS (SELECT 3000 UNION ALL SELECT i + 1 FROM n WHERE i < 102999) "
        "INSERT INTO entries SELECT i, 77, i, i, 1, 9999, 0, 0, 0, 0, 0, 1, 0, x'', 0 FROM n",
    )
    tracemalloc.start()
    results = results_of(published)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert results["entries"].count == results["parents"].count == 100_000
    assert len(results["entries"].kept) == FINDINGS_KEPT
    assert peak < 4 << 20


def test_it_can_be_stopped(published: Catalog) -> None:
    """Within a query: here one that would take days."""
    with CheckReader(published.path) as reader:
        reader.stop()
        with pytest.raises(InterruptedError):
            reader._result(
                "endless",
                "",
                "",
                lambda: reader._rows(
                    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1 << 50) "
                    "SELECT max(i), '' FROM n"
                ),
            )


@given(st.text(st.sampled_from("aZ09@._+:~-/ \0é[]^*?"), max_size=5) | st.text(max_size=3))
@example("a" * 128)
@example("a" * 129)
@example("-a")
@example("a-")
@example("a\0/")
def test_the_rule_of_names_is_the_same_in_sql(name: str) -> None:
    with closing(system_sqlite.connect(":memory:")) as raw:
        [wrong] = raw.execute(f"SELECT {_name_is_wrong('name')} FROM (SELECT ? AS name)", (name,)).fetchone()
    assert bool(wrong) is not is_valid_name(name.encode())
