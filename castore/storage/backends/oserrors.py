"""OSError -> StorageError, for backends on a file system. Not the errno table of the mount: this only reads."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from castore.errors import StorageDenied, StorageError, StorageFull, StorageUnavailable

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn any OSError inside into a StorageError whose one line begins with `what`."""
    try:
        yield
    except OSError as exc:
        raise _kind(exc)(f"{what}: {os.strerror(exc.errno) if exc.errno else exc}") from exc


def _kind(exc: OSError) -> type[StorageError]:
    if isinstance(exc, PermissionError):
        return StorageDenied
    if exc.errno in _FULL:
        return StorageFull
    return StorageUnavailable
