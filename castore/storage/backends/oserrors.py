"""OSError -> StorageError, for backends on a file system. Not the errno table of the mount: this only reads."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from castore.errors import StorageDenied, StorageError, StorageFull, StorageUnavailable

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_IN_THE_WAY: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
"""Something else lies where a file or folder should: whoever is to clear it away has to know where."""


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn any OSError inside into a StorageError whose one line begins with `what`."""
    try:
        yield
    except OSError as exc:
        why = os.strerror(exc.errno) if exc.errno else str(exc)
        if exc.errno in _IN_THE_WAY and exc.filename is not None:
            # Of a rename, the new name counts: the old one is a temporary file's.
            why += f" ({os.fspath(exc.filename if exc.filename2 is None else exc.filename2)})"
        raise _kind(exc)(f"{what}: {why}") from exc


def _kind(exc: OSError) -> type[StorageError]:
    if isinstance(exc, PermissionError):
        return StorageDenied
    if exc.errno in _FULL:
        return StorageFull
    return StorageUnavailable
