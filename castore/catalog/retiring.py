"""Forgetting a backend: what would be lost by it, and taking its rows away. Touches no object.

A location of the backend is dispensable when no package needs its blob, or when the blob has a good location in one of
the backends that `kept` names. Whoever takes locations away asks for that in the same transaction.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from castore.catalog.condition import ConditionReader
from castore.catalog.uses import Execute, packages_of
from castore.digest import Digest

_FORGET: Final = 2000
"""Locations taken away by one transaction, with an event each: 50 ms of the write lock, which no publish notices."""
_PACKAGES_AT_ONCE: Final = 5000
"""Packages looked at by one transaction: the same."""
_LOOKED_AT: Final = 100_000
"""Locations looked at by one query, so that a Ctrl-C is heard."""

_IN_A_PACKAGE: Final = (
    "EXISTS (SELECT 1 FROM entries WHERE entries.blob_id = here.blob_id AND entries.blob_id <> 0) "
    "OR EXISTS (SELECT 1 FROM packages WHERE manifest_blob_id = here.blob_id) "
    "OR EXISTS (SELECT 1 FROM deleted_packages WHERE manifest_blob_id = here.blob_id"
)
NEEDED: Final = f"({_IN_A_PACKAGE}))"
"""Of the row `here`: packages need the blob, those among them that are deleted and can be restored."""
# The manifest of a package that is purged is to go everywhere: also where nobody can delete it any more.
_NEEDED: Final = f"({_IN_A_PACKAGE} AND NOT is_purging))"
_ELSEWHERE: Final = (
    "EXISTS (SELECT 1 FROM storage_locations AS other WHERE other.blob_id = here.blob_id "
    "AND other.status IN ('stored', 'verified') AND other.backend_id IN (SELECT value FROM json_each(:kept)))"
)


@dataclass(frozen=True, slots=True)
class Indispensable:
    """A blob that packages need and that would have no good location left. `is_good`: it has one now, here."""

    blob_id: int
    is_good: bool


class RetireReader(ConditionReader):
    """A connection that looks at what forgetting a backend means."""

    def known_backends(self) -> set[str]:
        """Every backend that the catalog has anything of: locations, intents, packages or a probe."""
        found = self.backend_ids()
        for sql in (
            "SELECT DISTINCT backend_id FROM storage_locations WHERE status = 'deleting'",
            "SELECT DISTINCT backend_id FROM put_intents",
            "SELECT DISTINCT backend_id FROM deletions",
            "SELECT backend_id FROM backend_probes",
            "SELECT DISTINCT value FROM (SELECT DISTINCT backend_ids FROM packages), json_each(backend_ids)",
        ):
            found.update(row[0] for row in self._rows(sql))
        return found

    def location_count(self, backend_id: str) -> int:
        """How many locations the backend has, whatever their status."""
        return sum(count for other, _, count, _ in self.location_counts() if other == backend_id)

    def indispensable(self, backend_id: str, kept: Collection[str]) -> Iterator[Indispensable]:
        """The locations of the backend that are not dispensable, in order of blob_id."""
        most = self._one("SELECT coalesce(max(blob_id), 0) FROM blobs")[0]
        for low in range(0, most + 1, _LOOKED_AT):
            rows = self._rows(
                "SELECT blob_id, status IN ('stored', 'verified') FROM storage_locations AS here "
                "WHERE blob_id >= :low AND blob_id < :high AND backend_id = :backend "
                f"AND {_NEEDED} AND NOT {_ELSEWHERE} ORDER BY blob_id",
                {"low": low, "high": low + _LOOKED_AT, "backend": backend_id, "kept": json.dumps(sorted(kept))},
            )
            yield from (Indispensable(row[0], bool(row[1])) for row in rows)

    def packages_using(self, blob_id: int, limit: int) -> tuple[str, ...]:
        """Up to `limit` packages, as NAME/VERSION, that have the blob as a file or as their manifest."""
        return packages_of(self._execute, blob_id, limit)


def forget_locations(
    execute: Execute, backend_id: str, kept: Collection[str], after: int
) -> tuple[list[tuple[Digest, int]], int]:
    """Take away the dispensable ones of the next some thousand locations of a backend, behind the blob_id `after`.

    (digest and size of what was taken away, the blob_id to go on behind), the latter 0 when there are no more.
    """
    last = execute(
        "SELECT max(blob_id) FROM (SELECT blob_id FROM storage_locations WHERE backend_id = ? AND blob_id > ? "
        "ORDER BY blob_id LIMIT ?)",
        (backend_id, after, _FORGET),
    ).fetchone()[0]
    if last is None:
        return [], 0
    gone = execute(
        "DELETE FROM storage_locations AS here WHERE backend_id = :backend AND blob_id > :after AND blob_id <= :last "
        f"AND (NOT {_NEEDED} OR {_ELSEWHERE}) RETURNING blob_id",
        {"backend": backend_id, "after": after, "last": last, "kept": json.dumps(sorted(kept))},
    ).fetchall()
    blobs = execute(
        "SELECT algorithm, digest, size_bytes FROM json_each(?) CROSS JOIN blobs ON blob_id = value",
        (json.dumps([row[0] for row in gone]),),
    )
    return [(Digest(row[0], row[1]), row[2]) for row in blobs], int(last)


def forget_in_packages(execute: Execute, backend_id: str, kept: Collection[str], after: int) -> int:
    """The next some thousand packages, behind the package_id `after`, do not count as stored in a backend any more.

    One that counted as stored there alone counts as stored where its manifest is. Returns the package_id to go on
    behind, 0 when there are no more.
    """
    last = execute(
        "SELECT max(package_id) FROM "
        "(SELECT package_id FROM packages WHERE package_id > ? ORDER BY package_id LIMIT ?)",
        (after, _PACKAGES_AT_ONCE),
    ).fetchone()[0]
    if last is None:
        return 0
    execute(
        "UPDATE packages SET backend_ids = iif(json_array_length(backend_ids) = 1, "
        "  (SELECT json_group_array(backend_id) FROM (SELECT backend_id FROM storage_locations "
        "    WHERE blob_id = manifest_blob_id AND status <> 'deleting' "
        "    AND backend_id IN (SELECT value FROM json_each(:kept)) ORDER BY backend_id)), "
        "  (SELECT json_group_array(value) FROM (SELECT value FROM json_each(packages.backend_ids) "
        "    WHERE value <> :backend ORDER BY key))) "
        "WHERE package_id > :after AND package_id <= :last "
        "AND EXISTS (SELECT 1 FROM json_each(packages.backend_ids) WHERE value = :backend)",
        {"backend": backend_id, "after": after, "last": last, "kept": json.dumps(sorted(kept))},
    )
    return int(last)


def forget_rest(execute: Execute, backend_id: str) -> None:
    """The intents and deletions of a backend, and what its last probe found."""
    for table in ("put_intents", "deletions", "backend_probes"):
        execute(f"DELETE FROM {table} WHERE backend_id = ?", (backend_id,))
