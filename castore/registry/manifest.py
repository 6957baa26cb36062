"""The package manifest: all that the catalog knows of one package, as an object. docs/FORMAT.md fixes it.

Gzip-compressed JSON Lines: a header, one line per entry with parents before children, and a footer that proves that
nothing is missing. Written and read in one pass, in bounded memory.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from castore.catalog.records import Kind
from castore.digest import MANIFEST_ALGORITHM, BlobHasher, BlobSummary, Digest
from castore.errors import FormatError

FORMAT_VERSION: Final = 1
LINE_MAX: Final = 512 * 1024 * 1024
"""Longest line that is read: the checksums of a 5 TiB file, base64."""

_KINDS: Final = {Kind.DIRECTORY: "directory", Kind.FILE: "file", Kind.SYMLINK: "symlink"}
_KIND_OF: Final = {text: kind for kind, text in _KINDS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestHeader:
    """The package as a whole. `name_*` are owner, group and mode of packages/NAME at its first publish."""

    name: str
    version: str
    producer: str
    retention_class: str
    publisher_uid: int
    published_at_ns: int
    backend_ids: tuple[str, ...]
    name_uid: int
    name_gid: int
    name_mode: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """One entry. `path` is relative to the package's root, b'' for the root itself.

    `link_to` is the path of an earlier entry of which this one is a further hard link, else None: then the entry has no
    attributes of its own. `blob` is set for files, `target` for symbolic links.
    """

    path: bytes
    kind: Kind
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    blob: BlobSummary | None = None
    target: bytes = b""
    attributes: dict[bytes, bytes] | None = None
    link_to: bytes | None = None


def write_manifest(path: Path, header: ManifestHeader, entries: Iterable[ManifestEntry]) -> BlobSummary:
    """Write a manifest file and return its summary, with a `manifest-sha256` digest. Blocking. Raises OSError."""
    count = 0
    # mtime 0 and no name: the same package gives the same bytes with the same zlib.
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as out:
        out.write(_line({"castore_manifest": FORMAT_VERSION, **_header_json(header)}))
        for entry in entries:
            out.write(_line(_entry_json(entry)))
            count += 1
        out.write(_line({"end": {"entry_count": count}}))
    hasher = BlobHasher(algorithm=MANIFEST_ALGORITHM)
    with path.open("rb") as written:
        while chunk := written.read(1 << 20):
            hasher.update(chunk)
    return hasher.finish()


def read_manifest(path: Path) -> tuple[ManifestHeader, Iterator[ManifestEntry]]:
    """The header, and the entries one by one; the iterator raises FormatError when the footer is missing or differs.

    Raises FormatError for anything that is not a manifest of a known version.
    """
    lines = _lines(path)
    first = next(lines, None)
    if first is None or "castore_manifest" not in first:
        raise FormatError(f"{path}: not a package manifest")
    if first["castore_manifest"] != FORMAT_VERSION:
        raise FormatError(f"{path}: manifest version {first['castore_manifest']}; this castore reads {FORMAT_VERSION}")
    try:
        header = ManifestHeader(**{key: first[key] for key in _HEADER_KEYS}, backend_ids=tuple(first["backend_ids"]))
    except KeyError as exc:
        raise FormatError(f"{path}: the header lacks {exc}") from exc
    except TypeError as exc:
        raise FormatError(f"{path}: the header is not well formed: {exc}") from exc
    return header, _entries(path, lines)


_HEADER_KEYS: Final = tuple(key for key in ManifestHeader.__slots__ if key != "backend_ids")


def _header_json(header: ManifestHeader) -> dict[str, Any]:
    return {key: getattr(header, key) for key in _HEADER_KEYS} | {"backend_ids": list(header.backend_ids)}


def _entry_json(entry: ManifestEntry) -> dict[str, Any]:
    out: dict[str, Any] = _bytes_json("path", entry.path) | {"kind": _KINDS[entry.kind]}
    if entry.link_to is not None:
        return out | _bytes_json("link_to", entry.link_to)
    out |= {
        "mode": entry.mode,
        "uid": entry.uid,
        "gid": entry.gid,
        "mtime_ns": entry.mtime_ns,
    }
    if entry.kind is Kind.SYMLINK:
        out |= _bytes_json("target", entry.target)
    if entry.blob is not None:
        out |= {
            "size_bytes": entry.blob.size_bytes,
            "digest": str(entry.blob.digest),
            "block_size_bytes": entry.blob.block_size_bytes,
            "checksum_algorithm": entry.blob.checksum_algorithm,
            "checksums": base64.b64encode(entry.blob.checksums).decode(),
        }
    if entry.attributes:
        out["attributes"] = [
            _bytes_json("name", name) | {"value_base64": base64.b64encode(value).decode()}
            for name, value in sorted(entry.attributes.items())
        ]
    return out


def _entry(item: dict[str, Any]) -> ManifestEntry:
    path = _bytes_of("path", item)
    kind = _KIND_OF[item["kind"]]
    if "link_to" in item or "link_to_base64" in item:
        return ManifestEntry(path=path, kind=kind, link_to=_bytes_of("link_to", item))
    blob = None
    if kind is Kind.FILE:
        blob = BlobSummary(
            Digest.parse(item["digest"]),
            item["size_bytes"],
            item["block_size_bytes"],
            item["checksum_algorithm"],
            base64.b64decode(item["checksums"]),
        )
    return ManifestEntry(
        path=path,
        kind=kind,
        mode=item["mode"],
        uid=item["uid"],
        gid=item["gid"],
        mtime_ns=item["mtime_ns"],
        blob=blob,
        target=_bytes_of("target", item) if kind is Kind.SYMLINK else b"",
        attributes={
            _bytes_of("name", attribute): base64.b64decode(attribute["value_base64"])
            for attribute in item.get("attributes", ())
        },
    )


def _entries(path: Path, lines: Iterator[dict[str, Any]]) -> Iterator[ManifestEntry]:
    count = 0
    for item in lines:
        if "end" in item:
            end = item["end"]
            if not isinstance(end, dict) or end.get("entry_count") != count or next(lines, None) is not None:
                raise FormatError(f"{path}: the footer does not agree with the {count} entries")
            return
        try:
            entry = _entry(item)
        except (KeyError, TypeError, ValueError) as exc:
            raise FormatError(f"{path}: entry {count + 1} is not well formed: {exc}") from exc
        count += 1
        yield entry
    raise FormatError(f"{path}: ends after {count} entries, without its footer")


def _bytes_json(key: str, value: bytes) -> dict[str, Any]:
    """Names are bytes, JSON is Unicode: what is not UTF-8 goes in base64 under another key."""
    try:
        return {key: value.decode()}
    except UnicodeDecodeError:
        return {f"{key}_base64": base64.b64encode(value).decode()}


def _bytes_of(key: str, item: dict[str, Any]) -> bytes:
    return item[key].encode() if key in item else base64.b64decode(item[f"{key}_base64"])


def _line(item: dict[str, Any]) -> bytes:
    return json.dumps(item, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rb") as file:
            while line := file.readline(LINE_MAX):
                item = json.loads(line)
                if not isinstance(item, dict):
                    raise FormatError(f"{path}: a line is not a JSON object")
                yield item
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as exc:
        raise FormatError(f"{path}: not a whole manifest: {exc}") from exc
