"""Equal files of several packages that show one inode number, so that the kernel keeps their pages once. Decides whose
numbers, and changes no number that anybody may have seen: `docs/decisions/0027-inodes-shared-by-packages.md`.

Equal are files of the same bytes, mode, owner and time of change that have no other names and no extended attributes.
All that share an inode have its ctime, too: that of the package which it came with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from castore.catalog.writer import Transaction

SHARED_BYTES: Final = 512 * 1024
"""The smallest file that shares an inode. To read it from the kernel's pages takes a third of the time that the daemon
takes, or less; below it is two thirds, since opening is what costs. It is larger than what is fetched ahead with its
siblings: which package's siblings these are, the number does not tell."""
EQUAL_LOOKED_AT: Final = 64
"""Names of the same bytes that are looked at for an equal file, the newest ones: 30 us."""

_EQUAL: Final = """
WITH equal(inode, entry_id) AS MATERIALIZED (
    SELECT node.inode, (
        SELECT entry_id FROM (
            SELECT * FROM entries WHERE entries.blob_id = blobs.blob_id AND entries.blob_id <> 0
            ORDER BY entry_id DESC LIMIT :looked_at
        ) AS there
        WHERE there.mode = node.mode & 511 AND there.uid = coalesce(:uid, node.uid)
        AND there.gid = coalesce(:gid, node.gid) AND there.mtime_ns = node.mtime_ns
        AND there.nlink = 1 AND there.inode = there.entry_id
        AND NOT EXISTS (SELECT 1 FROM entry_attributes AS of_it WHERE of_it.inode = there.entry_id)
        LIMIT 1
    )
    FROM workspace.nodes AS node CROSS JOIN blobs USING (digest, algorithm)
    WHERE version_inode = :version AND kind = 2 AND nlink = 1 AND node.size_bytes >= :smallest
    AND NOT EXISTS (SELECT 1 FROM workspace.attributes AS own WHERE own.inode = node.inode)
)
SELECT equal.inode, iif(shared_inode <> 0, shared_inode, entries.entry_id), ctime_ns
FROM equal JOIN entries USING (entry_id)
"""


@dataclass(frozen=True, slots=True)
class SharedInode:
    """The file of the workspace with this `inode` is going to show `shared_inode`, with the ctime of that."""

    inode: int
    shared_inode: int
    ctime_ns: int


def equal_files(transaction: Transaction, version_inode: int, owner: tuple[int, int] | None) -> list[SharedInode]:
    """What files of the attached workspace's version have an equal in a package; `owner` (uid, gid) replaces theirs.

    To be asked before the entries of the version are made: with each other they share nothing.
    """
    uid, gid = owner if owner is not None else (None, None)
    numbers = {"version": version_inode, "uid": uid, "gid": gid}
    limits = {"smallest": SHARED_BYTES, "looked_at": EQUAL_LOOKED_AT}
    return [SharedInode(*row) for row in transaction.execute(_EQUAL, numbers | limits)]


def share_inodes(transaction: Transaction, shared: Iterable[SharedInode]) -> None:
    """Let new entries, which no mount has shown yet, show those numbers."""
    for file in shared:
        transaction.execute(
            "UPDATE entries SET shared_inode = ?, ctime_ns = ? WHERE entry_id = ?",
            (file.shared_inode, file.ctime_ns, file.inode),
        )
