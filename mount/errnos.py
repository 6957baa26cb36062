"""The one table from castore's errors to errno. No other file of the daemon names an errno."""

from __future__ import annotations

import errno
from typing import Final

from castore import errors

_TABLE: Final[tuple[tuple[type[BaseException], int], ...]] = (
    # The first class that fits decides: subclasses stand before their bases.
    (errors.NotFound, errno.ENOENT),
    (errors.AlreadyExists, errno.EEXIST),
    (errors.NotADirectory, errno.ENOTDIR),
    (errors.IsADirectory, errno.EISDIR),
    (errors.DirectoryNotEmpty, errno.ENOTEMPTY),
    (errors.InvalidName, errno.EINVAL),
    (errors.NameTooLong, errno.ENAMETOOLONG),
    (errors.NotPermitted, errno.EPERM),
    (errors.AccessDenied, errno.EACCES),
    (errors.ReadOnly, errno.EROFS),
    (errors.CrossesVersions, errno.EXDEV),
    (errors.Frozen, errno.EBUSY),
    (errors.NoAttribute, errno.ENODATA),
    (errors.AttributeTooLarge, errno.E2BIG),
    (errors.NotSupported, errno.EOPNOTSUPP),
    (errors.NotASymlink, errno.EINVAL),
    (errors.NotOpen, errno.EBADF),
    (errors.StagingFull, errno.ENOSPC),
    (errors.PackageExists, errno.EEXIST),
    (errors.PublishBusy, errno.EBUSY),
    (errors.SumsMismatch, errno.EBADMSG),
    (errors.DeadlineExceeded, errno.ETIMEDOUT),
    (errors.StorageTimeout, errno.ETIMEDOUT),
    (errors.StorageDenied, errno.EACCES),
    (errors.StorageFull, errno.ENOSPC),
    (errors.CatalogBusy, errno.EAGAIN),
    (errors.DeletionUnderWay, errno.EBUSY),
    (errors.CatalogFull, errno.ENOSPC),
)

_PASSED_ON: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL, errno.ENOMEM, errno.ENFILE})
"""What the staging disk's own errors keep; anything else of it is EIO."""

EIO: Final = errno.EIO
ENOENT: Final = errno.ENOENT


def errno_of(exc: BaseException) -> int:
    """The errno that a caller gets for an exception; EIO for what is not listed."""
    for kind, number in _TABLE:
        if isinstance(exc, kind):
            return number
    if isinstance(exc, OSError) and exc.errno == errno.EMFILE:
        return errno.ENFILE  # the limit that was reached is the daemon's, not the caller's
    if isinstance(exc, OSError) and exc.errno in _PASSED_ON:
        return exc.errno
    return errno.EIO


def is_expected(exc: BaseException) -> bool:
    """Whether the exception is an answer rather than a fault: castore's own, or the disk's."""
    return isinstance(exc, errors.CastoreError | OSError)
