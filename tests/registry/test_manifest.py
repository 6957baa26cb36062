"""The package manifest: what is written is what is read, and what is cut, padded or foreign is refused."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.catalog.records import Kind
from castore.digest import MANIFEST_ALGORITHM, BlobHasher, BlobSummary, Digest
from castore.errors import FormatError
from castore.registry.manifest import ManifestEntry, ManifestHeader, read_manifest, write_manifest

HEADER = ManifestHeader(
    name="zlib",
    version="1.3",
    producer="ci-ünï",
    retention_class="release",
    publisher_uid=1000,
    published_at_ns=1_700_000_000_123_456_789,
    backend_ids=("local", "remote"),
    name_uid=1,
    name_gid=2,
    name_mode=0o775,
)


def summary_of(data: bytes) -> BlobSummary:
    hasher = BlobHasher()
    hasher.update(data)
    return hasher.finish()


names = (
    st.binary(min_size=1, max_size=40)
    .map(lambda name: name.replace(b"\0", b"_").replace(b"/", b"_"))
    .filter(lambda name: name not in (b".", b".."))
)
targets = st.binary(min_size=1, max_size=60).map(lambda target: target.replace(b"\0", b"_"))
paths = st.lists(names, min_size=1, max_size=4).map(b"/".join)
numbers = st.integers(0, 2**32 - 1)
common: dict[str, Any] = {
    "path": paths,
    "mode": st.integers(0, 0o777),
    "uid": numbers,
    "gid": numbers,
    "mtime_ns": st.integers(-(2**62), 2**62),
    "attributes": st.dictionaries(names.map(lambda name: b"user." + name), st.binary(max_size=50), max_size=3),
}
entries = st.one_of(
    st.builds(ManifestEntry, kind=st.just(Kind.DIRECTORY), **common),
    st.builds(ManifestEntry, kind=st.just(Kind.SYMLINK), target=targets, **common),
    st.builds(ManifestEntry, kind=st.just(Kind.FILE), blob=st.binary(max_size=300_000).map(summary_of), **common),
    st.builds(ManifestEntry, kind=st.sampled_from([Kind.FILE, Kind.SYMLINK]), path=paths, link_to=paths),
)


@given(st.lists(entries, max_size=8))
def test_round_trip(written: list[ManifestEntry]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "manifest")
        summary = write_manifest(path, HEADER, written)
        header, read = read_manifest(path)
        assert header == HEADER
        # No attributes and none given are the same.
        assert list(map(_comparable, read)) == list(map(_comparable, written))
        assert summary.digest == Digest.of(path.read_bytes(), MANIFEST_ALGORITHM)


def _comparable(entry: ManifestEntry) -> tuple[Any, ...]:
    return tuple(getattr(entry, name) or None for name in ManifestEntry.__slots__)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest of two entries."""
    path = tmp_path / "manifest"
    write_manifest(
        path,
        HEADER,
        [
            ManifestEntry(path=b"", kind=Kind.DIRECTORY, mode=0o755),
            ManifestEntry(path=b"f", kind=Kind.FILE, mode=0o644, blob=summary_of(b"x")),
        ],
    )
    return path


def test_cut_anywhere_is_refused(manifest: Path) -> None:
    whole = manifest.read_bytes()
    for length in range(len(whole)):
        manifest.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            list(read_manifest(manifest)[1])


def test_no_bit_may_flip(manifest: Path) -> None:
    """But for the time, the level and the system in the gzip header, which say nothing of the package."""
    whole, expected = manifest.read_bytes(), list(read_manifest(manifest)[1])
    for index in range(len(whole)):
        manifest.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        if index in range(4, 10) or index == 3:
            continue
        with pytest.raises(FormatError):
            list(read_manifest(manifest)[1])
    manifest.write_bytes(whole)
    assert list(read_manifest(manifest)[1]) == expected


def rewrite(path: Path, change: Any) -> None:
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    path.write_bytes(gzip.compress(b"".join(json.dumps(line).encode() + b"\n" for line in change(lines))))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines[:-1], "without its footer"),
        (lambda lines: [lines[0], lines[1], lines[3]], "footer does not agree"),
        (lambda lines: [*lines, lines[1]], "footer does not agree"),
        (lambda lines: [lines[0] | {"castore_manifest": 2}, *lines[1:]], "manifest version 2"),
        (lambda lines: [{"hello": 1}, *lines[1:]], "not a package manifest"),
        (lambda lines: [{k: v for k, v in lines[0].items() if k != "producer"}, *lines[1:]], "lacks 'producer'"),
        (lambda lines: [lines[0], lines[1], lines[2] | {"digest": "md5:00"}, lines[3]], "entry 2 is not well formed"),
        (lambda lines: [lines[0], lines[1], lines[2] | {"kind": "door"}, lines[3]], "entry 2 is not well formed"),
        (lambda lines: [[], *lines[1:]], "not a JSON object"),
        (lambda lines: [lines[0] | {"backend_ids": 1}, *lines[1:]], "header is not well formed"),
        (lambda lines: [*lines[:-1], {"end": 2}], "footer does not agree"),
    ],
)
def test_what_is_not_a_manifest(manifest: Path, change: Any, says: str) -> None:
    rewrite(manifest, change)
    with pytest.raises(FormatError, match=says):
        list(read_manifest(manifest)[1])
