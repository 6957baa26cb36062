"""The package manifest: all that the catalog knows of one package, as an object. docs/FORMAT.md fixes it.

Gzip-compressed JSON Lines: a header, one line per entry with parents before children, and a footer that proves that
nothing is missing. Written and read in one pass, in bounded memory. What is read may be forged: `manifest_rules` says
what an entry may be, and whoever makes a tree of them sees to it that they are one.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from castore.catalog.records import Kind
from castore.digest import CHECKSUM_BYTES, MANIFEST_ALGORITHM, BlobHasher, BlobSummary, Digest
from castore.errors import FormatError
from castore.registry import manifest_rules as rules
from castore.registry.names import is_valid_name, is_valid_version

FORMAT_VERSION: Final = 1
LINE_MAX: Final = 512 * 1024 * 1024
"""Longest line that is read: the checksums of a 5 TiB file, base64."""
UNPROVEN_LINE_MAX: Final = 16 * 1024 * 1024
"""Longest line that is read without a proof: the checksums of a file of 190 GiB. A few compressed bytes make a longer
one as well as a short one; so of a longer one, the reader's `proves` is asked first."""
LONG_LINE_BYTES: Final = 256 * 1024
VALUES_MAX: Final = 100_000
"""Values in a line that is longer than that. An entry with as many attributes as there may be has a third; each value
takes up to 200 bytes of memory, for two in the line."""
ENTRIES_MAX: Final = 20_000_000
"""Entries of a package that are read: twice what a whole catalog is made for."""
LABELS: Final = (b"user.castore.producer", b"user.castore.retention_class")
"""Attributes of the root which are no computed ones."""

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


Proves = Callable[[Digest, int], bool]
"""Whether there is an object of that digest and size."""


def read_manifest(path: Path, proves: Proves | None = None) -> tuple[ManifestHeader, Iterator[ManifestEntry]]:
    """The header, and the entries one by one; the iterator raises FormatError when the footer is missing or differs.

    Raises FormatError for anything that is not a manifest of a known version, and for values that no publish writes.
    `proves` is asked before a line is read that takes much memory; without it, every line may be as long as the format
    allows.
    """
    lines = _lines(path, proves)
    first = next(lines, None)
    if first is None or "castore_manifest" not in first:
        raise FormatError(f"{path}: not a package manifest")
    if first["castore_manifest"] != FORMAT_VERSION:
        version = str(first["castore_manifest"])[:20]
        raise FormatError(f"{path}: manifest version {version}; this castore reads {FORMAT_VERSION}")
    try:
        header = _header(first)
    except KeyError as exc:
        raise FormatError(f"{path}: the header lacks {exc}") from exc
    except (TypeError, ValueError) as exc:
        raise FormatError(f"{path}: the header is not well formed: {exc}") from exc
    return header, _entries(path, lines)


def _header(item: dict[str, Any]) -> ManifestHeader:
    header = ManifestHeader(
        **{key: item[key] for key in _HEADER_KEYS}, backend_ids=rules.backend_ids(item["backend_ids"])
    )
    for what, is_right in (("name", is_valid_name), ("version", is_valid_version)):
        value = rules.text(item[what], what, rules.LABEL_CHARACTERS_MAX)
        if not is_right(value.encode()):
            raise ValueError(f"{what} {value!r} is not a {what.upper()}")
    for what in ("producer", "retention_class"):
        rules.text(item[what], what, rules.LABEL_CHARACTERS_MAX)
    for what in ("publisher_uid", "name_uid", "name_gid"):
        rules.integer(item[what], what, 0, rules.ID_MAX)
    rules.integer(header.published_at_ns, "published_at_ns", 0, rules.TIME_MAX_NS)
    rules.integer(header.name_mode, "name_mode", 0, 0o777)
    return header


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
    path = rules.path(_bytes_of("path", item))
    kind = _KIND_OF.get(rules.text(item["kind"], "kind", rules.LABEL_CHARACTERS_MAX))
    if kind is None:
        raise ValueError(f"kind is not one of {', '.join(_KIND_OF)}")
    if "link_to" in item or "link_to_base64" in item:
        link_to = rules.path(_bytes_of("link_to", item), "link_to")
        if not path or not link_to or kind is Kind.DIRECTORY:
            raise ValueError("a directory is linked to")
        return ManifestEntry(path=path, kind=kind, link_to=link_to)
    listed = item.get("attributes", [])
    if not isinstance(listed, list):
        raise ValueError("attributes is not a list")
    found = {_bytes_of("name", each): rules.decoded(each["value_base64"], "value_base64") for each in listed}
    if len(found) != len(listed):
        raise ValueError("two attributes have one name")
    return ManifestEntry(
        path=path,
        kind=kind,
        mode=rules.integer(item["mode"], "mode", 0, 0o777),
        uid=rules.integer(item["uid"], "uid", 0, rules.ID_MAX),
        gid=rules.integer(item["gid"], "gid", 0, rules.ID_MAX),
        mtime_ns=rules.integer(item["mtime_ns"], "mtime_ns", -rules.TIME_MAX_NS - 1, rules.TIME_MAX_NS),
        blob=rules.blob(item) if kind is Kind.FILE else None,
        target=rules.target(_bytes_of("target", item)) if kind is Kind.SYMLINK else b"",
        attributes=rules.attributes(found, () if path else LABELS),
    )


