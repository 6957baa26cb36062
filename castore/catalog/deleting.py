"""Packages that are deleted: hidden, restored, and at last taken out of the catalog. Touches no object.

A deleted package leaves `packages` for `deleted_packages`, and its root hangs below no NAME any more. Its entries stay,
so all its blobs are needed as before. `docs/decisions/0024-deletion.md` has the order of all this.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from castore.catalog.package_tree import TreeReader
from castore.catalog.reader import package_of
from castore.catalog.records import Package
from castore.catalog.writer import Transaction

_SAME: Final = (
    "name, version, root_id, producer, retention_class, publisher_uid, published_at_ns, file_count, "
    "size_bytes, manifest_blob_id, backend_ids"
)
_DELETED: Final = (
    "deletion_id, name, version, root_id, producer, retention_class, publisher_uid, published_at_ns, file_count, "
    "deleted_packages.size_bytes, blobs.algorithm, blobs.digest, backend_ids, deleted_at_ns, deleted_by_uid, "
    "is_purging FROM deleted_packages JOIN blobs ON blobs.blob_id = deleted_packages.manifest_blob_id"
)


@dataclass(frozen=True, slots=True)
class DeletedPackage:
    """A package that can be restored, unless `is_purging`; the number in `package` is that of the deletion."""

    package: Package
    deleted_at_ns: int
    deleted_by_uid: int
    is_purging: bool


def _deleted(row: Any) -> DeletedPackage:
    return DeletedPackage(package_of(row[:13]), row[13], row[14], bool(row[15]))


class DeletedReader(TreeReader):
    """A connection that looks at deleted packages."""

    def deleted_packages(self, before_ns: int) -> list[DeletedPackage]:
        """Those that were deleted before a time, and those that are being purged; in the order of deletion."""
        rows = self._rows(f"SELECT {_DELETED} WHERE deleted_at_ns < ? OR is_purging ORDER BY deletion_id", (before_ns,))
        return [_deleted(row) for row in rows]


def delete_package(transaction: Transaction, name: str, version: str, *, uid: int, now_ns: int) -> bool:
    """Hide a package from every reader of packages; `latest` moves. False when there is no such package."""
    execute = transaction.execute
    row = execute(
        f"INSERT INTO deleted_packages ({_SAME}, deleted_at_ns, deleted_by_uid, is_purging) "
        f"SELECT {_SAME}, ?, ?, 0 FROM packages WHERE name = ? AND version = ? RETURNING root_id",
        (now_ns, uid, name, version),
    ).fetchone()
    if row is None:
        return False
    execute("DELETE FROM packages WHERE name = ? AND version = ?", (name, version))
    execute("UPDATE entries SET parent_id = -entry_id WHERE entry_id = ?", (row[0],))
    move_latest(transaction, name, now_ns)
    return True


def packages_of_name(transaction: Transaction, name: str) -> tuple[list[Package], set[str]]:
    """The published packages of a NAME, and the versions that have a tag."""
    rows = transaction.execute(
        "SELECT package_id, name, version, root_id, producer, retention_class, publisher_uid, published_at_ns, "
        "file_count, packages.size_bytes, blobs.algorithm, blobs.digest, backend_ids FROM packages "
        "JOIN blobs ON blobs.blob_id = manifest_blob_id WHERE name = ?",
        (name,),
    )
    packages = [package_of(row) for row in rows]
    tags = transaction.execute("SELECT version FROM package_tags WHERE name = ?", (name,))
    return packages, {row[0] for row in tags}


def deleted_package(transaction: Transaction, name: str, version: str) -> DeletedPackage | None:
    """The deletion of a NAME/VERSION that was made last."""
    row = transaction.execute(
        f"SELECT {_DELETED} WHERE name = ? AND version = ? ORDER BY deletion_id DESC LIMIT 1", (name, version)
    ).fetchone()
    return None if row is None else _deleted(row)


def restore_package(transaction: Transaction, deleted: DeletedPackage, now_ns: int) -> None:
    """Show it again, as it was. It must not be purging, and its NAME/VERSION not be taken.

    It counts as stored where its manifest still is: a backend may have been retired meanwhile.
    """
    execute = transaction.execute
    package = deleted.package
    number = (package.package_id,)
    execute(f"INSERT INTO packages ({_SAME}) SELECT {_SAME} FROM deleted_packages WHERE deletion_id = ?", number)
    execute("DELETE FROM deleted_packages WHERE deletion_id = ?", number)
    execute(
        "UPDATE packages SET backend_ids = coalesce((SELECT json_group_array(value) FROM (SELECT value "
        "  FROM json_each(packages.backend_ids) WHERE value IN (SELECT backend_id FROM storage_locations "
        "    WHERE blob_id = manifest_blob_id AND status <> 'deleting') ORDER BY key) HAVING count(*) > 0), "
        "  backend_ids) "
        "WHERE root_id = ?",
        (package.root_id,),
    )
    execute(
        "UPDATE entries SET parent_id = (SELECT inode FROM package_names WHERE name = ?) WHERE entry_id = ?",
        (package.name, package.root_id),
    )
    move_latest(transaction, package.name, now_ns)


def move_latest(transaction: Transaction, name: str, now_ns: int) -> str:
    """`latest` of a NAME is its pin, else the version published last, else ''; that is returned."""
    row = transaction.execute(
        "UPDATE package_names SET mtime_ns = :now, latest_version = coalesce("
        "  (SELECT version FROM package_tags WHERE name = :name AND tag = 'latest'), "
        "  (SELECT version FROM packages WHERE name = :name ORDER BY published_at_ns DESC, package_id DESC LIMIT 1), "
        "  '') WHERE name = :name RETURNING latest_version",
        {"name": name, "now": now_ns},
    ).fetchone()
    return "" if row is None else str(row[0])


# purging


def begin_purge(transaction: Transaction, deletion_id: int, before_ns: int) -> bool:
    """From now on it cannot be restored. False when it was restored, or was deleted later than `before_ns`."""
    cursor = transaction.execute(
        "UPDATE deleted_packages SET is_purging = 1 WHERE deletion_id = ? AND (deleted_at_ns < ? OR is_purging)",
        (deletion_id, before_ns),
    )
    return bool(cursor.rowcount)


def manifest_backends(transaction: Transaction, deletion_id: int) -> list[str]:
    """Where the manifest of a deleted package has a location still, whatever its status."""
    rows = transaction.execute(
        "SELECT backend_id FROM deleted_packages JOIN storage_locations ON blob_id = manifest_blob_id "
        "WHERE deletion_id = ? ORDER BY backend_id",
        (deletion_id,),
    )
    return [row[0] for row in rows]


def drop_entries(transaction: Transaction, entry_ids: Sequence[int]) -> None:
    """Take entries of a package that is purged away, further names of a file before the one its attributes go with."""
    numbers = json.dumps(list(entry_ids))
    transaction.execute("DELETE FROM entry_attributes WHERE inode IN (SELECT value FROM json_each(?))", (numbers,))
    transaction.execute("DELETE FROM entries WHERE entry_id IN (SELECT value FROM json_each(?))", (numbers,))


def end_purge(transaction: Transaction, deletion_id: int) -> None:
    """Nothing of a deleted package is left; its manifest has no location."""
    row = transaction.execute(
        "DELETE FROM deleted_packages WHERE deletion_id = ? RETURNING manifest_blob_id", (deletion_id,)
    ).fetchone()
    if row is not None:
        transaction.execute(
            "DELETE FROM blobs WHERE blob_id = :blob "
            "AND NOT EXISTS (SELECT 1 FROM storage_locations WHERE blob_id = :blob) "
            "AND NOT EXISTS (SELECT 1 FROM packages WHERE manifest_blob_id = :blob) "
            "AND NOT EXISTS (SELECT 1 FROM deleted_packages WHERE manifest_blob_id = :blob)",
            {"blob": row[0]},
        )
