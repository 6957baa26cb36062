"""Forgetting a backend: only what nothing needs any more is taken out of the catalog. Objects stay where they are."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from castore.catalog.retiring import RetireReader
from castore.catalog.writer import CatalogWriter, Transaction
from castore.config import Config
from castore.events import LOCATION_DELETED, Event

BLOBS_LOOKED_AT: Final = 1000
"""Blobs whose packages are looked for: some 100 ms. Of more, their number is known, and some of their packages."""
PACKAGES_NAMED: Final = 10
"""Packages named as examples."""


@dataclass(frozen=True, slots=True)
class Need:
    """What would be lost. `blob_count` blobs of packages would have no good location in a configured backend.

    `bad_count` of them have none in the backend either. `packages` are some of those that they touch, and
    `package_count` is how many there are, at least: more where `is_cut`.
    """

    blob_count: int
    bad_count: int
    package_count: int
    packages: tuple[str, ...]
    is_cut: bool


def configured_keys(config: Config, backend_id: str) -> list[str]:
    """The keys of the configuration that still speak of a backend."""
    keys = [f"backends.{backend_id}"] if backend_id in config.backends else []
    keys += ["routing.default"] if config.routing.default == backend_id else []
    for number, rule in enumerate(config.routing.rules):
        keys += [f"routing.rules[{number}].backend"] if rule.backend == backend_id else []
        keys += [f"routing.rules[{number}].copies"] if backend_id in rule.copies else []
    return keys


def needs_of(catalog_path: Path, backend_id: str, kept: Collection[str]) -> Need | None:
    """What keeps a backend from being forgotten while `kept` are the others; None when nothing does.

    Raises StateError.
    """
    blob_count = bad_count = 0
    packages: set[str] = set()
    with RetireReader(catalog_path) as reader:
        for blob in reader.indispensable(backend_id, kept):
            blob_count += 1
            bad_count += not blob.is_good
            if blob_count <= BLOBS_LOOKED_AT:
                packages.update(reader.packages_using(blob.blob_id, BLOBS_LOOKED_AT))
    if not blob_count:
        return None
    return Need(
        blob_count=blob_count,
        bad_count=bad_count,
        package_count=len(packages),
        packages=tuple(sorted(packages)[:PACKAGES_NAMED]),
        is_cut=blob_count > BLOBS_LOOKED_AT,
    )


def forget_backend(catalog_path: Path, backend_id: str, kept: Collection[str]) -> int:
    """Take a backend's rows out of the catalog; how many locations that were.

    Each transaction proves of its locations that they are dispensable, and is short, so others work on. What has come
    to be needed meanwhile stays, and packages count as stored there as long as something stays: look for needs again.
    A run that was killed is finished by the next. Raises StateError.
    """
    count = after = 0
    with contextlib.closing(CatalogWriter(catalog_path)) as writer:
        while True:
            step = writer.run_sync(partial(_forget_some, backend_id=backend_id, kept=kept, after=after))
            count, after = count + step[0], step[1]
            if not after:
                break
        with RetireReader(catalog_path) as reader:
            if reader.location_count(backend_id):
                return count
        while after := writer.run_sync(
            partial(Transaction.forget_in_packages, backend_id=backend_id, kept=kept, after=after)
        ):
            pass
        writer.run_sync(partial(Transaction.forget_rest, backend_id=backend_id))
    return count


def _forget_some(transaction: Transaction, backend_id: str, kept: Collection[str], after: int) -> tuple[int, int]:
    """(how many locations were taken away, each with its event; where to go on), the latter 0 at the end."""
    gone, last = transaction.forget_locations(backend_id, kept, after)
    transaction.add_events(
        Event(
            type=LOCATION_DELETED,
            subject=str(digest),
            data={"backend_id": backend_id, "digest": str(digest), "size_bytes": size_bytes, "reason": "retired"},
        )
        for digest, size_bytes in gone
    )
    return len(gone), last
