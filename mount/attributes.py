"""Building the kernel's attribute structures, with their timeouts. No decisions about trees here."""

from __future__ import annotations

import stat
from typing import Final

import pyfuse3

from castore.catalog.records import Entry, Kind
from castore.catalog.workspace import Node

IMMUTABLE_SECONDS: Final = 86_400.0
"""Below a published VERSION nothing ever changes; a day keeps the kernel from asking without pinning it for ever."""
INGEST_SECONDS: Final = 300.0
"""This daemon is the only writer of ingest/: the kernel sees every change, and publish invalidates."""
CHANGING_SECONDS: Final = 1.0
"""Versions in packages/: another process may publish or delete."""
LINK_SECONDS: Final = 0.0
"""Tags move at any time, and `latest` with each publish. To tell the kernel then would take the lock that the publish
holds: a daemon that is killed just then would leave everybody waiting."""
ABSENT_SECONDS: Final = 0.0
"""What is absent in packages/ and packages/NAME: there at once when ingest/NAME is made or a version published."""

BLOCK_BYTES: Final = 1024 * 1024
"""st_blksize of files: cp then writes 1 MiB at a time, in less than half of the time that 128 KiB takes."""

_TYPES: Final = {Kind.DIRECTORY: stat.S_IFDIR, Kind.FILE: stat.S_IFREG, Kind.SYMLINK: stat.S_IFLNK}


def make(
    inode: int,
    mode: int,
    *,
    uid: int,
    gid: int,
    mtime_ns: int,
    size_bytes: int = 0,
    nlink: int = 1,
    ctime_ns: int | None = None,
    seconds: float,
    entry_seconds: float | None = None,
) -> pyfuse3.EntryAttributes:
    """Attributes from their parts; `seconds` is how long the kernel may keep them."""
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = inode
    attributes.st_mode = mode
    attributes.st_nlink = nlink
    attributes.st_uid = uid
    attributes.st_gid = gid
    attributes.st_size = size_bytes
    attributes.st_blksize = BLOCK_BYTES
    attributes.st_blocks = (size_bytes + 511) // 512
    attributes.st_mtime_ns = mtime_ns
    attributes.st_atime_ns = mtime_ns
    attributes.st_ctime_ns = mtime_ns if ctime_ns is None else ctime_ns
    attributes.attr_timeout = seconds
    attributes.entry_timeout = seconds if entry_seconds is None else entry_seconds
    return attributes


def of_entry(entry: Entry, inode: int = 0) -> pyfuse3.EntryAttributes:
    """Attributes of an entry below a published VERSION. Directories say nlink 1: their links are not counted.

    `inode` is for an answer to whoever asked by number: the kernel may still know a file that shows another's number
    under its own, which it had in ingest/.
    """
    return make(
        inode or entry.shown_inode,
        _TYPES[entry.kind] | entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        mtime_ns=entry.mtime_ns,
        ctime_ns=entry.ctime_ns,
        size_bytes=entry.size_bytes,
        nlink=entry.nlink,
        seconds=IMMUTABLE_SECONDS,
    )


def of_node(node: Node) -> pyfuse3.EntryAttributes:
    """Attributes of something in ingest/.

    The name of a VERSION is kept for as short as in packages/: a publish takes it there with the time that it has here.
    """
    return make(
        node.inode,
        _TYPES[node.kind] | node.mode,
        uid=node.uid,
        gid=node.gid,
        mtime_ns=node.mtime_ns,
        ctime_ns=node.ctime_ns,
        size_bytes=node.size_bytes,
        nlink=node.nlink,
        seconds=INGEST_SECONDS,
        entry_seconds=CHANGING_SECONDS if node.is_version else INGEST_SECONDS,
    )


def absent(seconds: float) -> pyfuse3.EntryAttributes:
    """The answer that a name is not there, to be kept that long."""
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = 0
    attributes.entry_timeout = seconds
    return attributes
