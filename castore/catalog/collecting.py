"""What garbage collection asks of the catalog and writes there: blobs that nothing needs, orphans. Touches no object.

A mark is made in the transaction that proves that nothing needs the object: the location becomes `deleting`, and a row
of `deletions` keeps every put of the digest there waiting. It goes when the object is gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from castore.catalog.deleting import DeletedReader
from castore.catalog.records import rows_as_written
from castore.catalog.retiring import NEEDED
from castore.catalog.writer import Transaction
from castore.digest import BlobSummary, Digest

_LOOKED_AT: Final = 100_000
"""Locations looked at by one query, so that a Ctrl-C is heard."""
_FORGOTTEN_AT_ONCE: Final = 5000
"""Blobs looked at by one transaction."""

_NOWHERE: Final = "NOT EXISTS (SELECT 1 FROM storage_locations AS other WHERE other.blob_id = here.blob_id)"
_MARK: Final = f"""
UPDATE storage_locations AS here SET status = 'deleting', reason = ''
WHERE backend_id = :backend AND status <> 'deleting' AND stored_at_ns < :before
AND blob_id = (SELECT blob_id FROM blobs WHERE digest = :digest AND algorithm = :algorithm) AND NOT {NEEDED}
AND NOT EXISTS (SELECT 1 FROM put_intents WHERE put_intents.digest = :digest AND put_intents.algorithm = :algorithm)
"""
_HAS_ROW: Final = """
SELECT 1 FROM storage_locations JOIN blobs USING (blob_id)
WHERE digest = :digest AND algorithm = :algorithm AND backend_id = :backend
UNION ALL SELECT 1 FROM put_intents WHERE digest = :digest AND algorithm = :algorithm AND backend_id = :backend
UNION ALL SELECT 1 FROM deletions WHERE digest = :digest AND algorithm = :algorithm AND backend_id = :backend
"""


@dataclass(frozen=True, slots=True)
class Doomed:
    """An object that nothing needs, or may need soon. An orphan has no location."""

    digest: Digest
    backend_id: str
    size_bytes: int
    is_orphan: bool


@dataclass(frozen=True, slots=True)
class Unneeded:
    """A location of a blob that no package needs, a deleted one neither."""

    digest: Digest
    size_bytes: int
    stored_at_ns: int


class CollectReader(DeletedReader):
    """A connection that looks for what may go. What it finds is no proof: a mark is."""

    def unneeded(self, backend_id: str) -> Iterator[list[Unneeded]]:
        """The locations of a backend that no package needs, some at a time."""
        most = self._one("SELECT coalesce(max(blob_id), 0) FROM blobs")[0]
        for low in range(0, most + 1, _LOOKED_AT):
            rows = self._rows(
                # CROSS JOIN and +: by numbers of blobs, never all locations of the backend.
                "SELECT algorithm, digest, size_bytes, stored_at_ns FROM storage_locations AS here "
                "CROSS JOIN blobs USING (blob_id) WHERE here.blob_id >= ? AND here.blob_id < ? AND +backend_id = ? "
                f"AND +status <> 'deleting' AND NOT {NEEDED} ORDER BY here.blob_id",
                (low, low + _LOOKED_AT, backend_id),
            )
            with rows_as_written():
                found = [Unneeded(Digest(row[0], row[1]), row[2], row[3]) for row in rows]
            yield found

    def strangers(self, backend_id: str, digests: Sequence[Digest]) -> set[Digest]:
        """Those of some digests, ascending and of one algorithm, that have neither location, intent nor deletion."""
        if not digests:
            return set()
        parameters = {
            "algorithm": digests[0].algorithm,
            "low": digests[0].raw,
            "high": digests[-1].raw,
            "backend": backend_id,
        }
        among = "digest BETWEEN :low AND :high AND algorithm = :algorithm AND backend_id = :backend"
        known = {
            row[0]
            for table in ("blobs CROSS JOIN storage_locations USING (blob_id)", "put_intents", "deletions")
            for row in self._rows(f"SELECT digest FROM {table} WHERE {among}", parameters)
        }
        return {digest for digest in digests if digest.raw not in known}

    def deletions(self, backend_ids: Collection[str]) -> list[tuple[Doomed, int]]:
        """What was marked in some backends and is not known to be gone, and when it was marked."""
        rows = self._rows("SELECT algorithm, digest, backend_id, size_bytes, is_orphan, begun_at_ns FROM deletions")
        with rows_as_written():
            return [
                (Doomed(Digest(row[0], row[1]), row[2], row[3], bool(row[4])), row[5])
                for row in rows
                if row[2] in backend_ids
            ]


def mark_unneeded(
    transaction: Transaction, backend_id: str, batch: Sequence[Unneeded], *, before_ns: int, is_staged: bool
) -> list[Doomed]:
    """Mark those of a batch that nothing needs now and that were stored before a time; `is_staged`: see `staged`."""
    wanted = staged(transaction, [blob.digest for blob in batch]) if is_staged else set()
    marked = []
    for blob in batch:
        if blob.digest in wanted:
            continue
        cursor = transaction.execute(_MARK, _key(blob.digest, backend_id) | {"before": before_ns})
        if cursor.rowcount:
            marked.append(Doomed(blob.digest, backend_id, blob.size_bytes, is_orphan=False))
    _insert(transaction, marked)
    return marked


def staged(transaction: Transaction, digests: Sequence[Digest]) -> set[Digest]:
    """Those of some digests that files of the attached workspace have: they are about to be published."""
    places = ", ".join("?" * len(digests))
    rows = transaction.execute(
        f"SELECT DISTINCT algorithm, digest FROM workspace.nodes WHERE kind = 2 AND nlink > 0 AND digest IN ({places})",
        [digest.raw for digest in digests],
    )
    return {Digest(row[0], row[1]) for row in rows}


def mark_orphans(transaction: Transaction, backend_id: str, batch: Sequence[tuple[Digest, int]]) -> list[Doomed]:
    """Mark those of (digest, bytes) that have neither location nor intent now."""
    marked = [
        Doomed(digest, backend_id, size_bytes, is_orphan=True)
        for digest, size_bytes in batch
        if transaction.execute(_HAS_ROW, _key(digest, backend_id)).fetchone() is None
    ]
    _insert(transaction, marked)
    return marked


def mark_manifest(transaction: Transaction, deletion_id: int, backend_ids: Collection[str]) -> list[Doomed]:
    """Mark the manifest of a package that is purged, in these backends, unless something else needs it."""
    rows = transaction.execute(
        "SELECT algorithm, digest, backend_id, blobs.size_bytes FROM deleted_packages "
        "JOIN blobs ON blob_id = manifest_blob_id JOIN storage_locations USING (blob_id) "
        "WHERE deletion_id = :deletion AND is_purging AND status <> 'deleting' "
        "AND backend_id IN (SELECT value FROM json_each(:backends)) "
        "AND NOT EXISTS (SELECT 1 FROM packages WHERE packages.manifest_blob_id = blobs.blob_id) "
        "AND NOT EXISTS (SELECT 1 FROM deleted_packages AS other WHERE other.manifest_blob_id = blobs.blob_id "
        "  AND other.deletion_id <> :deletion) "
        "AND NOT EXISTS (SELECT 1 FROM put_intents WHERE put_intents.digest = blobs.digest "
        "  AND put_intents.algorithm = blobs.algorithm)",
        {"deletion": deletion_id, "backends": json.dumps(list(backend_ids))},
    ).fetchall()
    with rows_as_written():
        marked = [Doomed(Digest(row[0], row[1]), row[2], row[3], is_orphan=False) for row in rows]
    for doomed in marked:
        transaction.execute(
            "UPDATE storage_locations SET status = 'deleting', reason = '' WHERE backend_id = :backend "
            "AND blob_id = (SELECT blob_id FROM blobs WHERE digest = :digest AND algorithm = :algorithm)",
            _key(doomed.digest, doomed.backend_id),
        )
    _insert(transaction, marked)
    return marked


def renew_marks(transaction: Transaction, marked: Sequence[Doomed]) -> None:
    """They are still being deleted: their time of marking is now."""
    now = time.time_ns()
    for doomed in marked:
        transaction.execute(
            "UPDATE deletions SET begun_at_ns = :now "
            "WHERE digest = :digest AND algorithm = :algorithm AND backend_id = :backend",
            _key(doomed.digest, doomed.backend_id) | {"now": now},
        )


def marked_since(transaction: Transaction, digest: Digest, backend_id: str) -> tuple[Doomed, int] | None:
    """A deletion that is under way, and when it was marked."""
    row = transaction.execute(
        "SELECT size_bytes, is_orphan, begun_at_ns FROM deletions "
        "WHERE digest = :digest AND algorithm = :algorithm AND backend_id = :backend",
        _key(digest, backend_id),
    ).fetchone()
    return None if row is None else (Doomed(digest, backend_id, row[0], bool(row[1])), row[2])


def unmark(transaction: Transaction, doomed: Doomed) -> None:
    """An orphan turned out to be none: it stays, and puts of it need not wait."""
    transaction.execute(
        "DELETE FROM deletions WHERE digest = :digest AND algorithm = :algorithm AND backend_id = :backend "
        "AND is_orphan",
        _key(doomed.digest, doomed.backend_id),
    )


def forget_object(transaction: Transaction, doomed: Doomed) -> BlobSummary | None:
    """The object is gone: so are its mark and its location, and the blob when it has no other. The blob, if so."""
    key = _key(doomed.digest, doomed.backend_id)
    blob_id = transaction.blob_id(doomed.digest)
    transaction.execute(
        "DELETE FROM storage_locations WHERE blob_id = ? AND backend_id = ? AND status = 'deleting'",
        (blob_id, doomed.backend_id),
    )
    transaction.execute(
        "DELETE FROM deletions WHERE digest = :digest AND algorithm = :algorithm AND backend_id = :backend", key
    )
    row = transaction.execute(
        "DELETE FROM blobs AS here WHERE blob_id = ? "
        f"AND {_NOWHERE} AND NOT {NEEDED} "
        "RETURNING size_bytes, block_size_bytes, checksum_algorithm, checksums",
        (blob_id,),
    ).fetchone()
    return None if row is None else BlobSummary(doomed.digest, *row)


def forget_bare_blobs(transaction: Transaction, after: int) -> int | None:
    """Forget those of the next blobs behind a number that nothing needs and that are in no backend.

    The number to go on behind, None at the end.
    """
    last = transaction.execute("SELECT max(blob_id) FROM blobs").fetchone()[0]
    if last is None or after >= last:
        return None
    transaction.execute(
        f"DELETE FROM blobs AS here WHERE blob_id > ? AND blob_id <= ? AND {_NOWHERE} AND NOT {NEEDED}",
        (after, after + _FORGOTTEN_AT_ONCE),
    )
    return after + _FORGOTTEN_AT_ONCE


def _insert(transaction: Transaction, marked: Sequence[Doomed]) -> None:
    now = time.time_ns()
    for doomed in marked:
        transaction.execute(
            "INSERT INTO deletions VALUES (?, ?, ?, ?, ?, ?)",
            (
                doomed.digest.algorithm,
                doomed.digest.raw,
                doomed.backend_id,
                doomed.size_bytes,
                int(doomed.is_orphan),
                now,
            ),
        )


def _key(digest: Digest, backend_id: str) -> dict[str, object]:
    return {"digest": digest.raw, "algorithm": digest.algorithm, "backend": backend_id}
