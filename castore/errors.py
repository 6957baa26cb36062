"""The whole exception tree of castore. No errno here (see `mount/errnos.py`) and no exit code (see `castore/cli`).

    CastoreError
    ├── ConfigError                 a setting is wrong: says key, value, file, what is allowed
    ├── StateError                  the state directory cannot be used (locked, newer, damaged)
    │   ├── StateLocked             another daemon writes there
    │   ├── CatalogTooNew           made by a newer castore
    │   ├── CatalogFull       (t)   no space left for the catalog or the workspace
    │   ├── CatalogBusy       (t)   another process holds the write lock for too long
    │   └── DeletionUnderWay  (t)   garbage collection deletes just now what is to be put
    ├── TreeError                   a path operation cannot be done
    │   ├── NotFound  AlreadyExists  NotADirectory  IsADirectory  DirectoryNotEmpty
    │   ├── InvalidName             a NAME or VERSION outside the rule
    │   ├── NameTooLong             more than 255 bytes
    │   ├── NotPermitted            never allowed there (device nodes, links across versions, computed attributes)
    │   ├── AccessDenied            this caller may not
    │   ├── ReadOnly                published trees do not change
    │   ├── CrossesVersions         a rename that would need a copy
    │   ├── Frozen            (t)   the version is being published just now
    │   ├── NoAttribute  AttributeTooLarge
    │   ├── NotSupported            an attribute name space that castore does not keep
    │   ├── NotASymlink             readlink of something else
    │   ├── NotOpen                 a handle that cannot do this
    │   └── StagingFull       (t)   a bound on staged bytes is reached
    ├── PublishError                a package cannot be published
    │   ├── PackageExists           that NAME/VERSION is published
    │   ├── PublishBusy       (t)   open for writing, or not all stored yet
    │   ├── SumsMismatch            SHA256SUMS or manifest-sha256.txt disagrees with the files
    │   └── FormatError             a manifest that does not follow docs/FORMAT.md
    ├── BlockUnreadable             no location gives good bytes for a block
    │   └── NotConfigured           all locations are in backends that the configuration lacks
    ├── DeliveryError         (t)   a sink did not take events
    ├── DeadlineExceeded      (t)   an operation took longer than it may
    └── StorageError                all that leaves a storage backend
        ├── ObjectMissing           no object under that digest
        ├── ObjectTruncated         the object is shorter than the range asked for
        ├── SourceChanged           the bytes to put are not the bytes that were promised
        ├── StorageDenied           credentials or rights refused
        ├── StorageFull       (t)   no space left in the backend
        ├── StorageRejected         the backend refuses the request: a setting is wrong
        ├── StorageTimeout    (t)   no answer within the deadline
        └── StorageUnavailable (t)  cannot be reached, or fails for now

(t) marks the temporary ones: the same call may succeed later, and only these are retried without being asked.
"""

from __future__ import annotations

from typing import ClassVar


class CastoreError(Exception):
    """Base of everything castore raises on purpose. `str()` is one line meant for a person."""

    temporary: ClassVar[bool] = False


class ConfigError(CastoreError):
    """A setting is wrong."""


class StateError(CastoreError):
    """The state directory cannot be used."""


class StateLocked(StateError):
    """Another daemon writes to this state directory."""


class CatalogTooNew(StateError):
    """The catalog was written by a newer castore."""


class CatalogFull(StateError):
    """No space is left for the catalog or the workspace."""

    temporary = True


class CatalogBusy(StateError):
    """Another process held the catalog's write lock for longer than `BUSY_TIMEOUT_MS`."""

    temporary = True


class DeletionUnderWay(StateError):
    """Garbage collection deletes just now what is to be put; it has to be put when that is over."""

    temporary = True


class TreeError(CastoreError):
    """A path operation cannot be done."""


class NotFound(TreeError):
    """No such entry."""


class AlreadyExists(TreeError):
    """The name is taken."""


