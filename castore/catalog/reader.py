"""Read-only access to the catalog: single lookups inline (about 10 us), scans in pages. It never writes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, Self

from castore.catalog.connection import executor, open_reader, sqlite_errors
from castore.catalog.records import (
    GOOD_STATUSES,
    Blob,
    Entry,
    Kind,
    Location,
    LocationStatus,
    Package,
    PackageName,
    StoredProbe,
    Tag,
    Use,
    foreign_row,
    rows_as_written,
)
from castore.catalog.uses import paths_of
from castore.digest import CHECKSUM_BYTES, BlobSummary, Digest
from castore.errors import StateError

_ENTRY: Final = (
    "entry_id, parent_id, name, inode, kind, mode, uid, gid, mtime_ns, ctime_ns, size_bytes, nlink, blob_id, target, "
    "shared_inode"
)
_ENTRY_COLUMNS: Final = 15
_ENTRY_OF: Final = ", ".join(f"entries.{column}" for column in _ENTRY.split(", "))
_BLOB: Final = "blob_id, algorithm, digest, size_bytes, block_size_bytes, checksum_algorithm, checksums"
_BLOB_OF: Final = ", ".join(f"blobs.{column}" for column in _BLOB.split(", "))
_BY_NUMBER: Final = ("entry_id = ?", "shared_inode = ? AND shared_inode <> 0 LIMIT 1")
"""How an inode number is found: its own entry, or, where that was purged, one that shows it. Those are all alike."""
_LOOKED_AT: Final = 1024
"""Entries among which the next directory is looked for: a quarter of a millisecond."""
_NAME: Final = "name, inode, latest_inode, uid, gid, mode, mtime_ns, latest_version"
_PACKAGE: Final = (
    "package_id, name, version, root_id, producer, retention_class, publisher_uid, published_at_ns, file_count, "
    "packages.size_bytes, blobs.algorithm, blobs.digest, backend_ids"
)
_TAG: Final = "name, tag, version, inode, set_at_ns FROM package_tags"
_AFTER_ALL: Final = "\x7f"
"""Sorts behind every character of a NAME and a VERSION."""
_PACKAGE_FROM: Final = "FROM packages JOIN blobs ON blobs.blob_id = packages.manifest_blob_id"


_ENTRY_TYPES: Final = (int, int, bytes, *[int] * 10, bytes, int)
_BLOB_TYPES: Final = (int, str, bytes, int, int, str, bytes)
_PACKAGE_TYPES: Final = (int, str, str, int, str, str, *[int] * 4, str, bytes, str)
_NAME_TYPES: Final = (str, *[int] * 6, str)
_TAG_TYPES: Final = (str, str, str, int, int)
_KINDS: Final = {int(kind): kind for kind in Kind}


def _entry(row: Any) -> Entry:
    kind = _KINDS.get(row[4])
    # A set-uid bit of a forged catalog would come to life in an export.
    if tuple(map(type, row)) != _ENTRY_TYPES or kind is None or row[5] & ~0o777:
        raise foreign_row(f"entry {row[0]!r}")
    return Entry(row[0], row[1], row[2], row[3], kind, *row[5:])


def _blob(row: Any) -> Blob:
    if tuple(map(type, row)) != _BLOB_TYPES or row[3] < 0 or row[4] <= 0:
        raise foreign_row(f"blob {row[0]!r}")
    if row[5] not in CHECKSUM_BYTES:
        raise foreign_row(f"blob {row[0]}: block checksums of an unknown algorithm {row[5]!r}")
    checksum_bytes = -(-row[3] // row[4]) * CHECKSUM_BYTES[row[5]]
    if len(row[6]) != checksum_bytes:
        raise foreign_row(f"blob {row[0]}: block checksums of {len(row[6])} bytes instead of {checksum_bytes}")
    with rows_as_written():
        return Blob(row[0], BlobSummary(Digest(row[1], row[2]), *row[3:]))


def package_of(row: Any) -> Package:
    """A package from the columns that it has in `packages` and in `deleted_packages`."""
    if tuple(map(type, row)) != _PACKAGE_TYPES:
        raise foreign_row(f"package {row[1]!r}/{row[2]!r}")
    with rows_as_written():
        fields: tuple[Any, ...] = (*row[:10], Digest(row[10], row[11]), tuple(json.loads(row[12])))
    return Package(*fields)


def _name(row: Any) -> PackageName:
    if tuple(map(type, row)) != _NAME_TYPES:
        raise foreign_row(f"name {row[0]!r}")
    return PackageName(*row)


def _tag(row: Any) -> Tag:
    if tuple(map(type, row)) != _TAG_TYPES:
        raise foreign_row(f"tag {row[0]!r}/{row[1]!r}")
    return Tag(*row)


class CatalogReader:
    """One read-only connection. Each call sees all that was committed before it. Use it from one thread at a time.

    Raises, on opening, StateError when there is no catalog and CatalogTooNew for one from the future.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = open_reader(path)
        self._execute = executor(self._database.conn, path)

    @classmethod
    def open(cls, path: Path) -> CatalogReader:
        """The catalog at `path`."""
        return cls(path)

    def reopen(self) -> None:
        """Read what lies at the path now, where another catalog has taken its place. Raises as opening does; then the
        one before is read on.
        """
        database = open_reader(self.path)
        self._database.close()
        self._database = database
        self._execute = executor(database.conn, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._database.close()

    def _one(self, sql: str, *parameters: Any) -> Any:
        return self._execute(sql, parameters).fetchone()

    def _rows(self, sql: str, parameters: Any = ()) -> Iterator[Any]:
        with sqlite_errors(self.path):
            # Not `yield from`: given up halfway, it would close the cursor, perhaps after the connection.
            for row in self._execute(sql, parameters):  # noqa: UP028
                yield row

    def catalog_id(self) -> str:
        """The UUID made when the catalog was made."""
        return str(self._one("SELECT catalog_id FROM catalog_info")[0])

    def next_inode(self) -> int:
        """The first inode number that was not given out yet."""
        return int(self._one("SELECT next_value FROM sequences WHERE name = 'inode'")[0])

    def quick_check(self) -> None:
        """Read all of it, as SQLite's quick check does. Raises StateError when it is damaged."""
        said = [str(row[0]) for row in self._rows("PRAGMA quick_check(1)")]
        if said != ["ok"]:
            raise StateError(f"{self.path}: is damaged: {'; '.join(said)}")

    # entries

    def entry(self, inode: int) -> Entry | None:
        """The entry whose inode this is (the first name of a hard-linked one), or one that shows it."""
        for where in _BY_NUMBER:
            row = self._one(f"SELECT {_ENTRY} FROM entries WHERE {where}", inode)
            if row is not None:
                return _entry(row)
        return None

    def file(self, inode: int) -> tuple[Entry, Blob | None] | None:
        """As `entry`, with its blob when it is a file. One query is half of what two cost."""
        for where in _BY_NUMBER:
            row = self._one(
                f"SELECT {_ENTRY_OF}, {_BLOB_OF} FROM entries LEFT JOIN blobs ON blobs.blob_id = entries.blob_id "
                f"WHERE {where}",
                inode,
            )
            if row is not None:
                entry, blob = row[:_ENTRY_COLUMNS], row[_ENTRY_COLUMNS:]
                return _entry(entry), None if blob[0] is None else _blob(blob)
        return None

    def lookup(self, parent_id: int, name: bytes) -> Entry | None:
        """The entry of that name in a directory."""
        row = self._one(f"SELECT {_ENTRY} FROM entries WHERE parent_id = ? AND name = ?", parent_id, name)
        return None if row is None else _entry(row)

    def children(self, parent_id: int, after: int, limit: int) -> list[Entry]:
        """Up to `limit` entries of a directory with an entry_id above `after`, ascending."""
        rows = self._rows(
            f"SELECT {_ENTRY} FROM entries WHERE parent_id = ? AND entry_id > ? ORDER BY entry_id LIMIT ?",
            (parent_id, after, limit),
        )
        return [_entry(row) for row in rows]

    def files_after(
        self, parent_id: int, after: int | bytes, limit: int, largest_bytes: int
    ) -> list[tuple[int, bytes, Blob | None]]:
        """(entry_id, name, blob) of up to `limit` entries of a directory, in order of their names after a name, or of
        their entry_ids after an entry_id. The blob is that of a file of 1 to `largest_bytes`, None for whatever else
        there is, further names of a hard-linked file among it.
        """
        column = "name" if isinstance(after, bytes) else "entry_id"
        rows = self._rows(
            f"SELECT entry_id, name, {_BLOB_OF} FROM entries LEFT JOIN blobs ON blobs.blob_id = entries.blob_id AND "
            f"blobs.size_bytes BETWEEN 1 AND ? AND inode = entry_id WHERE parent_id = ? AND {column} > ? "
            f"ORDER BY {column} LIMIT ?",
            (largest_bytes, parent_id, after, limit),
        )
        return [(row[0], row[1], None if row[2] is None else _blob(row[2:])) for row in rows]

    def directory_after(self, parent_id: int, after: int | bytes) -> int | None:
        """The inode of the first directory among the next 1024 entries of a directory, ordered as in `files_after`."""
        column = "name" if isinstance(after, bytes) else "entry_id"
        row = self._one(
            f"SELECT inode FROM (SELECT inode, kind, {column} FROM entries WHERE parent_id = ? AND {column} > ? "
            f"ORDER BY {column} LIMIT {_LOOKED_AT}) WHERE kind = {Kind.DIRECTORY} ORDER BY {column} LIMIT 1",
            parent_id,
            after,
        )
        return None if row is None else int(row[0])

    def attributes(self, inode: int) -> dict[bytes, bytes]:
        """The extended attributes that the publisher set."""
        found = dict(self._rows("SELECT name, value FROM entry_attributes WHERE inode = ?", (inode,)))
        if not all(isinstance(each, bytes) for pair in found.items() for each in pair):
            raise foreign_row(f"an attribute of entry {inode}")
        return found

    # names and packages

    def package_name(self, name: str) -> PackageName | None:
        """The row of a NAME that was ever published."""
        row = self._one(f"SELECT {_NAME} FROM package_names WHERE name = ?", name)
        return None if row is None else _name(row)

    def package_name_by_inode(self, inode: int) -> PackageName | None:
        """The NAME whose directory or `latest` link has that inode."""
        row = self._one(f"SELECT {_NAME} FROM package_names WHERE inode = ? OR latest_inode = ?", inode, inode)
        return None if row is None else _name(row)

    def package_names(self, after: int, limit: int) -> list[PackageName]:
        """Up to `limit` names that have a published version, with an inode above `after`, ascending."""
        rows = self._rows(
            f"SELECT {_NAME} FROM package_names WHERE inode > ? AND latest_version <> '' ORDER BY inode LIMIT ?",
            (after, limit),
        )
        return [_name(row) for row in rows]

    def package(self, name: str, version: str) -> Package | None:
        """One published package; `latest` is the version published last or pinned, a tag the one it points to."""
        if version == "latest":
            known = self.package_name(name)
            version = known.latest_version if known else ""
        elif (tag := self.tag(name, version)) is not None:
            version = tag.version
        row = self._one(f"SELECT {_PACKAGE} {_PACKAGE_FROM} WHERE name = ? AND version = ?", name, version)
        return None if row is None else package_of(row)

    def tag(self, name: str, tag: str) -> Tag | None:
        """A tag of a NAME; `latest` when it is pinned."""
        row = self._one(f"SELECT {_TAG} WHERE name = ? AND tag = ?", name, tag)
        return None if row is None else _tag(row)

    def tag_by_inode(self, inode: int) -> Tag | None:
        """The tag whose link has that inode."""
        row = self._one(f"SELECT {_TAG} WHERE inode = ? AND inode <> 0", inode)
        return None if row is None else _tag(row)

    def tags(self, name: str | None = None) -> list[Tag]:
        """The tags of a NAME, or of all, in order of text; the pin of `latest` among them."""
        if name is None:
            return [_tag(row) for row in self._rows(f"SELECT {_TAG} ORDER BY name, tag")]
        return [_tag(row) for row in self._rows(f"SELECT {_TAG} WHERE name = ? ORDER BY tag", (name,))]

    def package_by_root(self, root_id: int) -> Package | None:
        """The package whose root directory has that inode."""
        row = self._one(f"SELECT {_PACKAGE} {_PACKAGE_FROM} WHERE root_id = ?", root_id)
        return None if row is None else package_of(row)

    def packages(self) -> Iterator[Package]:
        """All packages, by name, then by the time of publish."""
        rows = self._rows(f"SELECT {_PACKAGE} {_PACKAGE_FROM} ORDER BY name, published_at_ns, version")
        return (package_of(row) for row in rows)

    def names(self, prefix: str, limit: int) -> list[str]:
        """NAMEs that begin so and have a published version, in order of text."""
        rows = self._rows(
            "SELECT name FROM package_names WHERE name >= ? AND name < ? AND latest_version <> '' "
            "ORDER BY name LIMIT ?",
            (prefix, prefix + _AFTER_ALL, limit),
        )
        return [row[0] for row in rows]

    def versions(self, name: str, prefix: str, limit: int) -> list[str]:
        """Published versions of a NAME that begin so, in order of text."""
        rows = self._rows(
            "SELECT version FROM packages WHERE name = ? AND version >= ? AND version < ? ORDER BY version LIMIT ?",
            (name, prefix, prefix + _AFTER_ALL, limit),
        )
        return [row[0] for row in rows]

    # blobs and locations

    def blob(self, blob_id: int) -> Blob | None:
        """A blob with its block checksums."""
        row = self._one(f"SELECT {_BLOB} FROM blobs WHERE blob_id = ?", blob_id)
        return None if row is None else _blob(row)

    def blob_by_digest(self, digest: Digest) -> Blob | None:
        """A blob with its block checksums."""
        row = self._one(f"SELECT {_BLOB} FROM blobs WHERE digest = ? AND algorithm = ?", digest.raw, digest.algorithm)
        return None if row is None else _blob(row)

    def blob_digest(self, blob_id: int) -> tuple[Digest, int] | None:
        """A blob's digest and size in bytes, without its checksums."""
        row = self._one("SELECT algorithm, digest, size_bytes FROM blobs WHERE blob_id = ?", blob_id)
        with rows_as_written():
            return None if row is None else (Digest(row[0], row[1]), int(row[2]))

    def digests(self, algorithm: str, low: bytes, high: bytes, limit: int) -> list[tuple[int, Digest, int]]:
        """Up to `limit` (blob_id, digest, size_bytes) with low <= raw digest < high, ascending."""
        rows = self._rows(
            "SELECT blob_id, digest, size_bytes FROM blobs WHERE algorithm = ? AND digest >= ? AND digest < ? "
            "ORDER BY digest LIMIT ?",
            (algorithm, low, high, limit),
        )
        with rows_as_written():
            return [(row[0], Digest(algorithm, row[1]), row[2]) for row in rows]

    def locations(self, blob_id: int) -> list[Location]:
        """Every place that the blob is stored, whatever its status; ordered by backend id."""
        rows = self._rows(
            "SELECT algorithm, digest, backend_id, status, reason, stored_at_ns, verified_at_ns "
            "FROM storage_locations JOIN blobs USING (blob_id) WHERE blob_id = ? ORDER BY backend_id",
            (blob_id,),
        )
        with rows_as_written():
            return [Location(Digest(row[0], row[1]), row[2], LocationStatus(row[3]), *row[4:]) for row in rows]

    def good_backends(self, digest: Digest) -> set[str]:
        """The backends that hold a blob in a good location, as of now: a decision needs the writer's answer."""
        return self.good_backends_of({digest}).get(digest, set())

    def good_backends_of(self, digests: Collection[Digest]) -> dict[Digest, set[str]]:
        """As `good_backends`, of some hundred blobs by one query; without those that no backend has."""
        marks = ", ".join("?" * len(digests))
        rows = self._rows(
            "SELECT algorithm, digest, backend_id FROM storage_locations JOIN blobs USING (blob_id) "
            f"WHERE digest IN ({marks}) AND status IN (?, ?)",
            (*(digest.raw for digest in digests), *GOOD_STATUSES),
        )
        found: dict[Digest, set[str]] = {}
        for algorithm, raw, backend_id in rows:
            found.setdefault(Digest(algorithm, raw), set()).add(backend_id)
        return found

    def paths_of(self, blob_id: int, limit: int) -> tuple[list[Use], int]:
        """Up to `limit` packages and paths that use a blob, oldest first, and how many there are in all."""
        return paths_of(self._execute, blob_id, limit)

    def location_counts(self) -> list[tuple[str, LocationStatus, int, int]]:
        """(backend_id, status, number of locations, bytes), for every pair that occurs."""
        rows = self._rows(
            "SELECT backend_id, status, count(*), sum(size_bytes) FROM storage_locations JOIN blobs USING (blob_id) "
            "GROUP BY backend_id, status ORDER BY backend_id, status"
        )
        with rows_as_written():
            return [(row[0], LocationStatus(row[1]), row[2], row[3]) for row in rows]

    def probes(self) -> dict[str, StoredProbe]:
        """What the last probe of each backend found, by backend id; a backend that was never probed has none."""
        rows = self._rows("SELECT backend_id, probed_at_ns, server, findings FROM backend_probes ORDER BY backend_id")
        with rows_as_written():
            return {row[0]: StoredProbe(row[0], row[1], row[2], tuple(json.loads(row[3]))) for row in rows}

    def totals(self) -> tuple[int, int]:
        """(number of packages, bytes of their files)."""
        row = self._one("SELECT count(*), coalesce(sum(size_bytes), 0) FROM packages")
        return row[0], row[1]
