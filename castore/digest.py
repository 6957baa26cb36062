"""Digests of whole blobs and checksums of their blocks, computed in one pass. Knows nothing of storage keys.

A *digest* names a blob and is cryptographic. A *checksum* guards one block against accidents; it is not a name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import xxhash

PRIMARY_ALGORITHM: Final = "sha256"
MANIFEST_ALGORITHM: Final = "manifest-sha256"
"""The tag of package manifests: the same function, another name space, so that listing it finds every package."""

_ALGORITHMS: Final[dict[str, Callable[[], Any]]] = {
    PRIMARY_ALGORITHM: hashlib.sha256,
    MANIFEST_ALGORITHM: hashlib.sha256,
}
_RAW_BYTES: Final = 32
_TEXT = re.compile(r"([a-z0-9-]+):([0-9a-f]{64})")

BLOCK_SIZE_BYTES: Final = 128 * 1024
"""Bytes in a block: the size at which 100 cold random 4 KiB reads cost least of 128, 256, 512 and 1024 KiB."""

XXH3: Final = "xxh3-64"
SHA256_BLOCKS: Final = "sha256"
CHECKSUM_BYTES: Final[dict[str, int]] = {XXH3: 8, SHA256_BLOCKS: 32}
"""Block checksum algorithms and the bytes that each takes; xxh3 in its canonical big-endian form."""


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """An algorithm-tagged digest of a whole blob.

    Raises ValueError when the algorithm is unknown or `raw` is not 32 bytes long.
    """

    algorithm: str
    raw: bytes

    def __post_init__(self) -> None:
        if self.algorithm not in _ALGORITHMS:
            raise ValueError(f"unknown digest algorithm {self.algorithm!r}; known: {', '.join(sorted(_ALGORITHMS))}")
        if len(self.raw) != _RAW_BYTES:
            raise ValueError(f"a {self.algorithm} digest has {_RAW_BYTES} bytes, not {len(self.raw)}")

    @property
    def hex(self) -> str:
        """The 64 lower-case hexadecimal digits, without the tag."""
        return self.raw.hex()

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.raw.hex()}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """The digest written as `sha256:<hex>`. Raises ValueError for anything else."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"not a digest: {text!r}; expected ALGORITHM:64 lower-case hex digits")
        return cls(match[1], bytes.fromhex(match[2]))

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview, algorithm: str = PRIMARY_ALGORITHM) -> Digest:
        """The digest of bytes at hand."""
        hasher = new_hasher(algorithm)
        hasher.update(data)
        return cls(algorithm, hasher.digest())


def new_hasher(algorithm: str = PRIMARY_ALGORITHM) -> Any:
    """A hashlib object (`update`, `digest`) for a digest algorithm. Raises KeyError for an unknown one."""
    return _ALGORITHMS[algorithm]()


def block_checksum(block: bytes | bytearray | memoryview, algorithm: str = XXH3) -> bytes:
    """The checksum of one block; `CHECKSUM_BYTES[algorithm]` bytes."""
    if algorithm == XXH3:
        return xxhash.xxh3_64_digest(block)
    return hashlib.sha256(block).digest()


@dataclass(frozen=True, slots=True)
class BlobSummary:
    """What one pass over a blob's bytes yields.

    `checksums` concatenates one checksum per block, in order; an empty blob has none.
    """

    digest: Digest
    size_bytes: int
    block_size_bytes: int
    checksum_algorithm: str
    checksums: bytes

    def checksum(self, index: int) -> bytes:
        """The checksum of block `index`, counted from 0."""
        width = CHECKSUM_BYTES[self.checksum_algorithm]
        return self.checksums[index * width : (index + 1) * width]


class BlobHasher:
    """Computes a blob's digest and its block checksums in one pass. Not thread-safe; one caller at a time."""

    def __init__(
        self,
        *,
        algorithm: str = PRIMARY_ALGORITHM,
        block_size_bytes: int = BLOCK_SIZE_BYTES,
        checksum_algorithm: str = XXH3,
    ) -> None:
        self.size_bytes = 0
        self._algorithm = algorithm
        self._block_size = block_size_bytes
        self._checksum_algorithm = checksum_algorithm
        self._whole = new_hasher(algorithm)
        self._checksums = bytearray()
        self._partial = self._new_block()
        self._partial_bytes = 0

    def _new_block(self) -> Any:
        return xxhash.xxh3_64() if self._checksum_algorithm == XXH3 else hashlib.sha256()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        self._whole.update(view)
        self.size_bytes += len(view)
        position = 0
        if self._partial_bytes:
            position = min(self._block_size - self._partial_bytes, len(view))
            self._feed_partial(view[:position])
        whole_end = position + (len(view) - position) // self._block_size * self._block_size
        for start in range(position, whole_end, self._block_size):
            self._checksums += block_checksum(view[start : start + self._block_size], self._checksum_algorithm)
        if whole_end < len(view):
            self._feed_partial(view[whole_end:])

    def _feed_partial(self, view: memoryview) -> None:
        self._partial.update(view)
        self._partial_bytes += len(view)
        if self._partial_bytes == self._block_size:
            self._close_partial()

    def _close_partial(self) -> None:
        self._checksums += self._partial.digest()
        self._partial = self._new_block()
        self._partial_bytes = 0

    def finish(self) -> BlobSummary:
        """The summary of all bytes so far. The hasher is spent afterwards."""
        if self._partial_bytes:
            self._close_partial()
        return BlobSummary(
            digest=Digest(self._algorithm, self._whole.digest()),
            size_bytes=self.size_bytes,
            block_size_bytes=self._block_size,
            checksum_algorithm=self._checksum_algorithm,
            checksums=bytes(self._checksums),
        )