def _entries(path: Path, lines: Iterator[dict[str, Any]]) -> Iterator[ManifestEntry]:
    count = 0
    for item in lines:
        if "end" in item:
            end = item["end"]
            if not isinstance(end, dict) or end.get("entry_count") != count or next(lines, None) is not None:
                raise FormatError(f"{path}: the footer does not agree with the {count} entries")
            return
        if count == ENTRIES_MAX:
            raise FormatError(f"{path}: has more than {ENTRIES_MAX} entries")
        try:
            entry = _entry(item)
        except KeyError as exc:
            raise FormatError(f"{path}: entry {count + 1} is not well formed: it lacks {exc}") from exc
        except (TypeError, ValueError) as exc:
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
    if key not in item:
        return rules.decoded(item[f"{key}_base64"], f"{key}_base64")
    if not isinstance(item[key], str):
        raise ValueError(f"{key} is not text")
    encoded: bytes = item[key].encode()
    return encoded


def _line(item: dict[str, Any]) -> bytes:
    return json.dumps(item, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


_CLAIM: Final = re.compile(rb'(?<!\\)"size_bytes": ?([0-9]{1,19}), ?"digest": ?"([a-z0-9-]{1,20}:[0-9a-f]{64})"')


def _lines(path: Path, proves: Proves | None) -> Iterator[dict[str, Any]]:
    most = LINE_MAX if proves is None else UNPROVEN_LINE_MAX
    try:
        with gzip.open(path, "rb") as file:
            while line := file.readline(most):
                if len(line) == most and not line.endswith(b"\n"):
                    more = 0 if proves is None else _proven_bytes(line, proves)
                    line += file.readline(min(more, LINE_MAX - most))
                    if not line.endswith(b"\n"):
                        raise FormatError(f"{path}: a line is longer than {most} bytes, and no object needs that")
                if len(line) > LONG_LINE_BYTES and _value_count(line) > VALUES_MAX:
                    raise FormatError(f"{path}: a line has more than {VALUES_MAX} values, and no entry needs that")
                item = json.loads(line.decode(), parse_constant=_refuse)
                if not isinstance(item, dict):
                    raise FormatError(f"{path}: a line is not a JSON object")
                yield item
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as exc:
        raise FormatError(f"{path}: not a whole manifest: {exc}") from exc
    except RecursionError as exc:
        raise FormatError(f"{path}: not a manifest: its JSON is too deep") from exc


def _value_count(line: bytes) -> int:
    """How many values a line of JSON has, or more: commas and brackets outside of its texts."""
    without_escapes = re.sub(rb"\\.", b"", line, flags=re.DOTALL) if b"\\" in line else line
    bare = re.sub(rb'"[^"]*"?', b"", without_escapes)
    return sum(map(bare.count, (b",", b"[", b"{")))


def _proven_bytes(begin: bytes, proves: Proves) -> int:
    """How much longer a line may be because of the file that it begins to describe: 0 unless that is really there."""
    claim = _CLAIM.search(begin)
    if claim is None:
        return 0
    size_bytes, digest = int(claim[1]), Digest.parse(claim[2].decode())
    most = (size_bytes // rules.BLOCK_BYTES_LEAST + 1) * max(CHECKSUM_BYTES.values()) * 4 // 3 + 4
    return most if proves(digest, size_bytes) else 0


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
