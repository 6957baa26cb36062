"""Building a catalog from manifests: the rows of packages and of what is stored, by whoever rebuilds. Opens no object.

A package is made in a savepoint: it comes whole or not at all. What is in the catalog already is never changed, but for
what manifests add: further locations, a newer `latest`, checksums that are stronger. Every location begins as
`failed: missing`, and becomes `stored` when its object is seen.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from castore.catalog.connection import executor, open_reader, open_writer
from castore.catalog.records import Kind
from castore.digest import SHA256_BLOCKS, BlobSummary, Digest
from castore.errors import FormatError

COMMIT_SECONDS: Final = 2.0
"""Packages share a durable commit for so long."""
LOG_PAGES: Final = 16_384
"""Of the write-ahead log, 64 MiB, before they are copied into the database: most pages are changed many times."""
FOLDERS_KEPT: Final = 10_000
"""Paths of folders that are remembered, some 2 MB; others are looked up by their names."""

_ENTRY_COLUMNS: Final = (
    "kind, mode, uid, gid, mtime_ns, ctime_ns, size_bytes, nlink, blob_id, target"  # what hard links share
)
_KNOWN: Final = (
    "name || '/' || version, package_id, published_at_ns, algorithm, digest "
    "FROM packages JOIN blobs ON blobs.blob_id = manifest_blob_id"
)
_BELOW: Final = """
WITH RECURSIVE below(entry_id, inode, kind) AS (
    SELECT entry_id, inode, kind FROM entries WHERE entry_id = :root UNION
    SELECT entries.entry_id, entries.inode, entries.kind FROM below JOIN entries ON parent_id = below.inode
    WHERE below.kind = 1
)
"""


class BlobsDiffer(Exception):
    """Two manifests say different things of one blob. `other` is what the catalog has."""

    def __init__(self, other: BlobSummary, summary: BlobSummary) -> None:
        super().__init__(
            f"says that {summary.digest} has {summary.size_bytes} bytes and certain checksums, "
            f"and another manifest says that it has {other.size_bytes} and others"
        )
        self.summary = summary


@dataclass(frozen=True, slots=True)
class Known:
    """A package that the catalog has."""

    ref: str
    package_id: int
    published_at_ns: int
    manifest: Digest


class CatalogBuilder:
    """A connection that holds the write lock but for moments. Use it from one thread at a time."""

    def __init__(self, path: Path, *, first_inode: int = 0) -> None:
        self.path = path
        # What was not committed durably is read from the manifests again; `close` makes all of it durable.
        self._database = open_writer(path, synchronous="NORMAL")
        self._connection = self._database.conn
        self._execute = executor(self._connection, path)
        self._committed = time.monotonic()
        self._execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        self._execute("CREATE TEMP TABLE links (inode INTEGER, entry_id INTEGER)")
        self._execute("CREATE INDEX temp.links_by_inode ON links (inode, entry_id)")
        self._execute("BEGIN IMMEDIATE")
        (self._next,) = self._execute("SELECT next_value FROM sequences WHERE name = 'inode'").fetchone()
        self._next = max(self._next, first_inode)
        self._tables = {row[0] for row in self._execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}

    def close(self) -> None:
        """Keep what is done, durably, and close."""
        self._commit()
        self._execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._database.close()

    def abandon(self) -> None:
        """Close, without what was not committed."""
        self._database.close()

    def _commit(self) -> None:
        self._execute("UPDATE sequences SET next_value = ? WHERE name = 'inode'", (self._next,))
        self._execute("COMMIT")
        self._committed = time.monotonic()

    def commit_now_and_then(self) -> None:
        """Make what is done durable, every some seconds."""
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self._commit()
            self._execute("BEGIN IMMEDIATE")

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is made inside stays, unless an exception leaves it."""
        first = self._next
        self._execute("SAVEPOINT package")
        try:
            yield
        except BaseException:
            self._execute("ROLLBACK TO package")
            self._next = first
            raise
        finally:
            self._execute("RELEASE package")

    def take_inode(self) -> int:
        """A number that nothing has."""
        self._next += 1
        return int(self._next) - 1

    # what is there

    def package_with_manifest(self, manifest: Digest) -> int:
        """The package that a manifest describes, or 0."""
        row = self._execute(
            "SELECT package_id FROM packages JOIN blobs ON blob_id = manifest_blob_id "
            "WHERE digest = ? AND algorithm = ?",
            (manifest.raw, manifest.algorithm),
        ).fetchone()
        return 0 if row is None else int(row[0])

    def is_deleted(self, manifest: Digest) -> bool:
        """Whether a package was deleted that a manifest describes, and its manifest is not purged yet."""
        if "deleted_packages" not in self._tables:
            return False
        row = self._execute(
            "SELECT 1 FROM deleted_packages JOIN blobs ON blob_id = manifest_blob_id "
            "WHERE digest = ? AND algorithm = ?",
            (manifest.raw, manifest.algorithm),
        ).fetchone()
        return row is not None

    def _is_pinned(self, name: str) -> bool:
        if "package_tags" not in self._tables:
            return False
        row = self._execute("SELECT 1 FROM package_tags WHERE name = ? AND tag = 'latest'", (name,)).fetchone()
        return row is not None

    def package(self, name: str, version: str) -> Known | None:
        """The package of that name."""
        row = self._execute(f"SELECT {_KNOWN} WHERE name = ? AND version = ?", (name, version)).fetchone()
        return None if row is None else Known(row[0], row[1], row[2], Digest(row[3], row[4]))

    def packages_using(self, digest: Digest) -> list[Known]:
        """Every package that has a file with that blob."""
        rows = self._execute(
            "WITH RECURSIVE up(id) AS (SELECT parent_id FROM entries WHERE blob_id = (SELECT blob_id FROM blobs "
            "  WHERE digest = ? AND algorithm = ?) AND blob_id <> 0 "
            "UNION SELECT parent_id FROM up JOIN entries ON entry_id = up.id) "
            f"SELECT {_KNOWN} JOIN up ON root_id = up.id",
            (digest.raw, digest.algorithm),
        )
        return [Known(row[0], row[1], row[2], Digest(row[3], row[4])) for row in rows]

    # packages

    def add_name(self, name: str, version: str, published_at_ns: int, owner: tuple[int, int, int], inodes: Any) -> int:
        """NAME's row, with the owner, group and mode of its first version and the time of its last one; its inode.

        `inodes` are those that ingest/ has for the name, or None.
        """
        first, last = self._execute(
            "SELECT min(published_at_ns), max(published_at_ns) FROM packages WHERE name = ?", (name,)
        ).fetchone()
        row = self._execute("SELECT inode FROM package_names WHERE name = ?", (name,)).fetchone()
        if row is None:
            inode, latest_inode = inodes or (self.take_inode(), self.take_inode())
            self._execute(
                "INSERT INTO package_names VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (name, inode, latest_inode, *owner, published_at_ns, version),
            )
            return int(inode)
        if (last is None or published_at_ns > last) and not self._is_pinned(name):
            self._execute(
                "UPDATE package_names SET latest_version = ?, mtime_ns = max(mtime_ns, ?) WHERE name = ?",
                (version, published_at_ns, name),
            )
        if first is None or published_at_ns < first:
            self._execute("UPDATE package_names SET uid = ?, gid = ?, mode = ? WHERE name = ?", (*owner, name))
        return int(row[0])

    def add_package(self, row: Sequence[Any], manifest: BlobSummary, backend_id: str) -> None:
        """The row of a package, as `packages` has it from `name` to `size_bytes`."""
        self._execute(
            "INSERT INTO packages (name, version, root_id, producer, retention_class, publisher_uid, published_at_ns, "
            "file_count, size_bytes, manifest_blob_id, backend_ids) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, self.add_blob(manifest, backend_id), json.dumps([backend_id])),
        )

    def add_backend(self, package_id: int, backend_id: str, order: Sequence[str]) -> None:
        """A package is in a further backend; `order` is that in which publish waited for its backends."""
        (text,) = self._execute("SELECT backend_ids FROM packages WHERE package_id = ?", (package_id,)).fetchone()
        found = {*json.loads(text), backend_id}
        ids = [*(known for known in order if known in found), *sorted(found.difference(order))]
        self._execute("UPDATE packages SET backend_ids = ? WHERE package_id = ?", (json.dumps(ids), package_id))

    def add_locations_of(self, package_id: int, backend_id: str) -> None:
        """A package that is there has its manifest in a further backend: each of its blobs is looked for there."""
        root_id, manifest_blob_id = self._execute(
            "SELECT root_id, manifest_blob_id FROM packages WHERE package_id = ?", (package_id,)
        ).fetchone()
        self._execute(
            f"{_BELOW} INSERT OR IGNORE INTO storage_locations "
            "SELECT DISTINCT blob_id, :backend, 'failed', 'missing', 0, 0 FROM below "
            "JOIN entries USING (entry_id) WHERE blob_id <> 0 UNION "
            "SELECT :manifest, :backend, 'failed', 'missing', 0, 0",
            {"root": root_id, "manifest": manifest_blob_id, "backend": backend_id},
        )

    def drop_marks(self, backend_id: str) -> None:
        """What packages need now is not garbage any more, though a collection that died had marked it.

        Nobody collects garbage meanwhile, and nothing that was sent for a mark is under way any more.
        """
        self._execute(
            "UPDATE storage_locations AS here SET status = 'failed', reason = 'missing' "
            "WHERE status = 'deleting' AND backend_id = :backend AND (EXISTS (SELECT 1 FROM entries "
            "  WHERE entries.blob_id = here.blob_id AND entries.blob_id <> 0) "
            "  OR EXISTS (SELECT 1 FROM packages WHERE manifest_blob_id = here.blob_id))",
            {"backend": backend_id},
        )
        self._execute(
            "DELETE FROM deletions WHERE backend_id = :backend AND EXISTS (SELECT 1 FROM blobs "
            "JOIN storage_locations AS there USING (blob_id) WHERE blobs.digest = deletions.digest "
            "AND blobs.algorithm = deletions.algorithm AND there.backend_id = :backend AND status <> 'deleting')",
            {"backend": backend_id},
        )

    def newest_mark_ns(self, backend_id: str) -> int:
        """When the last object of a backend was marked whose deletion is not known to be over; 0 for none."""
        row = self._execute(
            "SELECT coalesce(max(begun_at_ns), 0) FROM deletions WHERE backend_id = ?", (backend_id,)
        ).fetchone()
        return int(row[0])

    def remove_package(self, package_id: int) -> None:
        """Take a package out again, with all its entries. Its blobs stay."""
        (root,) = self._execute("SELECT root_id FROM packages WHERE package_id = ?", (package_id,)).fetchone()
        self._execute("DELETE FROM packages WHERE package_id = ?", (package_id,))
        for table, column in (("entry_attributes", "inode"), ("entries", "entry_id")):
            self._execute(
                f"{_BELOW} DELETE FROM {table} WHERE {column} IN (SELECT entry_id FROM below)", {"root": root}
            )
        self._execute(
            "UPDATE package_names SET latest_version = coalesce((SELECT version FROM packages "
            "WHERE packages.name = package_names.name ORDER BY published_at_ns DESC, version DESC LIMIT 1), '') "
            "WHERE NOT EXISTS (SELECT 1 FROM packages WHERE packages.name = package_names.name "
            "AND version = latest_version)"
        )

    # blobs

    def add_blob(self, summary: BlobSummary, backend_id: str) -> int:
        """The blob_id of a blob, which is looked for in a backend. Raises BlobsDiffer."""
        digest = summary.digest
        row = self._execute(
            "SELECT blob_id, size_bytes, block_size_bytes, checksum_algorithm, checksums FROM blobs "
            "WHERE digest = ? AND algorithm = ?",
            (digest.raw, digest.algorithm),
        ).fetchone()
        columns = (summary.size_bytes, summary.block_size_bytes, summary.checksum_algorithm, summary.checksums)
        if row is None:
            (blob_id,) = self._execute(
                "INSERT INTO blobs (algorithm, digest, size_bytes, block_size_bytes, checksum_algorithm, checksums) "
                "VALUES (?, ?, ?, ?, ?, ?) RETURNING blob_id",
                (digest.algorithm, digest.raw, *columns),
            ).fetchone()
        else:
            blob_id, other = row[0], BlobSummary(digest, *row[1:])
            alike = row[2:4] == columns[1:3]
            if row[1] != summary.size_bytes or (alike and row[4] != summary.checksums):
                raise BlobsDiffer(other, summary)
            if summary.checksum_algorithm == SHA256_BLOCKS != other.checksum_algorithm:
                self.set_blob(summary)
        self._execute(
            "INSERT OR IGNORE INTO storage_locations VALUES (?, ?, 'failed', 'missing', 0, 0)", (blob_id, backend_id)
        )
        return int(blob_id)

    def set_blob(self, summary: BlobSummary) -> None:
        """Another size or other checksums for a blob."""
        self._execute(
            "UPDATE blobs SET size_bytes = ?, block_size_bytes = ?, checksum_algorithm = ?, checksums = ? "
            "WHERE digest = ? AND algorithm = ?",
            (
                *(summary.size_bytes, summary.block_size_bytes, summary.checksum_algorithm, summary.checksums),
                *(summary.digest.raw, summary.digest.algorithm),
            ),
        )

    def blob(self, digest: Digest) -> BlobSummary | None:
        """What the catalog has of a blob."""
        row = self._execute(
            "SELECT size_bytes, block_size_bytes, checksum_algorithm, checksums FROM blobs "
            "WHERE digest = ? AND algorithm = ?",
            (digest.raw, digest.algorithm),
        ).fetchone()
        return None if row is None else BlobSummary(digest, *row)

    def see_objects(self, backend_id: str, objects: Iterable[tuple[Digest, int, int]]) -> int:
        """A backend has these objects: (digest, size, time of its put). How many of them the catalog knows.

        Those of the right size make their locations `stored`, the others `failed: size_mismatch`.
        """
        known = 0
        for digest, size_bytes, modified_ns in objects:
            row = self._execute(
                "SELECT blob_id, size_bytes FROM blobs WHERE digest = ? AND algorithm = ?",
                (digest.raw, digest.algorithm),
            ).fetchone()
            if row is None:
                continue
            known += 1
            verdict = ("stored", "") if row[1] == size_bytes else ("failed", "size_mismatch")
            self._execute(
                "UPDATE storage_locations SET status = ?, reason = ?, stored_at_ns = ? "
                "WHERE blob_id = ? AND backend_id = ? AND status = 'failed' AND reason = 'missing'",
                (*verdict, max(modified_ns, 0), row[0], backend_id),
            )
        self.commit_now_and_then()
        return known

    def failed_counts(self, backend_id: str) -> dict[str, int]:
        """How many locations of a backend are failed, by reason."""
        rows = self._execute(
            "SELECT reason, count(*) FROM storage_locations WHERE backend_id = ? AND status = 'failed' GROUP BY reason",
            (backend_id,),
        )
        return dict(rows.fetchall())


