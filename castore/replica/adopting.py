"""From the copy that litestream keeps to the catalog that this host reads: whole, checked, in its place at once.

The copy that litestream keeps is never read by a mount: it is written page by page, and a network that fails leaves it
half new. It is taken only as of a moment when it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from castore.catalog.copy_file import sync_path
from castore.catalog.event_log import EventReader
from castore.errors import StateError

CHECK_BYTES_MAX: Final = 64 * 2**20
"""A copy up to this size is read as a whole by SQLite's quick check before it is taken: a quarter of a second."""

_LOCK_FIRST: Final = 0x4000_0002
_LOCK_BYTES: Final = 510
"""Where SQLite locks a database (its os.h, SHARED_FIRST): litestream holds that range while it writes."""
_FICLONE: Final = 0x4004_9409
"""Linux, linux/fs.h: a copy that shares its blocks, where the file system can."""
_PIECE: Final = 64 * 2**20
_WRITE_VERSION_AT: Final = 18
"""SQLite's file format: two bytes, 2 for a database with a write-ahead log. This one has none beside it."""


@dataclass(frozen=True, slots=True)
class Followed:
    """What is known of the catalog in a state directory that follows. Beside it as a file: who writes must refuse."""

    url: str
    transaction: int


def read_marker(path: Path) -> Followed | None:
    """What a state directory follows; None for one with a catalog of its own. Raises StateError."""
    try:
        found = json.loads(path.read_text())
        return Followed(str(found["url"]), int(found["transaction"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as exc:
        raise StateError(f"{path}: cannot be read; delete it and catalog.db, and mount with --follow again") from exc


def write_marker(path: Path, followed: Followed) -> None:
    """Durably, and at once."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump({"url": followed.url, "transaction": followed.transaction}, file)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync_path(path.parent)


def transaction_of(copy: Path) -> int:
    """The number of the transaction that litestream's copy is whole at, or was before it is written to again; 0 before
    there is one.
    """
    with suppress(OSError, ValueError):
        return int(_number_path(copy).read_text(), 16)
    return 0


def take(copy: Path, target: Path) -> int:
    """Put a copy of litestream's copy at `target`, unless it is being written: its transaction, or 0 then. Blocking.

    Raises OSError.
    """
    with open(copy, "rb", buffering=0) as source:
        try:
            # litestream waits for this, and begins nothing meanwhile.
            fcntl.lockf(source, fcntl.LOCK_SH | fcntl.LOCK_NB, _LOCK_BYTES, _LOCK_FIRST)
        except OSError:
            return 0
        transaction = transaction_of(copy)
        # A write that failed halfway left it newer than the number, which is written last.
        if not transaction or os.stat(copy).st_mtime_ns > os.stat(_number_path(copy)).st_mtime_ns:
            return 0
        with open(target, "wb", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            _copy(source.fileno(), file.fileno())
            os.pwrite(file.fileno(), b"\1\1", _WRITE_VERSION_AT)
            os.fsync(file.fileno())
    return transaction


def check(path: Path, served: Path | None) -> None:
    """Refuse what must not take the place of the catalog `served`. Raises StateError, CatalogTooNew."""
    with closing(EventReader(path)) as new:
        if path.stat().st_size <= CHECK_BYTES_MAX or served is None:
            new.quick_check()
        if served is None:
            return
        with closing(EventReader(served)) as old:
            if new.catalog_id() != old.catalog_id():
                raise StateError("the replica is that of another catalog now: mount again to follow it")
            if new.next_inode() < old.next_inode():
                raise StateError("the replica went back to an older state of the catalog: mount again to follow it")
            # What was published here and is not there may have had the inode numbers that other files have there.
            if not _goes_on(new, old):
                raise StateError("the replica has another history of the catalog now: mount again to follow it")


def _goes_on(new: EventReader, old: EventReader) -> bool:
    """Whether the newest event that `old` has kept happened in `new`, too, or is too old to be kept there."""
    newest = old.newest_event()
    return newest is None or newest[0] < new.first_sequence() or new.event_id(newest[0]) == newest[1]


def put_in_place(new: Path, target: Path) -> None:
    """Readers of the old one go on with it until they open it anew."""
    new.rename(target)
    sync_path(target.parent)


def _number_path(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}-txid")


def _copy(source: int, target: int) -> None:
    with suppress(OSError):  # not every file system can
        fcntl.ioctl(target, _FICLONE, source)
        return
    while os.sendfile(target, source, None, _PIECE):
        pass
