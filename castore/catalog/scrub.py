"""What verify reads of the catalog: the locations of a backend that are chosen, oldest first. It never writes."""

from __future__ import annotations

import json
from array import array
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from castore.catalog.reader import CatalogReader
from castore.catalog.records import LocationStatus, rows_as_written
from castore.catalog.uses import FILES_BELOW
from castore.digest import Digest

_SLICES: Final = 256
"""Queries that count all digests, one after the other: some 100 ms each for 10 million, so that a Ctrl-C is heard."""
_SAMPLED_FROM: Final = 8
"""Where the bytes of a digest begin by which a sample is drawn: shards are cut by those before."""
_FOREVER: Final = 2**63 - 1
_LAST_ID: Final = 2**63 - 1
_ROW: Final = "blob_id, algorithm, digest, size_bytes, status, stored_at_ns, verified_at_ns"


@dataclass(frozen=True, slots=True)
class DigestRange:
    """All digests with low <= raw digest < high. `ALL_DIGESTS` is every one."""

    low: bytes
    high: bytes

    def slices(self) -> Iterator[DigestRange]:
        """The range in about equal pieces."""
        low, high = (int.from_bytes(end[:8].ljust(8, b"\0")) for end in (self.low, self.high))
        ends = [self.low, *((low + (high - low) * n // _SLICES).to_bytes(8) for n in range(1, _SLICES)), self.high]
        return (DigestRange(ends[n], ends[n + 1]) for n in range(_SLICES))

    def __contains__(self, raw: bytes) -> bool:
        return self.low <= raw < self.high


ALL_DIGESTS: Final = DigestRange(b"", b"\xff" * 33)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which locations are looked at: those that meet every condition. `EVERYTHING` has none.

    `drawn` are ranges of what follows the first 8 bytes of a digest, one of which it must be in; `verified_before_ns`
    leaves out what was verified then or later; `blob_ids` names the blobs.
    """

    within: DigestRange = ALL_DIGESTS
    drawn: tuple[DigestRange, ...] = (ALL_DIGESTS,)
    verified_before_ns: int = _FOREVER
    blob_ids: array[int] | None = None

    def takes(self, raw: bytes) -> bool:
        """Whether a digest is one that is looked at, by itself."""
        return raw in self.within and any(raw[_SAMPLED_FROM:] in part for part in self.drawn)


EVERYTHING: Final = Choice()


@dataclass(frozen=True, slots=True)
class LocationRow:
    """A location to verify, as it was when it was read from the catalog."""

    blob_id: int
    digest: Digest
    size_bytes: int
    backend_id: str
    status: LocationStatus
    stored_at_ns: int


class ScrubReader(CatalogReader):
    """A connection for one task of a scrub. Locations that are being deleted do not exist for it."""

    def pages(self, backend_id: str, choice: Choice, now_ns: int, limit: int) -> Generator[list[LocationRow]]:
        """The chosen locations of a backend, up to `limit` at a time: those that were never verified, then the oldest.

        Each page is asked for when it is wanted, and may be empty. What is verified meanwhile is not given again. Those
        with a time of verification after `now_ns`, which some wrong clock set, come first.
        """
        if choice.blob_ids is not None:
            blob_ids = self._in_order(backend_id, choice, now_ns)
            for first in range(0, len(blob_ids), limit):
                rows = self._among(backend_id, blob_ids[first : first + limit])
                yield [row for row in rows if choice.takes(row.digest.raw)]
            return
        spans = ((now_ns, _FOREVER), (-1, min(now_ns, choice.verified_before_ns - 1)))
        for after, last in spans:
            key = (after, _LAST_ID)
            while found := self._page(backend_id, key, last, limit):
                yield [row for _, row in found if choice.takes(row.digest.raw)]
                key = (found[-1][0], found[-1][1].blob_id)

    def chosen_totals(self, backend_id: str, choice: Choice, now_ns: int) -> Generator[tuple[int, int]]:
        """(locations, bytes) of all that is chosen, in parts to be added up."""
        if choice.blob_ids is not None:
            for page in self.pages(backend_id, choice, now_ns, 1000):
                yield len(page), sum(row.size_bytes for row in page)
            return
        rest = f"substr(digest, {_SAMPLED_FROM + 1})"
        drawn = " OR ".join(f"{rest} >= ? AND {rest} < ?" for _ in choice.drawn)
        bounds = [end for part in choice.drawn for end in (part.low, part.high)]
        for part in choice.within.slices():
            row = self._one(
                "SELECT count(*), coalesce(sum(size_bytes), 0) FROM blobs CROSS JOIN storage_locations USING (blob_id) "
                "WHERE digest >= ? AND digest < ? AND backend_id = ? AND status <> 'deleting' "
                f"AND (verified_at_ns < ? OR verified_at_ns > ?) AND ({drawn})",
                *(part.low, part.high, backend_id, choice.verified_before_ns, now_ns, *bounds),
            )
            yield row[0], row[1]

    def blobs_below(self, inode: int) -> array[int]:
        """The blobs of all files below a directory of a package, each once. 8 bytes for each."""
        return array("q", (row[0] for row in self._rows(FILES_BELOW, {"root": inode})))

    def _page(self, backend_id: str, after: tuple[int, int], last: int, limit: int) -> list[tuple[int, LocationRow]]:
        """(verified_at_ns, location) of up to `limit` locations behind a time and a blob."""
        rows = self._rows(
            f"SELECT {_ROW} FROM storage_locations CROSS JOIN blobs USING (blob_id) WHERE backend_id = ? "
            "AND (verified_at_ns, blob_id) > (?, ?) AND verified_at_ns <= ? AND status <> 'deleting' "
            "ORDER BY verified_at_ns, blob_id LIMIT ?",
            (backend_id, *after, last, limit),
        )
        return [(row[6], _location(row, backend_id)) for row in rows]

    def _in_order(self, backend_id: str, choice: Choice, now_ns: int) -> array[int]:
        """The named blobs that the backend has, as they are to be looked at."""
        rows = self._rows(
            "SELECT blob_id FROM (SELECT DISTINCT value FROM json_each(?)) AS named "
            "CROSS JOIN storage_locations ON blob_id = named.value WHERE backend_id = ? AND status <> 'deleting' "
            "AND (verified_at_ns < ? OR verified_at_ns > ?) "
            "ORDER BY iif(verified_at_ns > ?, -1, verified_at_ns), blob_id",
            (_json(choice.blob_ids or ()), backend_id, choice.verified_before_ns, now_ns, now_ns),
        )
        return array("q", (row[0] for row in rows))

    def _among(self, backend_id: str, blob_ids: Iterable[int]) -> Iterator[LocationRow]:
        rows = self._rows(
            f"SELECT {_ROW} FROM json_each(?) AS named CROSS JOIN storage_locations ON blob_id = named.value "
            "CROSS JOIN blobs USING (blob_id) WHERE backend_id = ? AND status <> 'deleting' ORDER BY named.key",
            (_json(blob_ids), backend_id),
        )
        return (_location(row, backend_id) for row in rows)


def _json(blob_ids: Iterable[int]) -> str:
    return json.dumps(list(blob_ids))


def _location(row: Any, backend_id: str) -> LocationRow:
    with rows_as_written():
        return LocationRow(row[0], Digest(row[1], row[2]), row[3], backend_id, LocationStatus(row[4]), row[5])