class NotADirectory(TreeError):
    """A directory is needed."""


class IsADirectory(TreeError):
    """A file is needed."""


class DirectoryNotEmpty(TreeError):
    """Only an empty directory can be removed or replaced."""


class InvalidName(TreeError):
    """A NAME or VERSION outside the rule of docs/SEMANTICS.md."""


class NameTooLong(TreeError):
    """An entry's name has more than 255 bytes, or a link's target more than 4095."""


class NotPermitted(TreeError):
    """Never allowed there, whoever asks."""


class AccessDenied(TreeError):
    """This caller may not."""


class ReadOnly(TreeError):
    """Published trees do not change."""


class CrossesVersions(TreeError):
    """A rename between versions that would split a hard link: copy instead."""


class Frozen(TreeError):
    """The version is being published just now: in a moment it is read-only, or writable again."""

    temporary = True


class NoAttribute(TreeError):
    """No such extended attribute."""


class AttributeTooLarge(TreeError):
    """The attribute's value, or all values of the entry together, exceed the bound."""


class NotSupported(TreeError):
    """An attribute name space, or an operation, that castore does not keep."""


class NotASymlink(TreeError):
    """Only a symbolic link has a target."""


class NotOpen(TreeError):
    """The handle is not open for this."""


class StagingFull(TreeError):
    """`ingest.staging_max_bytes` or `ingest.max_bytes_per_user` is reached."""

    temporary = True


class PublishError(CastoreError):
    """A package cannot be published."""


class PackageExists(PublishError):
    """That NAME/VERSION is published already."""


class PublishBusy(PublishError):
    """A file is open for writing, or not every byte is stored yet."""

    temporary = True


class SumsMismatch(PublishError):
    """`SHA256SUMS` or `manifest-sha256.txt` disagrees with the files."""


class FormatError(PublishError):
    """A package manifest does not follow docs/FORMAT.md."""


class BlockUnreadable(CastoreError):
    """No location gives good bytes for a block."""


class NotConfigured(BlockUnreadable):
    """All locations of the blob are in backends that the configuration lacks: said once, at the start of a mount."""


class DeliveryError(CastoreError):
    """A sink did not take events. `retry_after_seconds` is how long it asks to be left alone, 0 when it does not."""

    temporary = True

    def __init__(self, message: str, *, retry_after_seconds: float = 0) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineExceeded(CastoreError):
    """An operation took longer than it may."""

    temporary = True


class StorageError(CastoreError):
    """Base of all that leaves a storage backend."""

    retry_after_s: float | None = None
    """Seconds that the backend asked to be left alone for, when it said so; never negative."""


class ObjectMissing(StorageError):
    """The backend has no object under that digest."""


class ObjectTruncated(StorageError):
    """The object ends before the range that was asked for."""


class SourceChanged(StorageError):
    """The bytes to put are not the bytes that were promised."""


class StorageDenied(StorageError):
    """The backend refuses the credentials or the rights."""


class StorageFull(StorageError):
    """The backend has no space left."""

    temporary = True


class StorageRejected(StorageError):
    """The backend refuses the request as such: a setting is wrong."""


class StorageTimeout(StorageError):
    """The backend gave no answer within the deadline."""

    temporary = True


class StorageUnavailable(StorageError):
    """The backend cannot be reached, or fails for now."""

    temporary = True


def to_text(error: CastoreError) -> str:
    """`ClassName: message`, for an error that is kept and raised again later."""
    return f"{type(error).__name__}: {error}"


def from_text(text: str) -> CastoreError:
    """The error that `to_text` wrote; a CastoreError with the whole text when the class is not known."""
    name, colon, message = text.partition(": ")
    return named(name, message) if colon else CastoreError(text)


def named(name: str, message: str) -> CastoreError:
    """An error of the class with that name; a plain CastoreError when there is none."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, CastoreError):
        return kind(message)
    return CastoreError(message)