class PackageTree:
    """The entries of one package while it is made. Raises FormatError for a tree that cannot be."""

    def __init__(self, builder: CatalogBuilder, parent_id: int, version: str, ctime_ns: int) -> None:
        self.root_id = 0
        self.file_count = self.size_bytes = 0
        self._builder = builder
        self._execute = builder._execute
        self._place = (parent_id, version.encode())
        self._ctime_ns = ctime_ns
        self._folders: dict[bytes, int] = {}
        self._execute("DELETE FROM links")

    def add(
        self,
        path: bytes,
        kind: Kind,
        mode: int,
        owner: tuple[int, int],
        mtime_ns: int,
        size_bytes: int,
        blob_id: int,
        target: bytes,
        attributes: dict[bytes, bytes],
    ) -> None:
        """One entry; its folder comes before it."""
        parent_id, name = self._place_of(path, kind)
        number = self._builder.take_inode()
        self._insert(
            number,
            parent_id,
            name,
            number,
            (int(kind), mode, *owner, mtime_ns, self._ctime_ns, size_bytes, 1, blob_id, target),
        )
        for attribute, value in attributes.items():
            self._execute("INSERT INTO entry_attributes VALUES (?, ?, ?)", (number, attribute, value))
        if not path:
            self.root_id = number
        if kind is Kind.DIRECTORY:
            self._remember(path, number)
        elif kind is Kind.FILE:
            self.file_count += 1
            self.size_bytes += size_bytes

    def add_link(self, path: bytes, kind: Kind, link_to: bytes) -> None:
        """A further name of an earlier file or symbolic link."""
        parent_id, name = self._place_of(path, kind)
        above, first_name = self._place_of(link_to, kind)
        row = self._execute(
            f"SELECT inode, {_ENTRY_COLUMNS} FROM entries WHERE parent_id = ? AND name = ?", (above, first_name)
        ).fetchone()
        if row is None:
            raise FormatError(f"{_shown(path)} is a link to {_shown(link_to)}, which does not come before it")
        if row[1] != int(kind) or kind is Kind.DIRECTORY:
            raise FormatError(f"{_shown(path)} is a link to {_shown(link_to)}, which is of another kind")
        number = self._builder.take_inode()
        self._insert(number, parent_id, name, row[0], row[1:])
        self._execute("INSERT INTO links VALUES (?, ?)", (row[0], number))
        self.file_count += kind is Kind.FILE

    def finish(self) -> None:
        """Hard links learn how many they are."""
        if not self.root_id:
            raise FormatError("has no entries")
        for inode, names in self._execute("SELECT inode, 1 + count(*) FROM links GROUP BY inode").fetchall():
            self._execute(
                "UPDATE entries SET nlink = ? WHERE entry_id = ? OR entry_id IN "
                "(SELECT entry_id FROM links WHERE inode = ?)",
                (names, inode, inode),
            )

    def _insert(self, number: int, parent_id: int, name: bytes, inode: int, columns: Sequence[Any]) -> None:
        cursor = self._execute(
            "INSERT OR IGNORE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
            (number, parent_id, name, inode, *columns),
        )
        if not cursor.rowcount:
            raise FormatError(f"two entries are named {_shown(name)} in one directory")

    def _place_of(self, path: bytes, kind: Kind) -> tuple[int, bytes]:
        """The directory that a path lies in, and the name there."""
        if not path:
            if self.root_id or kind is not Kind.DIRECTORY:
                raise FormatError("the root is not one directory")
            return self._place
        if not self.root_id:
            raise FormatError("does not begin with the root")
        above, _, name = path.rpartition(b"/")
        return self._folder(above), name

    def _folder(self, path: bytes) -> int:
        known = self._folders.get(path)
        if known is not None:
            return known
        inode = self.root_id
        for name in path.split(b"/"):
            row = self._execute(
                "SELECT inode FROM entries WHERE parent_id = ? AND name = ? AND kind = 1", (inode, name)
            ).fetchone()
            if row is None:
                raise FormatError(f"the directory {_shown(path)} does not come before what is in it")
            inode = row[0]
        self._remember(path, inode)
        return inode

    def _remember(self, path: bytes, inode: int) -> None:
        if len(self._folders) >= FOLDERS_KEPT:
            self._folders.clear()
            self._folders[b""] = self.root_id
        self._folders[path] = inode


def _shown(name: bytes) -> str:
    return repr(name[:200].decode(errors="backslashreplace"))


def row_count(path: Path) -> int:
    """How many packages, names and blobs a catalog has."""
    with closing(open_reader(path)) as database:
        return sum(
            int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
            for table in ("packages", "package_names", "blobs")
        )
