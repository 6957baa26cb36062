"""Whatever bytes a backend gives for a manifest: it is read, right in every value, or it is a FormatError. Fuzzed."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from castore.catalog.building import CatalogBuilder, PackageTree
from castore.catalog.connection import create_catalog
from castore.catalog.records import Kind
from castore.digest import CHECKSUM_BYTES
from castore.errors import FormatError
from castore.registry.manifest import ManifestEntry, read_manifest
from castore.registry.names import is_valid_name, is_valid_version
from tests.registry.test_rebuild import file, folder, hard_link, header, link, packed

LINES = [
    header("zlib/1"),
    folder(""),
    folder("d", attributes=[{"name": "user.a", "value_base64": "AAAA"}]),
    file("d/f", b"x" * 300_000),
    hard_link("h", "d/f"),
    link("l", "d/f"),
    {"end": {"entry_count": 5}},
]
KEYS = sorted({key for line in LINES for key in line} | {"path_base64", "link_to_base64", "target_base64"})
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", ".", "..", "/", "a/../b", "\0", "AA==", "file", "directory", "symlink", "\ud800", "latest"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner),
    max_leaves=5,
)
changes = st.lists(
    st.tuples(st.integers(0, len(LINES) - 1), st.sampled_from(KEYS), values | st.just(...)), min_size=1, max_size=4
)


def read(data: bytes) -> list[ManifestEntry]:
    """All of it. FormatError is the only error."""
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, "manifest")
        path.write_bytes(data)
        try:
            found, entries = read_manifest(path)
            assert is_valid_name(found.name.encode())
            assert is_valid_version(found.version.encode())
            assert all(0 < len(label) <= 128 for label in (found.producer, found.retention_class, *found.backend_ids))
            whole = list(entries)
        except FormatError:
            return []
    for entry in whole:
        check(entry)
    return whole


def check(entry: ManifestEntry) -> None:
    """What nothing behind the reader looks at again."""
    for path in (entry.path, entry.link_to or b""):
        assert all(part not in (b"", b".", b"..") and b"\0" not in part for part in path.split(b"/") if path)
    assert all(type(number) is int for number in (entry.mode, entry.uid, entry.gid, entry.mtime_ns))
    assert 0 <= entry.mode <= 0o777
    assert -(2**63) <= entry.mtime_ns < 2**63
    assert b"\0" not in entry.target
    if entry.link_to is None:
        assert (entry.blob is not None) is (entry.kind is Kind.FILE)
    if entry.blob is not None:
        blocks = -(-entry.blob.size_bytes // entry.blob.block_size_bytes)
        assert len(entry.blob.checksums) == blocks * CHECKSUM_BYTES[entry.blob.checksum_algorithm]
    for name, value in (entry.attributes or {}).items():
        assert name.startswith(b"user.")
        assert isinstance(value, bytes)


def test_what_is_not_changed_is_read() -> None:
    assert len(read(packed(*LINES))) == 5


@given(changes)
@example([(3, "checksums", "\ud800")])
@example([(1, "attributes", {"name": 1})])
@example([(2, "attributes", [None])])
@example([(2, "attributes", [{"name": "user.a"}])])
@example([(6, "end", {"entry_count": True})])
@settings(max_examples=300)
def test_other_values(made: list[tuple[int, str, Any]]) -> None:
    """`...` takes a key away."""
    lines: list[dict[str, Any]] = [dict(line) for line in LINES]
    for number, key, value in made:
        lines[number].pop(key, None)
        if value is not ...:
            lines[number][key] = value
    read(packed(*lines))


@given(st.binary(max_size=300), st.integers(0, 10_000), st.integers(0, 40), st.booleans())
@settings(max_examples=300)
def test_other_bytes(noise: bytes, where: int, length: int, inside: bool) -> None:
    """Noise instead of some bytes, before compression or after it."""
    text = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)
    whole = text if inside else gzip.compress(text, mtime=0)
    where %= len(whole)
    changed = whole[:where] + noise + whole[where + length :]
    read(gzip.compress(changed, 1) if inside else changed)


@given(st.binary(max_size=500))
def test_only_noise(noise: bytes) -> None:
    assert read(noise) == read(gzip.compress(noise, 1)) == []


class _RolledBackError(Exception):
    pass


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CatalogBuilder]:
    path = tmp_path_factory.mktemp("trees") / "catalog.db"
    create_catalog(path)
    with closing(CatalogBuilder(path)) as made:
        yield made


parts = st.lists(st.sampled_from([b"a", b"b", b"\xff"]), max_size=3).map(b"/".join)
kinds = st.sampled_from(list(Kind))
steps = st.lists(st.tuples(parts, kinds, st.none() | parts.filter(bool)), max_size=8)


@given(steps)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_trees_become_packages(builder: CatalogBuilder, made: list[tuple[bytes, Kind, bytes | None]]) -> None:
    """Against a model: a dictionary of paths."""
    model: dict[bytes, Kind] = {}
    expected = True
    for path, kind, link_to in made:
        parent = path.rpartition(b"/")[0]
        fits = path not in model and (model.get(parent) is Kind.DIRECTORY if path else kind is Kind.DIRECTORY)
        if path and link_to is not None:
            fits = fits and kind is not Kind.DIRECTORY and model.get(link_to) is kind
        elif not path and link_to is not None:
            fits = False
        expected = expected and fits
        model[path] = kind
    expected = expected and b"" in model
    assert _makes_a_package(builder, made) is expected


def _makes_a_package(builder: CatalogBuilder, made: list[tuple[bytes, Kind, bytes | None]]) -> bool:
    """Whether the builder takes these entries; it keeps none of them."""
    try:
        with builder.whole():
            tree = PackageTree(builder, 5, "1", 7)
            for path, kind, link_to in made:
                if link_to is not None:
                    tree.add_link(path, kind, link_to)
                else:
                    tree.add(path, kind, 0, (0, 0), 0, 0, 1 if kind is Kind.FILE else 0, b"", {})
            tree.finish()
            assert builder._execute("SELECT count(*) FROM entries").fetchone() == (len(made),)
            raise _RolledBackError
    except _RolledBackError:
        return True
    except FormatError:
        assert builder._execute("SELECT count(*) FROM entries").fetchone() == (0,)
        return False
