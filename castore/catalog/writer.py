"""Writing to the catalog: one transaction at a time, each in a worker thread. Rules are not decided here.

`CatalogWriter.run(work)` runs `work(transaction)` between BEGIN IMMEDIATE and COMMIT. What `work` reads through the
transaction stays true until the commit: decisions that must not race (does the package exist, is the blob stored) are
made inside.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

import trio

from castore.catalog import delivery, retiring
from castore.catalog.connection import open_writer, sqlite_errors
from castore.catalog.records import GOOD_STATUSES, FailureReason, LocationStatus, StoredProbe
from castore.catalog.uses import Execute, packages_of
from castore.digest import SHA256_BLOCKS, BlobSummary, Digest
from castore.errors import DeletionUnderWay
from castore.events import Event, data_json

T = TypeVar("T")

_GOOD: Final = tuple(str(status) for status in GOOD_STATUSES)


class Transaction:
    """The changes that can be made to the catalog. Valid only inside `CatalogWriter.run`."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._execute = connection.execute
        self.execute: Execute = connection.execute
        """For the other modules of `castore.catalog`, which hold the changes of one concern each."""

    # numbers

    def lease_inodes(self, count: int) -> int:
        """Take `count` consecutive inode numbers; the first of them is returned."""
        row = self._execute(
            "UPDATE sequences SET next_value = next_value + ? WHERE name = 'inode' RETURNING next_value", (count,)
        ).fetchone()
        return int(row[0]) - count

    # intents

    def add_intents(self, pairs: Iterable[tuple[Digest, str]], *, owner: str) -> None:
        """Record that puts of (digest, backend id) are about to begin; `owner` is this process's UUID.

        Raises DeletionUnderWay, and records none, when one of them is being deleted: see `being_deleted`.
        """
        now = time.time_ns()
        pairs = list(pairs)
        self._check_not_deleting(pairs)
        self._connection.executemany(
            "INSERT INTO put_intents VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET owner = excluded.owner, created_at_ns = excluded.created_at_ns",
            [(digest.algorithm, digest.raw, backend_id, owner, now) for digest, backend_id in pairs],
        )

    def being_deleted(self, pairs: Iterable[tuple[Digest, str]]) -> set[tuple[Digest, str]]:
        """Those of (digest, backend id) that garbage collection deletes just now: a put has to wait for that."""
        sql = "SELECT 1 FROM deletions WHERE digest = ? AND algorithm = ? AND backend_id = ?"
        return {
            (digest, backend_id)
            for digest, backend_id in pairs
            if self._execute(sql, (digest.raw, digest.algorithm, backend_id)).fetchone() is not None
        }

    def _check_not_deleting(self, pairs: Iterable[tuple[Digest, str]]) -> None:
        for digest, backend_id in self.being_deleted(pairs):
            raise DeletionUnderWay(f"backend {backend_id}: {digest} is being deleted just now; try again")

    def drop_intents(self, pairs: Iterable[tuple[Digest, str]], *, of: str = "") -> None:
        """Forget intents of puts of which nothing unfinished is left in the backend; with `of`, that owner's alone."""
        self._connection.executemany(
            "DELETE FROM put_intents WHERE digest = ? AND algorithm = ? AND backend_id = ? AND ? IN ('', owner)",
            [(digest.raw, digest.algorithm, backend_id, of) for digest, backend_id in pairs],
        )

    def intents_of(self, owner: str) -> list[tuple[Digest, str]]:
        """The puts that a process began and did not end: (digest, backend id) of each."""
        rows = self._execute("SELECT algorithm, digest, backend_id FROM put_intents WHERE owner = ?", (owner,))
        return [(Digest(row[0], row[1]), row[2]) for row in rows]

    def intents_of_others(self, owner: str, *, living: Collection[str] = ()) -> list[tuple[Digest, str]]:
        """The same of all other processes but those that live."""
        rows = self._execute("SELECT algorithm, digest, backend_id, owner FROM put_intents WHERE owner <> ?", (owner,))
        return [(Digest(row[0], row[1]), row[2]) for row in rows if row[3] not in living]

    def drop_intents_of_others(self, pairs: Iterable[tuple[Digest, str]], owner: str) -> None:
        """As `drop_intents`, unless this process began such a put itself meanwhile."""
        self._connection.executemany(
            "DELETE FROM put_intents WHERE digest = ? AND algorithm = ? AND backend_id = ? AND owner <> ?",
            [(digest.raw, digest.algorithm, backend_id, owner) for digest, backend_id in pairs],
        )

    # blobs and locations

    def ensure_blob(self, summary: BlobSummary) -> int:
        """The blob_id of these bytes; a row is made when there is none."""
        digest = summary.digest
        known = self.blob_id(digest)
        if known:
            return known
        row = self._execute(
            "INSERT INTO blobs (algorithm, digest, size_bytes, block_size_bytes, checksum_algorithm, checksums) "
            "VALUES (?, ?, ?, ?, ?, ?) RETURNING blob_id",
            (
                digest.algorithm,
                digest.raw,
                summary.size_bytes,
                summary.block_size_bytes,
                summary.checksum_algorithm,
                summary.checksums,
            ),
        ).fetchone()
        return int(row[0])

    def blob_id(self, digest: Digest) -> int:
        """The blob_id of a digest, or 0."""
        row = self._execute(
            "SELECT blob_id FROM blobs WHERE digest = ? AND algorithm = ?", (digest.raw, digest.algorithm)
        ).fetchone()
        return 0 if row is None else int(row[0])

    def size_bytes(self, digest: Digest) -> int:
        """The size of a blob. Raises KeyError when there is none."""
        row = self._execute(
            "SELECT size_bytes FROM blobs WHERE digest = ? AND algorithm = ?", (digest.raw, digest.algorithm)
        ).fetchone()
        if row is None:
            raise KeyError(str(digest))
        return int(row[0])

    def good_backends(self, digest: Digest) -> set[str]:
        """The backends that hold the blob in a good location."""
        rows = self._execute(
            "SELECT backend_id FROM storage_locations JOIN blobs USING (blob_id) "
            "WHERE digest = ? AND algorithm = ? AND status IN (?, ?)",
            (digest.raw, digest.algorithm, *_GOOD),
        )
        return {row[0] for row in rows}

    def add_locations(self, stored: Iterable[tuple[BlobSummary, str]]) -> None:
        """Each (blob, backend id) was acknowledged: the location becomes `stored` and its intent goes.

        Raises DeletionUnderWay when one of them is being deleted: then there was no intent before its put.
        """
        now = time.time_ns()
        stored = list(stored)
        self._check_not_deleting((summary.digest, backend_id) for summary, backend_id in stored)
        for summary, backend_id in stored:
            self._execute(
                "INSERT INTO storage_locations VALUES (?, ?, 'stored', '', ?, 0) ON CONFLICT DO UPDATE "
                "SET status = 'stored', reason = '', stored_at_ns = excluded.stored_at_ns",
                (self.ensure_blob(summary), backend_id, now),
            )
            self.drop_intents([(summary.digest, backend_id)])

    def add_copy(self, digest: Digest, backend_id: str) -> bool:
        """A blob was put in a further backend: the location becomes `stored` and its intent goes.

        False, and no location is made, when it is good there already, is being deleted, or the blob is gone.
        """
        cursor = self._execute(
            "INSERT INTO storage_locations SELECT blob_id, ?, 'stored', '', ?, 0 FROM blobs "
            "WHERE digest = ? AND algorithm = ? AND NOT EXISTS (SELECT 1 FROM deletions "
            "  WHERE deletions.digest = blobs.digest AND deletions.algorithm = blobs.algorithm AND backend_id = ?) "
            "ON CONFLICT DO UPDATE "
            "SET status = 'stored', reason = '', stored_at_ns = excluded.stored_at_ns WHERE status = 'failed'",
            (backend_id, time.time_ns(), digest.raw, digest.algorithm, backend_id),
        )
        self.drop_intents([(digest, backend_id)])
        return bool(cursor.rowcount)

    def fail_location(self, digest: Digest, backend_id: str, reason: FailureReason) -> bool:
        """The bytes there are missing or wrong. False when the location is unknown or failed already."""
        cursor = self._execute(
            "UPDATE storage_locations SET status = 'failed', reason = ? WHERE backend_id = ? AND status IN (?, ?) "
            "AND blob_id = (SELECT blob_id FROM blobs WHERE digest = ? AND algorithm = ?)",
            (str(reason), backend_id, *_GOOD, digest.raw, digest.algorithm),
        )
        return bool(cursor.rowcount)

    def conclude_location(
        self,
        digest: Digest,
        backend_id: str,
        *,
        status: LocationStatus,
        reason: FailureReason | None,
        seen: tuple[LocationStatus, int],
    ) -> bool:
        """What re-reading a location showed; `seen` is its status and stored_at_ns from before the reading.

        False, and nothing is changed, when it was put anew, deleted or judged by others meanwhile.
        """
        cursor = self._execute(
            "UPDATE storage_locations SET status = ?, reason = ?, verified_at_ns = ? WHERE backend_id = ? "
            "AND status = ? AND stored_at_ns = ? "
            "AND blob_id = (SELECT blob_id FROM blobs WHERE digest = ? AND algorithm = ?)",
            (status, reason or "", time.time_ns(), backend_id, *seen, digest.raw, digest.algorithm),
        )
        return bool(cursor.rowcount)

    def is_failed(self, digest: Digest, backend_id: str, stored_at_ns: int) -> bool:
        """Whether a location is failed, and was not put anew after `stored_at_ns`."""
        row = self._execute(
            "SELECT 1 FROM storage_locations JOIN blobs USING (blob_id) WHERE digest = ? AND algorithm = ? "
            "AND backend_id = ? AND status = 'failed' AND stored_at_ns = ?",
            (digest.raw, digest.algorithm, backend_id, stored_at_ns),
        ).fetchone()
        return row is not None

    def repair_location(self, digest: Digest, backend_id: str, seen_stored_at_ns: int) -> bool:
        """A failed location was put anew and read back: it becomes `verified` and its intent goes.

        False, and it stays as it is, when it changed since `seen_stored_at_ns` or is failed no more.
        """
        self.drop_intents([(digest, backend_id)])
        if not self.is_failed(digest, backend_id, seen_stored_at_ns):
            return False
        now = time.time_ns()
        self._execute(
            "UPDATE storage_locations SET status = 'verified', reason = '', stored_at_ns = ?, verified_at_ns = ? "
            "WHERE backend_id = ? AND blob_id = ?",
            (now, now, backend_id, self.blob_id(digest)),
        )
        return True

    def packages_of(self, digest: Digest, limit: int) -> tuple[str, ...]:
        """Up to `limit` packages, as NAME/VERSION, that have the blob as a file or as their manifest."""
        return packages_of(self._execute, self.blob_id(digest), limit)

    # forgetting a backend

    def forget_locations(
        self, backend_id: str, kept: Collection[str], after: int
    ) -> tuple[list[tuple[Digest, int]], int]:
        """Take away what is dispensable: see `castore.catalog.retiring`."""
        return retiring.forget_locations(self._execute, backend_id, kept, after)

    def forget_in_packages(self, backend_id: str, kept: Collection[str], after: int) -> int:
        """Packages do not count as stored there any more: see `castore.catalog.retiring`."""
        return retiring.forget_in_packages(self._execute, backend_id, kept, after)

    def forget_rest(self, backend_id: str) -> None:
        """Its intents and its last probe."""
        retiring.forget_rest(self._execute, backend_id)

    # probes

    def set_probe(self, probe: StoredProbe) -> None:
        """What a probe found takes the place of what an earlier one of that backend did."""
        self._execute(
            "INSERT OR REPLACE INTO backend_probes VALUES (?, ?, ?, ?)",
            (probe.backend_id, probe.probed_at_ns, probe.server, json.dumps(probe.findings)),
        )

    # packages

    def package_exists(self, name: str, version: str) -> bool:
        """Whether NAME/VERSION is published."""
        row = self._execute("SELECT 1 FROM packages WHERE name = ? AND version = ?", (name, version)).fetchone()
        return row is not None

    def is_published(self, root_id: int, manifest: bytes) -> bool:
        """Whether a package with that root was published by that manifest (raw digest)."""
        row = self._execute(
            "SELECT 1 FROM packages JOIN blobs ON blob_id = manifest_blob_id WHERE root_id = ? AND digest = ?",
            (root_id, manifest),
        ).fetchone()
        return row is not None

    def add_package_name(
        self, name: str, *, inode: int, latest_inode: int, uid: int, gid: int, mode: int, now_ns: int, version: str
    ) -> int:
        """Make NAME's row, or move its `latest` and time on; the first publish's owner and mode stay.

        Returns the inode of packages/NAME.
        """
        row = self._execute(
            "INSERT INTO package_names VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE "
            "SET mtime_ns = excluded.mtime_ns, latest_version = coalesce((SELECT version FROM package_tags AS pin "
            "  WHERE pin.name = excluded.name AND tag = 'latest'), excluded.latest_version) RETURNING inode",
            (name, inode, latest_inode, uid, gid, mode, now_ns, version),
        ).fetchone()
        return int(row[0])

    def add_package(
        self,
        *,
        name: str,
        version: str,
        root_id: int,
        producer: str,
        retention_class: str,
        publisher_uid: int,
        published_at_ns: int,
        file_count: int,
        size_bytes: int,
        manifest: BlobSummary,
        backend_ids: tuple[str, ...],
    ) -> None:
        """Make the package's row."""
        self._execute(
            "INSERT INTO packages (name, version, root_id, producer, retention_class, publisher_uid, published_at_ns, "
            "file_count, size_bytes, manifest_blob_id, backend_ids) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                name,
                version,
                root_id,
                producer,
                retention_class,
                publisher_uid,
                published_at_ns,
                file_count,
                size_bytes,
                self.ensure_blob(manifest),
                json.dumps(list(backend_ids)),
            ),
        )

    def add_package_backend(self, package_id: int, backend_id: str) -> bool:
        """A package is whole in a further backend. False when it is gone, counts as stored there, or its manifest is
        not stored there (any more)."""
        cursor = self._execute(
            "UPDATE packages SET backend_ids = json_insert(backend_ids, '$[#]', :backend) WHERE package_id = :package "
            "AND NOT EXISTS (SELECT 1 FROM json_each(backend_ids) WHERE value = :backend) "
            "AND EXISTS (SELECT 1 FROM storage_locations WHERE blob_id = manifest_blob_id AND backend_id = :backend "
            "  AND status IN ('stored', 'verified'))",
            {"package": package_id, "backend": backend_id},
        )
        return bool(cursor.rowcount)

    def unstored_file(self, version_inode: int, backend_id: str) -> int:
        """The inode of some file of the attached workspace's version that has no good location there, or 0."""
        row = self._execute(
            "SELECT inode FROM workspace.nodes AS node "
            "WHERE version_inode = ? AND kind = 2 AND nlink > 0 AND NOT EXISTS ("
            "  SELECT 1 FROM blobs JOIN storage_locations AS location USING (blob_id) WHERE blobs.digest = node.digest "
            "  AND blobs.algorithm = node.algorithm AND backend_id = ? AND location.status IN (?, ?)) LIMIT 1",
            (version_inode, backend_id, *_GOOD),
        ).fetchone()
        return 0 if row is None else int(row[0])

    def strengthen_checksums(self, version_inode: int) -> None:
        """Where the attached workspace's version has sha256 checksums, and the catalog has others: take those."""
        self._connection.executemany(
            "UPDATE blobs SET block_size_bytes = ?, checksum_algorithm = ?, checksums = ? WHERE blob_id = ?",
            self._execute(
                # CROSS JOIN: never all blobs.
                "SELECT node.block_size_bytes, node.checksum_algorithm, node.checksums, blob_id "
                "FROM workspace.nodes AS node CROSS JOIN blobs USING (digest, algorithm) "
                "WHERE version_inode = :version AND node.checksum_algorithm = :sha256 "
                "AND blobs.checksum_algorithm <> :sha256",
                {"version": version_inode, "sha256": SHA256_BLOCKS},
            ).fetchall(),
        )

    def version_totals(self, version_inode: int) -> tuple[int, int]:
        """(number of file entries, bytes of all files) of the attached workspace's version."""
        row = self._execute(
            "SELECT coalesce(sum(nlink), 0), coalesce(sum(size_bytes), 0) FROM workspace.nodes "
            "WHERE version_inode = ? AND kind = 2 AND nlink > 0",
            (version_inode,),
        ).fetchone()
        return row[0], row[1]

    def copy_entries(
        self, version_inode: int, *, parent_id: int, name: str, now_ns: int, owner: tuple[int, int] | None
    ) -> None:
        """Make entries of the attached workspace's version, inodes kept; `owner` (uid, gid) replaces each one's."""
        uid, gid = owner if owner is not None else (None, None)
        self._execute(
            "INSERT INTO entries SELECT link_id, iif(link.inode = :root, :parent, link.parent), "
            "iif(link.inode = :root, :name, link.name), link.inode, kind, mode & 511, coalesce(:uid, uid), "
            "coalesce(:gid, gid), mtime_ns, :now, node.size_bytes, nlink, coalesce(blob_id, 0), target, 0 "
            "FROM workspace.nodes AS node JOIN workspace.links AS link ON link.inode = node.inode "
            "LEFT JOIN blobs ON blobs.digest = node.digest AND blobs.algorithm = node.algorithm "
            "WHERE version_inode = :root",
            {"root": version_inode, "parent": parent_id, "name": name.encode(), "now": now_ns, "uid": uid, "gid": gid},
        )
        self._execute(
            "INSERT INTO entry_attributes SELECT inode, name, value FROM workspace.attributes JOIN workspace.nodes "
            "USING (inode) WHERE version_inode = ?",
            (version_inode,),
        )

    def add_event(self, event: Event) -> None:
        """Store an event with the change that it tells of."""
        self.add_events([event])

    def add_events(self, events: Iterable[Event]) -> None:
        """Store events, in this order, with the changes that they tell of."""
        self._connection.executemany(
            "INSERT INTO events (event_id, type, subject, time_ns, data) VALUES (?, ?, ?, ?, ?)",
            [(event.event_id, event.type, event.subject, event.time_ns, data_json(event)) for event in events],
        )

    # delivering them: see `castore.catalog.delivery`

    def begin_delivery(self, sink: str, sequence: int) -> None:
        """Make a sink's row, unless it has one."""
        delivery.begin_delivery(self._execute, sink, sequence)

    def set_delivered(self, sink: str, sequence: int) -> None:
        """All up to `sequence` is delivered to a sink."""
        delivery.set_delivered(self._execute, sink, sequence, time.time_ns())

    def set_failing(self, sink: str, error: str) -> None:
        """The last attempt to deliver to a sink failed."""
        delivery.set_failing(self._execute, sink, error, time.time_ns())

    def keep_deliveries(self, sinks: Collection[str]) -> None:
        """Forget all other sinks."""
        delivery.keep_deliveries(self._execute, sinks)

    def give_up_events(self, upto: int, wanted: Mapping[str, Callable[[str], bool]]) -> dict[str, int]:
        """No sink waits for events up to `upto` any more; how many each of them loses by it."""
        return delivery.give_up(self._execute, upto, wanted, time.time_ns())

    def prune_events(self, upto: int) -> int:
        """Take away the oldest some thousand events up to `upto` that every sink has; how many there were."""
        return delivery.prune_events(self._execute, upto)


