"""The rows of the catalog as frozen values. No SQL here."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from castore.digest import BlobSummary, Digest
from castore.errors import StateError


class Kind(enum.IntEnum):
    """What an entry is; the number is what the catalog stores."""

    DIRECTORY = 1
    FILE = 2
    SYMLINK = 3


class LocationStatus(enum.StrEnum):
    """How much is known of a location."""

    STORED = "stored"
    """The backend acknowledged the put; the bytes have not been re-read since."""
    VERIFIED = "verified"
    """The whole object was re-read and its digest agreed."""
    FAILED = "failed"
    """The bytes there are missing or wrong; `reason` says which."""
    DELETING = "deleting"
    """Garbage collection decided to delete it; nothing may count on it any more."""


GOOD_STATUSES = (LocationStatus.STORED, LocationStatus.VERIFIED)


class FailureReason(enum.StrEnum):
    """Why a location is `failed`."""

    DIGEST_MISMATCH = "digest_mismatch"
    SIZE_MISMATCH = "size_mismatch"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a published package. Hard links are several entries with one `inode`.

    `blob_id` is 0 unless the entry is a file; `target` is empty unless it is a symbolic link. `shared_inode` is 0
    unless mounts show the number of an equal file of another package.
    """

    entry_id: int
    parent_id: int
    name: bytes
    inode: int
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    ctime_ns: int
    size_bytes: int
    nlink: int
    blob_id: int
    target: bytes
    shared_inode: int

    @property
    def shown_inode(self) -> int:
        """The inode number that mounts show under this name."""
        return self.shared_inode or self.inode


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob that the catalog knows, with its block checksums."""

    blob_id: int
    summary: BlobSummary


@dataclass(frozen=True, slots=True)
class Location:
    """The fact that a blob is stored in a backend."""

    digest: Digest
    backend_id: str
    status: LocationStatus
    reason: str
    stored_at_ns: int
    verified_at_ns: int


@dataclass(frozen=True, slots=True)
class StoredProbe:
    """What the last probe of a backend found. Each finding has the texts name, question, expected, answer, enforced,
    consequence and severity.
    """

    backend_id: str
    probed_at_ns: int
    server: str
    findings: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Use:
    """One place where a blob is used: the file at `path` of the package `ref`, or its manifest when `path` is empty."""

    ref: str
    path: bytes


@dataclass(frozen=True, slots=True)
class PackageName:
    """A NAME below `packages/`: its inodes, and the owner, group and mode it keeps from its first publish."""

    name: str
    inode: int
    latest_inode: int
    uid: int
    gid: int
    mode: int
    mtime_ns: int
    latest_version: str


@dataclass(frozen=True, slots=True)
class Tag:
    """A link beside the versions of a NAME. `inode` is 0 for the pin of `latest`, which has one of its own."""

    name: str
    tag: str
    version: str
    inode: int
    set_at_ns: int


@dataclass(frozen=True, slots=True)
class Package:
    """One published NAME/VERSION."""

    package_id: int
    name: str
    version: str
    root_id: int
    producer: str
    retention_class: str
    publisher_uid: int
    published_at_ns: int
    file_count: int
    size_bytes: int
    manifest_digest: Digest
    backend_ids: tuple[str, ...]

    @property
    def ref(self) -> str:
        """`NAME/VERSION`."""
        return f"{self.name}/{self.version}"


def foreign_row(why: str) -> StateError:
    """The error for a row that castore never writes: the catalog came from elsewhere, or somebody changed it."""
    return StateError(
        f"the catalog has a row that no castore writes ({why}); `castore catalog check` names all of them"
    )


@contextmanager
def rows_as_written() -> Iterator[None]:
    """Inside, rows are made into records. What cannot be one is a StateError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError) as exc:
        raise foreign_row(str(exc)) from exc
