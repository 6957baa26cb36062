"""The ingest tree's rows: nodes, links, attributes. Only SQL: the rules of a file system are in `ingest/tree.py`.

The workspace is a database of its own, private to the writing daemon: it commits on every name that a user makes, so it
runs with `synchronous = NORMAL` (a commit is a write to the page cache and survives a kill) and `sync()` makes all of
it durable when a user asks for that. The catalog beside it stays small, slow and replicated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from castore.catalog.connection import executor, open_reader, open_writer
from castore.catalog.records import Kind
from castore.catalog.schema import workspace_migrations
from castore.digest import BlobSummary, Digest

_NODE: Final = (
    "nodes.inode, version_inode, kind, mode, uid, gid, creator_uid, mtime_ns, ctime_ns, size_bytes, nlink, "
    "target, state"
)
NODES_KEPT: Final = 16_384
"""Nodes that are kept in memory, some 8 MB: a copy of many small files asks for each of its directories and files over
and over, and each answer of SQLite costs four system calls for its locks."""

_NODE_COLUMNS: Final = _NODE.count(",") + 1
_SUMMARY: Final = "algorithm, digest, size_bytes, block_size_bytes, checksum_algorithm, checksums"


@dataclass(frozen=True, slots=True)
class Node:
    """One inode of the ingest tree. `version_inode` is 0 for a NAME directory; `state` is '' unless it is a file."""

    inode: int
    version_inode: int
    kind: Kind
    mode: int
    uid: int
    gid: int
    creator_uid: int
    mtime_ns: int
    ctime_ns: int
    size_bytes: int
    nlink: int
    target: bytes
    state: str

    @property
    def is_version(self) -> bool:
        """Whether this is a VERSION directory."""
        return self.inode == self.version_inode


@dataclass(frozen=True, slots=True)
class Publishing:
    """A publish that was begun: to be finished or undone after a crash."""

    version_inode: int
    name: str
    version: str
    manifest: bytes


@dataclass(frozen=True, slots=True)
class StateCount:
    """How many files of a version are in a state, and their bytes."""

    state: str
    file_count: int
    size_bytes: int


def _node(row: Any) -> Node:
    return Node(row[0], row[1], Kind(row[2]), *row[3:])


def _summary(row: Any) -> BlobSummary:
    return BlobSummary(Digest(row[0], row[1]), *row[2:])


class _Transaction:
    """For `with`, over and over: a generator for each costs some microseconds, for each name that a user makes."""

    def __init__(self, begin: Callable[[], None], end: Callable[..., None]) -> None:
        self._begin = begin
        self._end = end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, kind: type[BaseException] | None, exc: object, traceback: object) -> None:
        self._end(failed=kind is not None)


class WorkspaceStore:
    """Access to the workspace database; use it from one thread at a time. Single statements commit at once."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._read_only = read_only
        kind = workspace_migrations
        self._database = open_reader(path, kind) if read_only else open_writer(path, kind, synchronous="NORMAL")
        self._execute = executor(self._database.conn, path)
        self._depth = 0
        self._transaction = _Transaction(self._begin, self._end)
        self._nodes: dict[int, Node] = {}
        """Nodes as they are in the database: only this connection writes to it. Forgotten all together when full."""

    def close(self) -> None:
        """Close the connection."""
        self._database.close()

    def transaction(self) -> AbstractContextManager[None]:
        """All statements inside commit together or not at all. Nests: only the outermost commits."""
        return self._transaction

    def _begin(self) -> None:
        if not self._depth:
            self._execute("BEGIN IMMEDIATE")
        self._depth += 1

    def _end(self, *, failed: bool) -> None:
        self._depth -= 1
        if self._depth:
            return
        try:
            if not failed:
                self._execute("COMMIT")
        except BaseException:
            failed = True
            raise
        finally:
            if failed:
                self._nodes.clear()
                if self._database.conn.in_transaction:
                    self._execute("ROLLBACK")

    def sync(self) -> None:
        """Make everything committed so far durable against power loss. Blocks for the disk; safe in any thread."""
        # Commits are in the write-ahead log's file already, and a checkpoint syncs the database by itself: the log's
        # fsync is all that is missing. Never open the database file here: closing it would drop SQLite's POSIX locks.
        log = f"{self.path}-wal"
        if os.path.exists(log):
            _fsync(log)
        _fsync(str(self.path.parent))

    # reading

    def node(self, inode: int) -> Node | None:
        """The node of that inode."""
        known = self._nodes.get(inode)
        if known is not None:
            return known
        row = self._execute(f"SELECT {_NODE} FROM nodes WHERE inode = ?", (inode,)).fetchone()
        return None if row is None else self._remember(_node(row))

    def _remember(self, node: Node) -> Node:
        if not self._read_only:
            if len(self._nodes) >= NODES_KEPT:
                self._nodes.clear()
            self._nodes[node.inode] = node
        return node

    def child(self, parent: int, name: bytes) -> Node | None:
        """The node of that name in a directory."""
        row = self._execute(
            f"SELECT {_NODE} FROM links JOIN nodes USING (inode) WHERE parent = ? AND name = ?", (parent, name)
        ).fetchone()
        return None if row is None else _node(row)

    def children(self, parent: int, after: int, limit: int) -> list[tuple[int, bytes, Node]]:
        """Up to `limit` (cookie, name, node) of a directory with a cookie above `after`, ascending."""
        rows = self._execute(
            f"SELECT link_id, name, {_NODE} FROM links JOIN nodes USING (inode) "
            "WHERE parent = ? AND link_id > ? ORDER BY link_id LIMIT ?",
            (parent, after, limit),
        )
        return [(row[0], row[1], _node(row[2:])) for row in rows]

    def is_empty(self, parent: int) -> bool:
        """Whether a directory has no entries."""
        return self._execute("SELECT 1 FROM links WHERE parent = ? LIMIT 1", (parent,)).fetchone() is None

    def parent_of(self, inode: int) -> tuple[int, bytes] | None:
        """(parent, name) of the first link of an inode."""
        row = self._execute(
            "SELECT parent, name FROM links WHERE inode = ? ORDER BY link_id LIMIT 1", (inode,)
        ).fetchone()
        return None if row is None else (row[0], row[1])

    def summary(self, inode: int) -> BlobSummary | None:
        """The digest and checksums of a closed file, or None while they are not computed."""
        row = self._execute(f"SELECT {_SUMMARY} FROM nodes WHERE inode = ? AND algorithm <> ''", (inode,)).fetchone()
        return None if row is None else _summary(row)

    def error(self, inode: int) -> str:
        """Why a file is failed, or why the last publish of a VERSION failed; '' for neither."""
        row = self._execute("SELECT error FROM nodes WHERE inode = ?", (inode,)).fetchone()
        return "" if row is None else str(row[0])

    def attributes(self, inode: int) -> dict[bytes, bytes]:
        """The extended attributes that users set."""
        return dict(self._execute("SELECT name, value FROM attributes WHERE inode = ?", (inode,)))

    def drop_names(self, name: str) -> None:
        """Forget the inodes of a NAME that is gone and was never published."""
        self._execute("DELETE FROM names WHERE name = ?", (name,))

    def names(self, name: str) -> tuple[int, int] | None:
        """(inode, latest_inode) that packages/NAME has."""
        row = self._execute("SELECT inode, latest_inode FROM names WHERE name = ?", (name,)).fetchone()
        return None if row is None else (row[0], row[1])

    def name_of(self, packages_inode: int) -> str | None:
        """The NAME whose packages/ directory or `latest` link has that inode."""
        row = self._execute(
            "SELECT name FROM names WHERE inode = ? OR latest_inode = ?", (packages_inode, packages_inode)
        ).fetchone()
        return None if row is None else str(row[0])

    def all_names(self) -> dict[str, tuple[int, int]]:
        """NAME -> (inode, latest_inode) that packages/NAME has, for every NAME of ingest/."""
        return {row[0]: (row[1], row[2]) for row in self._execute("SELECT name, inode, latest_inode FROM names")}

    def largest_number(self) -> int:
        """The largest inode or cookie that is given out, 0 for none."""
        row = self._execute(
            "SELECT max(coalesce((SELECT max(inode) FROM nodes), 0), coalesce((SELECT max(link_id) FROM links), 0), "
            "coalesce((SELECT max(max(inode, latest_inode)) FROM names), 0))"
        ).fetchone()
        return int(row[0])

    def take_staged(self, limit: int) -> list[tuple[int, int, BlobSummary]]:
        """Mark up to `limit` staged files `uploading`; returns (inode, version_inode, summary) of each."""
        rows = self._execute(
            "UPDATE nodes SET state = 'uploading' WHERE inode IN "
            "(SELECT inode FROM nodes WHERE state = 'staged' AND state <> '' LIMIT ?) "
            f"RETURNING inode, version_inode, {_SUMMARY}",
            (limit,),
        ).fetchall()
        for row in rows:
            self._nodes.pop(row[0], None)
        return [(row[0], row[1], _summary(row[2:])) for row in rows]

    def any_in_state(self, version_inode: int, *states: str) -> tuple[int, str] | None:
        """(inode, error) of some linked file of a version in one of the states, or None."""
        for state in states:
            row = self._execute(
                "SELECT inode, error FROM nodes WHERE state = ? AND state <> '' AND version_inode = ? AND nlink > 0 "
                "LIMIT 1",
                (state, version_inode),
            ).fetchone()
            if row is not None:
                return row[0], row[1]
        return None

    def count_in_state(self, version_inode: int, state: str) -> int:
        """How many linked files of a version are in a state; takes time by their number."""
        row = self._execute(
            "SELECT count(*) FROM nodes WHERE state = ? AND state <> '' AND version_inode = ? AND nlink > 0",
            (state, version_inode),
        ).fetchone()
        return int(row[0])

    def versions_wanting(self, digest: Digest) -> list[int]:
        """The versions with files of that digest that are not stored yet; looks at all files that are not."""
        rows = self._execute(
            "SELECT DISTINCT version_inode FROM nodes WHERE state IN ('staged', 'uploading', 'failed') "
            "AND state <> '' AND digest = ? AND algorithm = ?",
            (digest.raw, digest.algorithm),
        )
        return [row[0] for row in rows]

    def receiving(self) -> list[Node]:
        """Every file whose digest is not known: what a recovery has to hash."""
        rows = self._execute(f"SELECT {_NODE} FROM nodes WHERE state = 'receiving' AND state <> '' AND nlink > 0")
        return [_node(row) for row in rows]

    def files(self) -> Iterator[Node]:
        """All files, named or not."""
        return (_node(row) for row in self._execute(f"SELECT {_NODE} FROM nodes WHERE state <> ''"))

    def state_counts(self, version_inode: int | None = None) -> list[StateCount]:
        """Files and bytes by state, of one version or of all."""
        where = "" if version_inode is None else "AND version_inode = ?"
        rows = self._execute(
            f"SELECT state, count(*), sum(size_bytes) FROM nodes WHERE state <> '' AND nlink > 0 {where} "
            "GROUP BY state",
            () if version_inode is None else (version_inode,),
        )
        return [StateCount(*row) for row in rows]

    def staged_bytes_by_user(self) -> dict[int, int]:
        """uid -> bytes of all its files."""
        return dict(self._execute("SELECT uid, sum(size_bytes) FROM nodes WHERE state <> '' GROUP BY uid"))

    def has_bytes_of(self, uid: int, version_inode: int) -> bool:
        """Whether a version has files with bytes that belong to a user."""
        row = self._execute(
            "SELECT 1 FROM nodes WHERE version_inode = ? AND uid = ? AND state <> '' AND size_bytes > 0 LIMIT 1",
            (version_inode, uid),
        ).fetchone()
        return row is not None

    def versions(self) -> list[tuple[str, str, int]]:
        """(NAME, VERSION, inode) of every version in the ingest tree, by name."""
        rows = self._execute(
            "SELECT top.name, link.name, link.inode FROM nodes JOIN links AS link ON link.inode = nodes.inode "
            "JOIN links AS top ON top.inode = link.parent "
            "WHERE nodes.version_inode = nodes.inode ORDER BY top.name, link.name"
        )
        return [(row[0].decode(), row[1].decode(), row[2]) for row in rows]

    def last_changes(self, now_ns: int) -> dict[int, int]:
        """Version -> when something of it changed last. Times that users set ahead of now do not count."""
        rows = self._execute(
            "SELECT version_inode, max(max(ctime_ns, CASE WHEN mtime_ns <= ? THEN mtime_ns ELSE 0 END)) FROM nodes "
            "WHERE version_inode <> 0 GROUP BY version_inode",
            (now_ns,),
        )
        return dict(rows)

    def unlinked(self) -> list[Node]:
        """Nodes without a name: left open when a daemon ended."""
        return [_node(row) for row in self._execute(f"SELECT {_NODE} FROM nodes WHERE nlink = 0")]

    def tree(self, version_inode: int) -> Iterator[tuple[int, int, bytes, Node]]:
        """(link_id, parent, name, node) of everything in a version, its root first, parents before children."""
        return (
            (row[0], row[1], row[2], _node(row[3:]))
            for row in self._execute(
                "WITH RECURSIVE walk(link_id, parent, name, inode, depth) AS ("
                "  SELECT link_id, parent, name, inode, 0 FROM links WHERE inode = ?"
                "  UNION ALL SELECT links.link_id, links.parent, links.name, links.inode, depth + 1"
                "  FROM walk JOIN links ON links.parent = walk.inode ORDER BY 5) "
                # CROSS JOIN: SQLite would rather scan all nodes and look each up in the walk, which loses the order.
                f"SELECT link_id, parent, name, {_NODE} FROM walk CROSS JOIN nodes USING (inode)",
                (version_inode,),
            )
        )

    # writing

    def insert_node(self, node: Node) -> None:
        """Add a node without names."""
        self._execute(
            "INSERT INTO nodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '', '', x'', 0, '', x'')",
            (
                node.inode,
                node.version_inode,
                int(node.kind),
                node.mode,
                node.uid,
                node.gid,
                node.creator_uid,
                node.mtime_ns,
                node.ctime_ns,
                node.size_bytes,
                node.nlink,
                node.target,
                node.state,
            ),
        )
        self._remember(node)

    def update_node(self, inode: int, **columns: Any) -> None:
        """Set columns of a node."""
        self._nodes.pop(inode, None)
        names = ", ".join(f"{name} = ?" for name in columns)
        self._execute(f"UPDATE nodes SET {names} WHERE inode = ?", (*columns.values(), inode))

    def note_bytes(self, inode: int, *, size_bytes: int, mtime_ns: int, changed_ns: int) -> None:
        """Size and time of a file's bytes, which changed last at `changed_ns`; its attributes may have since."""
        self._nodes.pop(inode, None)
        self._execute(
            "UPDATE nodes SET size_bytes = ?, mtime_ns = ?, ctime_ns = max(ctime_ns, ?) WHERE inode = ?",
            (size_bytes, mtime_ns, changed_ns, inode),
        )

    def set_summary(
        self, inode: int, summary: BlobSummary, *, mtime_ns: int | None = None, changed_ns: int = 0
    ) -> None:
        """The file's bytes have that digest: it is staged. With their times, unless those are noted already."""
        known = self._nodes.pop(inode, None)
        self._execute(
            "UPDATE nodes SET state = 'staged', error = '', algorithm = ?, digest = ?, size_bytes = ?, "
            "block_size_bytes = ?, checksum_algorithm = ?, checksums = ?, mtime_ns = coalesce(?, mtime_ns), "
            "ctime_ns = max(ctime_ns, ?) WHERE inode = ?",
            (
                summary.digest.algorithm,
                summary.digest.raw,
                summary.size_bytes,
                summary.block_size_bytes,
                summary.checksum_algorithm,
                summary.checksums,
                mtime_ns,
                changed_ns,
                inode,
            ),
        )
        if known is not None:  # it is asked for at once: by whoever closes it, and by its put
            self._remember(
                replace(
                    known,
                    state="staged",
                    size_bytes=summary.size_bytes,
                    mtime_ns=known.mtime_ns if mtime_ns is None else mtime_ns,
                    ctime_ns=max(known.ctime_ns, changed_ns),
                )
            )

    def clear_summary(self, inode: int) -> None:
        """The file's bytes are about to change: it is receiving again."""
        self.update_node(inode, state="receiving", error="", algorithm="", digest=b"", checksums=b"")

    def clear_summaries(self, *, but: str) -> None:
        """All files whose blocks have checksums of another algorithm are receiving again, to be hashed anew."""
        self._nodes.clear()
        self._execute(
            "UPDATE nodes SET state = 'receiving', error = '', algorithm = '', digest = x'', checksums = x'' "
            "WHERE state IN ('staged', 'stored') AND checksum_algorithm <> ?",
            (but,),
        )

    def move_state(self, inode: int, digest: Digest, *, state: str, error: str = "") -> bool:
        """Set the state of a file whose bytes still have that digest; False when they changed meanwhile."""
        self._nodes.pop(inode, None)
        cursor = self._execute(
            "UPDATE nodes SET state = ?, error = ? WHERE inode = ? AND digest = ? AND algorithm = ?",
            (state, error, inode, digest.raw, digest.algorithm),
        )
        return bool(cursor.rowcount)

    def restage(self, *, version_inode: int | None = None, state: str = "failed") -> int:
        """Put files in a state back to `staged`, to be put again. Returns how many."""
        self._nodes.clear()
        where = "" if version_inode is None else "AND version_inode = ?"
        parameters = (state,) if version_inode is None else (state, version_inode)
        cursor = self._execute(
            f"UPDATE nodes SET state = 'staged', error = '' WHERE state = ? AND algorithm <> '' {where}", parameters
        )
        return int(cursor.rowcount)

    def restage_temporary(self, names: tuple[str, ...]) -> int:
        """As `restage`, for files whose error is of one of these classes."""
        self._nodes.clear()
        marks = ", ".join("?" * len(names))
        cursor = self._execute(
            "UPDATE nodes SET state = 'staged', error = '' WHERE state = 'failed' AND algorithm <> '' "
            f"AND substr(error, 1, instr(error, ':') - 1) IN ({marks})",
            names,
        )
        return int(cursor.rowcount)

    def insert_link(self, link_id: int, parent: int, name: bytes, inode: int) -> bool:
        """Add a name; False when the directory has it already."""
        sql = "INSERT INTO links VALUES (?, ?, ?, ?) ON CONFLICT (parent, name) DO NOTHING"
        return bool(self._execute(sql, (link_id, parent, name, inode)).rowcount)

    def delete_link(self, parent: int, name: bytes) -> None:
        """Remove a name."""
        self._execute("DELETE FROM links WHERE parent = ? AND name = ?", (parent, name))

    def move_link(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        """Rename; the cookie stays."""
        self._execute(
            "UPDATE links SET parent = ?, name = ? WHERE parent = ? AND name = ?", (new_parent, new_name, parent, name)
        )

    def touch(self, inode: int, now_ns: int) -> None:
        """A directory's entries changed."""
        self._execute("UPDATE nodes SET mtime_ns = ?, ctime_ns = ? WHERE inode = ?", (now_ns, now_ns, inode))
        known = self._nodes.get(inode)
        if known is not None:
            self._nodes[inode] = replace(known, mtime_ns=now_ns, ctime_ns=now_ns)

    def delete_node(self, inode: int) -> None:
        """Remove a node that has no names, and its attributes."""
        self._nodes.pop(inode, None)
        self._execute("DELETE FROM attributes WHERE inode = ?", (inode,))
        self._execute("DELETE FROM nodes WHERE inode = ?", (inode,))

    def subtree_is_closed(self, inode: int) -> bool:
        """Whether nothing at or below `inode` has a hard link elsewhere."""
        row = self._execute(
            "WITH RECURSIVE walk(inode) AS (SELECT ? UNION ALL "
            "  SELECT links.inode FROM walk JOIN links ON links.parent = walk.inode) "
            "SELECT 1 FROM (SELECT inode, count(*) AS seen FROM walk GROUP BY inode) JOIN nodes USING (inode) "
            "WHERE nodes.nlink > seen LIMIT 1",
            (inode,),
        ).fetchone()
        return row is None

    def move_subtree(self, inode: int, version_inode: int) -> None:
        """Everything at or below `inode` lies in another version now; its stored files are routed anew."""
        self._nodes.clear()
        self._execute(
            "WITH RECURSIVE walk(inode) AS (SELECT ? UNION "
            "  SELECT links.inode FROM walk JOIN links ON links.parent = walk.inode) "
            "UPDATE nodes SET version_inode = ?, state = CASE state WHEN 'stored' THEN 'staged' ELSE state END "
            "WHERE inode IN (SELECT inode FROM walk)",
            (inode, version_inode),
        )

    def set_attribute(self, inode: int, name: bytes, value: bytes) -> None:
        """Set an extended attribute."""
        self._execute("INSERT OR REPLACE INTO attributes VALUES (?, ?, ?)", (inode, name, value))

    def remove_attribute(self, inode: int, name: bytes) -> bool:
        """Remove an extended attribute; False when there is none."""
        return bool(self._execute("DELETE FROM attributes WHERE inode = ? AND name = ?", (inode, name)).rowcount)

    def add_names(self, name: str, inode: int, latest_inode: int) -> None:
        """Fix the inodes of packages/NAME and its `latest`."""
        self._execute("INSERT OR IGNORE INTO names VALUES (?, ?, ?)", (name, inode, latest_inode))

    # imports

    def mark_import(self, version_inode: int) -> None:
        """A version is made by an import, as long as it exists."""
        self._execute("INSERT OR IGNORE INTO imports VALUES (?)", (version_inode,))

    def is_import(self, version_inode: int) -> bool:
        """Whether an import made a version."""
        return self._execute("SELECT 1 FROM imports WHERE version_inode = ?", (version_inode,)).fetchone() is not None

    # publish

    def begin_publishing(self, publishing: Publishing) -> None:
        """Note a publish before anything of it can be seen."""
        self._execute(
            "INSERT INTO publishing VALUES (?, ?, ?, ?)",
            (publishing.version_inode, publishing.name, publishing.version, publishing.manifest),
        )

    def end_publishing(self, version_inode: int, manifest: bytes) -> None:
        """That publish is done or undone."""
        self._execute("DELETE FROM publishing WHERE version_inode = ? AND manifest = ?", (version_inode, manifest))

    def publishings(self) -> list[Publishing]:
        """What was under way when the last daemon ended."""
        rows = self._execute("SELECT version_inode, name, version, manifest FROM publishing")
        return [Publishing(*row) for row in rows]

    def settle_cookies(self, version_inode: int) -> None:
        """Give each inode of a version one link whose link_id equals it: entries need that."""
        self._execute(
            "UPDATE links SET link_id = inode WHERE link_id IN ("
            "  SELECT min(link_id) FROM links JOIN nodes USING (inode) WHERE version_inode = ? "
            "  GROUP BY inode HAVING sum(link_id = inode) = 0)",
            (version_inode,),
        )

    def remove_version(self, version_inode: int, limit: int) -> list[tuple[Node, BlobSummary | None]]:
        """Forget up to `limit` named nodes of a published version; returns them with what files hold, [] at the end.

        Unlinked files that are still open stay until their last handle is gone.
        """
        query = f"SELECT {_NODE}, {_SUMMARY} FROM nodes WHERE version_inode = ? AND nlink > 0 LIMIT ?"
        with self.transaction():
            nodes = [
                (_node(row[:_NODE_COLUMNS]), _summary(row[_NODE_COLUMNS:]) if row[_NODE_COLUMNS] else None)
                for row in self._execute(query, (version_inode, limit))
            ]
            for node, _ in nodes:
                self._nodes.pop(node.inode, None)
                self._execute("DELETE FROM links WHERE inode = ?", (node.inode,))
                self._execute("DELETE FROM attributes WHERE inode = ?", (node.inode,))
                self._execute("DELETE FROM nodes WHERE inode = ?", (node.inode,))
        return nodes


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
