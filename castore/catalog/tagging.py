"""Tags: links beside the versions of a NAME, the pin of its `latest`, and how they changed. Rules are not here."""

from __future__ import annotations

from dataclasses import dataclass

from castore.catalog.deleting import move_latest
from castore.catalog.reader import CatalogReader
from castore.catalog.writer import Transaction


@dataclass(frozen=True, slots=True)
class TagChange:
    """A tag was set, or removed when `version` is ''."""

    tag: str
    version: str
    changed_at_ns: int
    changed_by_uid: int


def tags_of(transaction: Transaction, name: str, version: str) -> list[str]:
    """The tags that point to a version, the pin of `latest` among them."""
    rows = transaction.execute(
        "SELECT tag FROM package_tags WHERE name = ? AND version = ? ORDER BY tag", (name, version)
    )
    return [row[0] for row in rows]


def tag(transaction: Transaction, name: str, tag: str) -> str | None:
    """The version that a tag points to."""
    row = transaction.execute("SELECT version FROM package_tags WHERE name = ? AND tag = ?", (name, tag)).fetchone()
    return None if row is None else str(row[0])


def set_tag(transaction: Transaction, name: str, tag: str, version: str, *, uid: int, now_ns: int) -> None:
    """Point a tag to a version; `latest` is pinned by that. A `version` of '' removes the tag.

    A link that moves stays the same one: who found it just before the change reads where it leads now.
    """
    execute = transaction.execute
    row = execute("DELETE FROM package_tags WHERE name = ? AND tag = ? RETURNING inode", (name, tag)).fetchone()
    if version:
        inode = row[0] if row else 0 if tag == "latest" else transaction.lease_inodes(1)
        execute("INSERT INTO package_tags VALUES (?, ?, ?, ?, ?)", (name, tag, version, inode, now_ns))
    execute(
        "INSERT INTO tag_changes (name, tag, version, changed_at_ns, changed_by_uid) VALUES (?, ?, ?, ?, ?)",
        (name, tag, version, now_ns, uid),
    )
    move_latest(transaction, name, now_ns)


def version_before(transaction: Transaction, name: str, tag: str) -> str | None:
    """What a tag pointed to before its last change, '' for nothing; None when it was never changed."""
    rows = transaction.execute(
        "SELECT version FROM tag_changes WHERE name = ? AND tag = ? ORDER BY change_id DESC LIMIT 2", (name, tag)
    ).fetchall()
    if not rows:
        return None
    return str(rows[1][0]) if len(rows) > 1 else ""


class TagReader(CatalogReader):
    """A connection that looks at how tags changed."""

    def changes(self, name: str) -> list[TagChange]:
        """Every change of a NAME's tags, the oldest first."""
        rows = self._rows(
            "SELECT tag, version, changed_at_ns, changed_by_uid FROM tag_changes WHERE name = ? ORDER BY change_id",
            (name,),
        )
        return [TagChange(*row) for row in rows]
