"""`SHA256SUMS` and BagIt's `manifest-sha256.txt` in a version's root, checked before it is published.

Formats: coreutils' sha256sum (text, binary `*` and escaped `\\` lines), and RFC 8493 section 2.1.3 for BagIt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

from castore.catalog.records import Kind
from castore.catalog.workspace import Node, WorkspaceStore
from castore.errors import SumsMismatch

SUMS_FILES: Final = (b"SHA256SUMS", b"manifest-sha256.txt")
SUMS_BYTES_MAX: Final = 256 * 1024 * 1024
"""A longer list is refused: it is read while the kernel holds locks for the publish."""
LINE_BYTES_MAX: Final = 4 * 1024 * 1024
"""A longer line is refused: a path of 1 MiB, each byte of it in escapes, and its digest."""

LINKS_MAX: Final = 40
"""As many symbolic links as the kernel follows."""

_LINE: Final = re.compile(rb"(\\?)([0-9A-Fa-f]{64})(?: [ *]|[ \t]+)(.+)")
_ESCAPES: Final = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}


def check_sums(store: WorkspaceStore, version_inode: int, path_of: Callable[[int], Path]) -> None:
    """Raise SumsMismatch for the first listed file that is absent or differs. Blocking."""
    for name in SUMS_FILES:
        listing = store.child(version_inode, name)
        if listing is None or listing.kind is not Kind.FILE:
            continue
        if listing.size_bytes > SUMS_BYTES_MAX:
            raise SumsMismatch(f"{name.decode()}: larger than {SUMS_BYTES_MAX} bytes")
        bagit = name == SUMS_FILES[1]
        for number, digest_hex, path in _parse(name.decode(), path_of(listing.inode), bagit=bagit):
            shown = path.decode(errors="replace")
            node = _resolve(store, version_inode, path)
            if node is None or node.kind is not Kind.FILE:
                raise SumsMismatch(f"{name.decode()} line {number}: there is no file {shown!r}")
            summary = store.summary(node.inode)
            if summary is None or summary.digest.hex != digest_hex:
                raise SumsMismatch(f"{name.decode()} line {number}: {shown!r} has other bytes than listed")


def _parse(name: str, listing: Path, *, bagit: bool) -> Iterator[tuple[int, str, bytes]]:
    for number, line in enumerate(_lines(listing), 1):
        if len(line) > LINE_BYTES_MAX:
            raise SumsMismatch(f"{name} line {number}: longer than {LINE_BYTES_MAX} bytes")
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if not line.strip() or line.startswith(b"#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise SumsMismatch(f"{name} line {number}: not a SHA-256 digest and a path")
        path = match[3]
        if bagit:
            path = re.sub(rb"%(0[AaDd]|25)", lambda found: unquote_to_bytes(found[0]), path)
        elif match[1]:
            path = re.sub(rb"\\[\\nr]", lambda found: _ESCAPES[found[0]], path)
        yield number, match[2].decode().lower(), path


def _lines(listing: Path) -> Iterator[bytes]:
    """One after the other, of at most one byte more than LINE_BYTES_MAX."""
    with listing.open("rb") as file:
        while line := file.readline(LINE_BYTES_MAX + 1):
            yield line


def _resolve(store: WorkspaceStore, version_inode: int, path: bytes) -> Node | None:
    """The entry that `path` leads to within the version, through symbolic links as sha256sum follows them."""
    parts = path.split(b"/")[::-1]
    above: list[Node] = []
    node = store.node(version_inode)
    links = 0
    while parts and node is not None:
        part = parts.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            node = above.pop() if above else None
            continue
        found = store.child(node.inode, part)
        if found is not None and found.kind is Kind.SYMLINK:
            links += 1
            if links > LINKS_MAX or found.target.startswith(b"/"):
                return None
            parts.extend(found.target.split(b"/")[::-1])
        else:
            above.append(node)
            node = found
    return node