class CatalogWriter:
    """The one writing connection of a process. Other processes' writes are waited for, `BUSY_TIMEOUT_MS` at most."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = open_writer(path)
        self._connection = self._database.conn
        self._turn = trio.CapacityLimiter(1)

    def close(self) -> None:
        """Close the connection. Nothing may be running."""
        self._database.close()

    async def run(self, work: Callable[[Transaction], T], *, workspace: Path | None = None) -> T:
        """Run `work` as one durable transaction; on an exception nothing of it remains.

        `workspace` is attached read-only for its length. It runs in a thread, one at a time, and once begun it is not
        cancelled. Raises CatalogBusy, StateError, and whatever `work` raises.
        """
        return await trio.to_thread.run_sync(self.run_sync, work, workspace, limiter=self._turn)

    def run_sync(self, work: Callable[[Transaction], T], workspace: Path | None = None) -> T:
        """`run` for programs without an event loop; not to be mixed with `run` at one time."""
        with sqlite_errors(self.path):
            if workspace is None:
                return self._transact(work)
            self._connection.execute("ATTACH ? AS workspace", (f"file:{quote(str(workspace))}?mode=ro",))
            try:
                return self._transact(work)
            finally:
                self._connection.execute("DETACH workspace")

    def _transact(self, work: Callable[[Transaction], T]) -> T:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = work(Transaction(self._connection))
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise
        return result
