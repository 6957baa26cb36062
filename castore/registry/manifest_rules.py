"""What a manifest may say: types, ranges, names. A manifest comes from a backend, and whoever writes there wrote it.

Each function gives the value when it is right, and raises ValueError when it is not.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

from castore.digest import CHECKSUM_BYTES, PRIMARY_ALGORITHM, BlobSummary, Digest

PATH_BYTES_MAX: Final = 1 << 20
"""A path from the root of a package. Linux bounds a name, and what one call may name, but not depth."""
NAME_BYTES_MAX: Final = 255
TARGET_BYTES_MAX: Final = 4095
ATTRIBUTE_BYTES_MAX: Final = 64 * 1024
"""Linux's own limits, as in ingest/: of names, of targets, of all attributes of one entry."""
LABEL_CHARACTERS_MAX: Final = 128
BACKENDS_MAX: Final = 100
BLOCK_BYTES_LEAST: Final = 4096
BLOCK_BYTES_MOST: Final = 16 * 1024 * 1024
"""A read holds whole blocks in memory."""
ID_MAX: Final = 2**32 - 1
TIME_MAX_NS: Final = 2**63 - 1
SIZE_BYTES_MAX: Final = 2**63 - 1


def integer(value: Any, what: str, least: int, most: int) -> int:
    """A whole number within a range; true and 1.0 are none."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is not a whole number from {least} to {most}")
    return value


def text(value: Any, what: str, most: int) -> str:
    """1 to `most` printable characters."""
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= most:
        raise ValueError(f"{what} is not 1 to {most} printable characters")
    return value


def backend_ids(value: Any) -> tuple[str, ...]:
    """Different ids of backends, at least one."""
    if not isinstance(value, list) or not 0 < len(value) <= BACKENDS_MAX:
        raise ValueError(f"backend_ids is not a list of 1 to {BACKENDS_MAX} backends")
    ids = tuple(text(item, "a backend's id", LABEL_CHARACTERS_MAX) for item in value)
    if len(set(ids)) != len(ids):
        raise ValueError("backend_ids names a backend twice")
    return ids


def path(value: bytes, what: str = "the path") -> bytes:
    """b'' for the root, else names between slashes, each as Linux allows."""
    if len(value) > PATH_BYTES_MAX:
        raise ValueError(f"{what} has more than {PATH_BYTES_MAX} bytes")
    for name in value.split(b"/") if value else ():
        if name in (b"", b".", b"..") or b"\0" in name or len(name) > NAME_BYTES_MAX:
            raise ValueError(f"{what} {shown(value)} has a name that Linux does not allow")
    return value


def target(value: bytes) -> bytes:
    """What a symbolic link says: it may lead anywhere, as in any file system."""
    if b"\0" in value or not 0 < len(value) <= TARGET_BYTES_MAX:
        raise ValueError(f"the target has not 1 to {TARGET_BYTES_MAX} bytes without NUL")
    return value


def attributes(found: dict[bytes, bytes], labels: tuple[bytes, ...]) -> dict[bytes, bytes]:
    """Attributes that a publisher can have set; `labels` are the computed names that are allowed."""
    for name in found:
        if not name.startswith(b"user.") or b"\0" in name or not 5 < len(name) <= NAME_BYTES_MAX:
            raise ValueError(f"the attribute {shown(name)} is not one of user.*")
        if name.startswith((b"user.castore.", b"user.hash.")) and name not in labels:
            raise ValueError(f"the attribute {shown(name)} is computed, and cannot be set")
    if sum(len(name) + len(value) for name, value in found.items()) > ATTRIBUTE_BYTES_MAX:
        raise ValueError(f"the attributes have more than {ATTRIBUTE_BYTES_MAX} bytes together")
    return found


def blob(item: dict[str, Any]) -> BlobSummary:
    """The digest, size and checksums of a file, which fit each other."""
    digest = Digest.parse(text(item["digest"], "the digest", LABEL_CHARACTERS_MAX))
    if digest.algorithm != PRIMARY_ALGORITHM:
        raise ValueError(f"a file has a digest of {digest.algorithm}")
    size = integer(item["size_bytes"], "size_bytes", 0, SIZE_BYTES_MAX)
    block = integer(item["block_size_bytes"], "block_size_bytes", BLOCK_BYTES_LEAST, BLOCK_BYTES_MOST)
    width = CHECKSUM_BYTES.get(text(item["checksum_algorithm"], "checksum_algorithm", LABEL_CHARACTERS_MAX))
    if width is None:
        raise ValueError(f"checksum_algorithm is not one of {', '.join(CHECKSUM_BYTES)}")
    checksums = decoded(item["checksums"], "checksums")
    if len(checksums) != -(-size // block) * width:
        raise ValueError(f"the checksums have {len(checksums)} bytes, which does not fit {size} bytes of content")
    return BlobSummary(digest, size, block, item["checksum_algorithm"], checksums)


def decoded(value: Any, what: str) -> bytes:
    """The bytes that base64 stands for."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is not text")
    try:
        return base64.b64decode(value.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as exc:
        raise ValueError(f"{what} is not base64: {exc}") from exc


def shown(value: bytes) -> str:
    """Bytes for a person, cut where they are long."""
    return repr(value[:200].decode(errors="backslashreplace"))
