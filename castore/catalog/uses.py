"""Which packages and paths use a blob: queries for any connection to the catalog. They change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from castore.catalog.records import Use

Execute = Callable[..., Any]
"""`execute(sql, parameters)` of a connection."""

_NAMES_LOOKED_AT: Final = 1000
"""Names of a blob that are followed up to their packages: an empty file may have a million of them."""

PATH_BYTES: Final = 16 * 1024
"""Paths that are told: four times what one call to Linux can name. A forged tree that goes in circles has no end."""

_PACKAGES: Final = """
WITH RECURSIVE up(parent_id, name) AS (
    SELECT * FROM (SELECT parent_id, name FROM entries WHERE blob_id = :blob AND blob_id <> 0 LIMIT :names)
    UNION
    SELECT entries.parent_id, entries.name FROM up JOIN entries ON entries.entry_id = up.parent_id
)
SELECT package_names.name || '/' || CAST(up.name AS TEXT) AS ref
FROM up JOIN package_names ON package_names.inode = up.parent_id
UNION
SELECT name || '/' || version FROM packages WHERE manifest_blob_id = :blob
ORDER BY ref LIMIT :limit
"""

# The root of a deleted package hangs below no NAME, but below the negative of its own number.
_ANY_DELETED: Final = "SELECT EXISTS (SELECT 1 FROM entries WHERE parent_id < 0)"

_PATHS: Final = """
WITH RECURSIVE up(first_id, parent_id, name, path) AS (
    SELECT * FROM (
        SELECT entry_id, parent_id, name, x'' FROM entries WHERE blob_id = :blob AND blob_id <> 0
        ORDER BY entry_id LIMIT :names
    )
    UNION ALL
    SELECT first_id, entries.parent_id, entries.name, CAST(iif(path = x'', up.name, up.name || '/' || path) AS BLOB)
    FROM up JOIN entries ON entries.entry_id = up.parent_id WHERE length(path) < :longest
)
SELECT package_names.name || '/' || CAST(up.name AS TEXT), path FROM up
JOIN package_names ON package_names.inode = up.parent_id ORDER BY first_id
"""

FILES_BELOW: Final = """
WITH RECURSIVE folder(inode) AS (
    SELECT :root UNION
    SELECT entries.inode FROM folder JOIN entries ON entries.parent_id = folder.inode WHERE kind = 1
)
SELECT DISTINCT blob_id FROM folder JOIN entries ON entries.parent_id = folder.inode WHERE blob_id <> 0
"""
"""The blobs of all files below the directory with the inode `root`."""


def packages_of(execute: Execute, blob_id: int, limit: int) -> tuple[str, ...]:
    """Up to `limit` packages, as NAME/VERSION, that have the blob as a file or as their manifest; in order of text.

    Of a blob with more than 1000 names, some packages may be left out.
    """
    parameters = {"blob": blob_id, "names": _NAMES_LOOKED_AT, "limit": limit}
    return tuple(row[0] for row in execute(_PACKAGES, parameters))


def paths_of(execute: Execute, blob_id: int, limit: int) -> tuple[list[Use], int]:
    """Up to `limit` uses of a blob in published packages, oldest first, and how many there are in all.

    As a manifest, a blob is used with an empty path. Of a blob with more than 1000 names, those in deleted packages
    are counted with the others, and uses are looked for among the oldest.
    """
    manifests = "FROM packages WHERE manifest_blob_id = ?"
    rows = execute(f"SELECT name || '/' || version, x'' {manifests} ORDER BY package_id LIMIT ?", (blob_id, limit))
    uses = [Use(*row) for row in rows]
    count = execute(f"SELECT count(*) {manifests}", (blob_id,)).fetchone()[0]
    names = execute("SELECT count(*) FROM entries WHERE blob_id = ? AND blob_id <> 0", (blob_id,)).fetchone()[0]
    # Without deleted packages every name is a use: no more of them are followed up than are wanted.
    looked_at = _NAMES_LOOKED_AT if execute(_ANY_DELETED).fetchone()[0] else limit - len(uses)
    files = [Use(*row) for row in execute(_PATHS, {"blob": blob_id, "names": looked_at, "longest": PATH_BYTES})]
    if len(files) < names <= looked_at:
        names = len(files)
    return (uses + files)[:limit], count + names
