"""The tree by-digest/: every blob of files by its digest, for the mount's owner. Read from the catalog alone."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator

import pyfuse3

from castore.catalog.reader import CatalogReader
from castore.digest import PRIMARY_ALGORITHM, Digest
from castore.errors import NoAttribute, NotFound
from mount.attributes import CHANGING_SECONDS, absent, make
from mount.inodes import BY_DIGEST, BY_DIGEST_ALGORITHM, DIGEST_DIRECTORIES, DIGEST_FILES
from mount.packages import PAGE, blob_attribute
from mount.recent import Child

_HEX2 = re.compile(rb"[0-9a-f]{2}")
_HEX64 = re.compile(rb"[0-9a-f]{64}")
_SECOND_LEVEL = 256


class ByDigestTree:
    """`by-digest/sha256/ab/cd/HEX`. The two levels of directories are all there, full or empty."""

    def __init__(self, catalog: CatalogReader) -> None:
        self._catalog = catalog
        self._started_ns = time.time_ns()

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Attributes of a directory or file. Raises NotFound."""
        if inode >= DIGEST_FILES:
            known = self._catalog.blob_digest(inode - DIGEST_FILES)
            if known is None:
                raise NotFound("no such blob")
            return self._file(inode, known[1])
        return self._directory(inode)

    def _directory(self, inode: int) -> pyfuse3.EntryAttributes:
        return make(
            inode,
            stat.S_IFDIR | 0o700,
            uid=os.getuid(),
            gid=os.getgid(),
            mtime_ns=self._started_ns,
            seconds=CHANGING_SECONDS,
        )

    def _file(self, inode: int, size_bytes: int) -> pyfuse3.EntryAttributes:
        return make(
            inode,
            stat.S_IFREG | 0o400,
            uid=os.getuid(),
            gid=os.getgid(),
            mtime_ns=0,
            size_bytes=size_bytes,
            seconds=CHANGING_SECONDS,
        )

    def lookup(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        """Attributes of a name, or the answer that it is absent."""
        if parent == BY_DIGEST:
            if name == PRIMARY_ALGORITHM.encode():
                return self._directory(BY_DIGEST_ALGORITHM)
        elif parent == BY_DIGEST_ALGORITHM or parent < DIGEST_DIRECTORIES + _SECOND_LEVEL:
            if _HEX2.fullmatch(name):
                return self._directory(_below(parent, int(name, 16)))
        elif _HEX64.fullmatch(name):
            blob = self._catalog.blob_by_digest(Digest(PRIMARY_ALGORITHM, bytes.fromhex(name.decode())))
            if blob is not None and blob.summary.digest.raw.startswith(_prefix(parent)):
                return self._file(DIGEST_FILES + blob.blob_id, blob.summary.size_bytes)
        return absent(CHANGING_SECONDS)

    def parent(self, inode: int) -> int:
        """The directory above a directory."""
        if inode in (BY_DIGEST, BY_DIGEST_ALGORITHM):
            return BY_DIGEST if inode == BY_DIGEST_ALGORITHM else 1
        prefix = _prefix(inode)
        return BY_DIGEST_ALGORITHM if len(prefix) == 1 else DIGEST_DIRECTORIES + prefix[0]

    def children(self, inode: int, after: int) -> Iterator[Child]:
        """The entries of a directory with a cookie above `after`."""
        if inode == BY_DIGEST:
            if after < 1:
                yield 1, PRIMARY_ALGORITHM.encode(), self._directory(BY_DIGEST_ALGORITHM)
        elif inode == BY_DIGEST_ALGORITHM or inode < DIGEST_DIRECTORIES + _SECOND_LEVEL:
            for value in range(max(0, after), 256):
                yield value + 1, f"{value:02x}".encode(), self._directory(_below(inode, value))
        else:
            yield from self._blobs(_prefix(inode), after)

    def _blobs(self, prefix: bytes, after: int) -> Iterator[Child]:
        # Cookies are blob numbers, so a directory is read whole and in their order: it holds 1/65536 of all blobs.
        end = (int.from_bytes(prefix) + 1).to_bytes(3)
        high = end[1:] if end[0] == 0 else b"\xff" * 33
        found: list[tuple[int, Digest, int]] = []
        low = prefix
        while page := self._catalog.digests(PRIMARY_ALGORITHM, low, high, PAGE):
            found += page
            low = page[-1][1].raw + b"\0"
        for blob_id, digest, size_bytes in sorted(found):
            if blob_id > after:
                yield blob_id, digest.hex.encode(), self._file(DIGEST_FILES + blob_id, size_bytes)

    def attribute(self, inode: int, name: bytes) -> bytes:
        """A computed attribute of a blob. Raises NoAttribute."""
        value = blob_attribute(self._catalog, inode - DIGEST_FILES, name) if inode >= DIGEST_FILES else None
        if value is None:
            raise NoAttribute("no such attribute")
        return value


def _below(parent: int, value: int) -> int:
    if parent == BY_DIGEST_ALGORITHM:
        return DIGEST_DIRECTORIES + value
    return DIGEST_DIRECTORIES + _SECOND_LEVEL + ((parent - DIGEST_DIRECTORIES) << 8) + value


def _prefix(inode: int) -> bytes:
    value = inode - DIGEST_DIRECTORIES
    return bytes([value]) if value < _SECOND_LEVEL else (value - _SECOND_LEVEL).to_bytes(2)
