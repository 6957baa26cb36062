"""One staged file that is open, with what is known of its bytes. Opening, writing and hashing are in `files.py`."""

from __future__ import annotations

import os
import time

from castore.catalog.workspace import Node
from castore.digest import BlobHasher


class StagedFile:
    """One inode that is open, or whose digest is being computed. All its handles share it."""

    __slots__ = (
        "_changes",
        "changed_ns",
        "descriptor",
        "handles",
        "hash_end",
        "hasher",
        "inode",
        "is_dirty",
        "is_flushed",
        "is_published",
        "mtime_ns",
        "pending",
        "size_bytes",
        "summary_of_changes",
        "uid",
        "version_inode",
        "writers",
    )

    def __init__(self, node: Node, descriptor: int) -> None:
        self.inode = node.inode
        self.version_inode = node.version_inode
        self.uid = node.uid
        self.descriptor = descriptor
        self.size_bytes = node.size_bytes
        self.mtime_ns = node.mtime_ns
        self.changed_ns = node.ctime_ns
        """When the bytes changed last. No user sets it, and it is no earlier than what was shown before."""
        self.is_dirty = node.state == "receiving"
        self.is_flushed = False
        self.is_published = False
        self.handles = 0
        self.writers = 0
        self.pending = 0
        """Hashing jobs of this file that are queued."""
        self.hasher: BlobHasher | None = None
        """Set while every byte so far came front to back."""
        self.hash_end = 0
        self.summary_of_changes = -1
        """The count of changes whose summary was queued last."""
        self._changes = 0

    def set_mtime(self, mtime_ns: int) -> None:
        """The user set the time, or read what we say that it is: a recovery takes it from the staged file."""
        self.mtime_ns = mtime_ns
        os.utime(self.descriptor, ns=(mtime_ns, mtime_ns))

    @property
    def changes(self) -> int:
        """Counts the changes of the bytes: a digest is good only for the count it was begun with."""
        return self._changes

    def changed(self) -> None:
        """The bytes are about to change."""
        self._changes += 1
        self.is_flushed = False

    def touch(self) -> None:
        """The bytes have changed just now."""
        self.mtime_ns = time.time_ns()
        self.changed_ns = max(self.changed_ns, self.mtime_ns)
