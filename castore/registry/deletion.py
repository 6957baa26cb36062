"""The rules of deleting: packages that are hidden, restored and purged; objects that are gone. And whose turn it is.

Each change and its event are one transaction. Objects are deleted by `castore.verify.collect` alone; what a collection
that died has marked goes to whoever puts it again.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from castore.catalog import collecting, deleting, tagging
from castore.catalog.collecting import Doomed
from castore.catalog.deleting import DeletedPackage
from castore.catalog.records import Package
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import BlobSummary, Digest
from castore.errors import AlreadyExists, NotFound, PackageExists
from castore.events import LOCATION_DELETED, PACKAGE_DELETED, PACKAGE_PURGED, PACKAGE_RESTORED, Event
from castore.failpoint import failpoint
from castore.storage.spi import StorageBackend

SEND_SECONDS: Final = 30.0
"""No delete begins later than that after its mark, unless the mark is renewed."""
STRAY_SECONDS: Final = 120.0
"""After its mark, what a process that died has sent is over: SEND_SECONDS, 30 s of tries, 30 s for the last of them,
and as much again. A server may work on a request whose sender is gone, and a put before its end would be lost."""


def delete_package(
    transaction: Transaction, name: str, version: str, *, uid: int, restore_within_seconds: float, reason: str
) -> Package:
    """Hide a package; it can be restored until it is purged. `reason` is `request` or `retention`.

    Raises NotFound when there is none, and AlreadyExists when a tag points to it.
    """
    tags = tagging.tags_of(transaction, name, version)
    if tags:
        which = ", ".join(tags)
        raise AlreadyExists(f"{name}/{version}: tagged {which}; move or remove that first: castore package tag --help")
    now = time.time_ns()
    if not deleting.delete_package(transaction, name, version, uid=uid, now_ns=now):
        raise NotFound(f"{name}/{version}: no such package is published")
    deleted = deleting.deleted_package(transaction, name, version)
    assert deleted is not None
    data = _package_data(deleted.package) | {
        "deleted_by_uid": uid,
        "reason": reason,
        "restorable_until_ns": now + int(restore_within_seconds * 1e9),
    }
    transaction.add_event(Event(type=PACKAGE_DELETED, subject=deleted.package.ref, data=data, time_ns=now))
    return deleted.package


def restore_package(transaction: Transaction, name: str, version: str, *, uid: int) -> Package:
    """Show the package again that was deleted last under that name. Raises NotFound and PackageExists."""
    if transaction.package_exists(name, version):
        raise PackageExists(f"{name}/{version} is published")
    if tagging.tag(transaction, name, version) is not None:
        raise PackageExists(f"{version} is a tag of {name} by now; remove it first: castore package tag --help")
    deleted = deleting.deleted_package(transaction, name, version)
    if deleted is None:
        raise NotFound(f"{name}/{version}: no such package was deleted, or its time to be restored is over")
    if deleted.is_purging:
        raise NotFound(f"{name}/{version}: garbage collection has begun to remove it; publish it again")
    deleting.restore_package(transaction, deleted, time.time_ns())
    data = _package_data(deleted.package) | {"restored_by_uid": uid}
    transaction.add_event(Event(type=PACKAGE_RESTORED, subject=deleted.package.ref, data=data))
    return deleted.package


def end_purge(transaction: Transaction, deleted: DeletedPackage) -> None:
    """Nothing of a package is left but its blobs, as far as no other needs them."""
    deleting.end_purge(transaction, deleted.package.package_id)
    transaction.add_event(Event(type=PACKAGE_PURGED, subject=deleted.package.ref, data=_package_data(deleted.package)))


def _package_data(package: Package) -> dict[str, object]:
    return {
        "name": package.name,
        "version": package.version,
        "retention_class": package.retention_class,
        "producer": package.producer,
        "file_count": package.file_count,
        "size_bytes": package.size_bytes,
        "manifest_digest": str(package.manifest_digest),
    }


def record_gone(transaction: Transaction, doomed: Doomed) -> BlobSummary | None:
    """The object of a mark is gone. The blob, when the catalog forgot it by that."""
    blob = collecting.forget_object(transaction, doomed)
    data = {
        "backend_id": doomed.backend_id,
        "digest": str(doomed.digest),
        "size_bytes": doomed.size_bytes,
        "reason": "orphan" if doomed.is_orphan else "unneeded",
    }
    transaction.add_event(Event(type=LOCATION_DELETED, subject=str(doomed.digest), data=data))
    return blob


# turns


@contextmanager
def gc_turn(path: Path) -> Iterator[bool]:
    """Whether nobody else collects garbage; nobody begins to, inside. The kernel gives it back when a process dies."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def is_over(backend: StorageBackend, begun_at_ns: int) -> bool:
    """Whether nothing is under way any more that a process which is dead by now sent for a mark of that time."""
    # System calls end with the process.
    return backend.backend_type == "local" or time.time_ns() - begun_at_ns > STRAY_SECONDS * 1e9


async def take_over(writer: CatalogWriter, backend: StorageBackend, digest: Digest, lock: Path, *, owner: str) -> bool:
    """Have a put, of the process `owner`, instead of the deletion of a digest that a dead collection marked.

    Nothing is deleted: the put replaces what is left of the object, which may be all of it. In one transaction the mark
    goes and the put's intent comes. False while a living collection is at it, or what a dead one sent may still be
    under way. Raises StateError.
    """

    def work(transaction: Transaction) -> bool:
        found = collecting.marked_since(transaction, digest, backend.backend_id)
        if found is not None:
            doomed, begun_at_ns = found
            if not is_over(backend, begun_at_ns):
                return False
            collecting.forget_object(transaction, doomed)
        transaction.add_intents([(digest, backend.backend_id)], owner=owner)
        return True

    with gc_turn(lock) as is_ours:
        is_done = is_ours and await writer.run(work)
    if is_done:
        failpoint("deletion.taken_over")
    return is_done
