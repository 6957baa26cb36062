"""Rebuilding from manifests: what is right comes back, what is hostile is refused by name, and the others go on."""

from __future__ import annotations

import base64
import gzip
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from castore.catalog.building import FOLDERS_KEPT, CatalogBuilder
from castore.catalog.checking import CheckReader
from castore.catalog.connection import create_catalog
from castore.catalog.package_tree import TreeReader
from castore.catalog.records import Kind
from castore.digest import MANIFEST_ALGORITHM, BlobHasher, BlobSummary, Digest
from castore.errors import StorageUnavailable
from castore.registry.manifest import UNPROVEN_LINE_MAX
from castore.registry.rebuild import (
    AHEAD,
    ERRORS_IN_A_ROW,
    FUTURE_NS,
    MANIFEST_BYTES_MAX,
    Outcome,
    Rebuild,
    RebuildTally,
    Result,
)
from castore.storage.layout import key_of
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend
from tests.catalog.catalogs import summary_of
from tests.storage.memory_backend import MemoryBackend

Line = dict[str, Any]


def folder(path: str, **more: Any) -> Line:
    return {"path": path, "kind": "directory", "mode": 0o755, "uid": 1, "gid": 2, "mtime_ns": 7, **more}


def link(path: str, target: str, **more: Any) -> Line:
    return {**folder(path), "kind": "symlink", "target": target, **more}


def file(path: str, data: bytes = b"", summary: BlobSummary | None = None, **more: Any) -> Line:
    made = summary or summary_of(data)
    return {
        **folder(path),
        "kind": "file",
        "size_bytes": made.size_bytes,
        "digest": str(made.digest),
        "block_size_bytes": made.block_size_bytes,
        "checksum_algorithm": made.checksum_algorithm,
        "checksums": base64.b64encode(made.checksums).decode(),
        **more,
    }


def hard_link(path: str, link_to: str, kind: str = "file") -> Line:
    return {"path": path, "kind": kind, "link_to": link_to}


def header(ref: str, **more: Any) -> Line:
    name, version = ref.split("/", 1)
    return {
        "castore_manifest": 1,
        "name": name,
        "version": version,
        "producer": "ci",
        "retention_class": "release",
        "publisher_uid": 7,
        "published_at_ns": 1000,
        "name_uid": 3,
        "name_gid": 4,
        "name_mode": 0o775,
        "backend_ids": ["one", "two"],
        **more,
    }


def manifest_of(ref: str, *entries: Line, **more: Any) -> bytes:
    """What publish writes, for any entries."""
    return packed(header(ref, **more), folder(""), *entries, {"end": {"entry_count": 1 + len(entries)}})


def packed(*lines: Line | bytes) -> bytes:
    whole = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return gzip.compress(b"".join(line + b"\n" for line in whole), mtime=0)


class World:
    """A backend, and a catalog that is rebuilt from it."""

    def __init__(self, root: Path) -> None:
        self.path = root / "catalog.db"
        self.folder = root / "manifests"
        self.folder.mkdir()
        self.backends: dict[str, StorageBackend] = {name: MemoryBackend(name) for name in ("one", "two")}

    async def put(self, data: bytes, algorithm: str = "sha256", *, backend_id: str = "one") -> Digest:
        digest = Digest.of(data, algorithm)
        await self.backends[backend_id].put(digest, BytesSource(data))
        return digest

    async def put_manifest(self, data: bytes, backend_id: str = "one") -> Digest:
        return await self.put(data, MANIFEST_ALGORITHM, backend_id=backend_id)

    async def put_as(self, digest: Digest, data: bytes) -> None:
        """Other bytes under a digest, as whoever writes to the backend can put them there."""
        await self.backends["one"].put(digest, BytesSource(data))

    async def rebuild(
        self, backend_id: str = "one", *, first_inode: int = 0, **options: Any
    ) -> tuple[RebuildTally, list[Outcome]]:
        create_catalog(self.path)
        outcomes: list[Outcome] = []
        builder = CatalogBuilder(self.path, first_inode=first_inode)
        run = Rebuild(
            builder,
            self.backends[backend_id],
            folder=self.folder,
            on_outcome=outcomes.append,
            **{"replaces": True, **options},
        )
        await run.run()
        builder.close()
        assert list(self.folder.iterdir()) == []
        self.check()
        return run.tally, outcomes

    def check(self) -> None:
        """Whatever was refused, what is in the catalog is sound."""
        with CheckReader(self.path) as reader:
            assert [trouble for result in reader.run(lambda *_: None) for trouble in result.kept] == []

    @contextmanager
    def reader(self) -> Iterator[TreeReader]:
        with TreeReader(self.path) as reader:
            yield reader

    def refs(self) -> list[str]:
        with self.reader() as reader:
            return [package.ref for package in reader.packages()]

    def statuses(self) -> dict[tuple[str, str], str]:
        with self.reader() as reader:
            rows = reader._rows(
                "SELECT algorithm, digest, backend_id, status, reason FROM storage_locations JOIN blobs USING (blob_id)"
            )
            return {(str(Digest(row[0], row[1])), row[2]): f"{row[3]} {row[4]}".rstrip() for row in rows}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_everything_of_a_package_comes_back(world: World) -> None:
    attributes = [{"name": "user.note", "value_base64": base64.b64encode(b"\0\xff").decode()}]
    one, two = await world.put(b"one"), await world.put(b"")
    manifest = await world.put_manifest(
        manifest_of(
            "zlib/1.3",
            folder("dir", mode=0o700, mtime_ns=-5),
            file("dir/one", b"one", attributes=attributes),
            hard_link("again", "dir/one"),
            hard_link("more", "again"),
            file("two"),
            link("link", "../../../etc/passwd"),
            {**hard_link("link 2", "link", "symlink")},
            {**folder("x"), "path_base64": base64.b64encode(b"\xff").decode()} | {"path": "y"},
        )
    )
    tally, outcomes = await world.rebuild()
    assert outcomes == [Outcome(manifest, Result.ADDED, "zlib/1.3")]
    assert (tally.object_count, tally.unknown_count, tally.failed) == (2, 0, {})
    with world.reader() as reader:
        package = reader.package("zlib", "latest")
        assert package is not None
        assert (package.producer, package.retention_class, package.publisher_uid) == ("ci", "release", 7)
        assert (package.published_at_ns, package.file_count, package.size_bytes) == (1000, 4, 3)
        assert (package.backend_ids, package.manifest_digest) == (("one",), manifest)
        name = reader.package_name("zlib")
        assert name is not None
        assert (name.uid, name.gid, name.mode, name.mtime_ns, name.latest_version) == (3, 4, 0o775, 1000, "1.3")
        entries = dict(reader.walk(package.root_id))
        first = entries[b"dir/one"]
        assert (first.kind, first.mode, first.uid, first.gid, first.mtime_ns) == (Kind.FILE, 0o755, 1, 2, 7)
        assert (first.ctime_ns, first.size_bytes, first.nlink) == (1000, 3, 3)
        assert entries[b"again"].inode == entries[b"more"].inode == first.inode == first.entry_id
        assert reader.attributes(first.inode) == {b"user.note": b"\0\xff"}
        assert (entries[b"dir"].mode, entries[b"dir"].mtime_ns) == (0o700, -5)
        assert (entries[b"link"].target, entries[b"link"].nlink) == (b"../../../etc/passwd", 2)
        assert entries[b"link 2"].inode == entries[b"link"].inode
    assert world.statuses() == dict.fromkeys([(str(each), "one") for each in (one, two, manifest)], "stored")


async def test_latest_and_the_owner_of_a_name(world: World) -> None:
    """The version published last, and the owner of the first one, in whatever order their manifests come."""
    for version, time_ns in (("3", 30), ("1", 10), ("2", 20)):
        more = {"published_at_ns": time_ns, "name_uid": time_ns, "name_mode": time_ns}
        await world.put_manifest(manifest_of(f"zlib/{version}", **more))
    await world.rebuild()
    with world.reader() as reader:
        name = reader.package_name("zlib")
    assert name is not None
    assert (name.latest_version, name.mtime_ns, name.uid, name.mode) == ("3", 30, 10, 10)


async def test_inodes_do_not_depend_on_chance(world: World, tmp_path: Path) -> None:
    for number in range(AHEAD + 5):
        await world.put_manifest(manifest_of(f"p{number}/1", folder("a"), folder("a/b")))
    await world.rebuild()
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")
    other.backends = world.backends
    await other.rebuild()
    with world.reader() as reader, other.reader() as again:
        for package in reader.packages():
            assert again.package(package.name, package.version) == package
            assert dict(again.walk(package.root_id)) == dict(reader.walk(package.root_id))


async def test_what_is_not_there_is_not_stored(world: World) -> None:
    missing, short = Digest.of(b"missing"), Digest.of(b"short")
    await world.put_as(short, b"shor")
    orphan = await world.put(b"of nobody")
    await world.put_manifest(manifest_of("zlib/1", file("a", b"missing"), file("b", b"short")))
    tally, _ = await world.rebuild()
    assert tally.failed == {"missing": 1, "size_mismatch": 1}
    assert (tally.object_count, tally.unknown_count) == (1, 1)
    statuses = world.statuses()
    assert statuses[str(missing), "one"] == "failed missing"
    assert statuses[str(short), "one"] == "failed size_mismatch"
    assert (str(orphan), "one") not in statuses


async def test_a_second_backend_adds_its_locations(world: World) -> None:
    manifest = manifest_of("zlib/1", file("a", b"aa"), folder("d"), file("d/b", b"b"))
    alone = manifest_of("zlib/2", file("a", b"aa"))
    for backend_id in ("one", "two"):
        await world.put_manifest(manifest, backend_id)
        await world.put(b"aa", backend_id=backend_id)
    await world.put(b"b")
    await world.put_manifest(alone, "two")
    await world.rebuild("one")
    tally, outcomes = await world.rebuild("two", replaces=False)
    assert sorted(outcome.result for outcome in outcomes) == [Result.ADDED, Result.KNOWN]
    assert tally.failed == {"missing": 1}
    with world.reader() as reader:
        first, second = (reader.package("zlib", version) for version in "12")
    assert first is not None
    assert second is not None
    assert (first.backend_ids, second.backend_ids) == (("one", "two"), ("two",))
    statuses = world.statuses()
    assert (statuses[str(Digest.of(b"aa")), "one"], statuses[str(Digest.of(b"aa")), "two"]) == ("stored", "stored")
    assert (statuses[str(Digest.of(b"b")), "one"], statuses[str(Digest.of(b"b")), "two"]) == (
        "stored",
        "failed missing",
    )


async def test_again_changes_nothing(world: World) -> None:
    await world.put(b"aa")
    await world.put_manifest(manifest_of("zlib/1", file("a", b"aa"), hard_link("b", "a")))
    await world.rebuild()
    with world.reader() as reader:
        before = [list(reader._rows(f"SELECT * FROM {table}")) for table in ("entries", "packages", "blobs")]
    before_statuses = world.statuses()
    _, outcomes = await world.rebuild()
    assert [outcome.result for outcome in outcomes] == [Result.KNOWN]
    with world.reader() as reader:
        after = [list(reader._rows(f"SELECT * FROM {table}")) for table in ("entries", "packages", "blobs")]
    assert (after, world.statuses()) == (before, before_statuses)


def damaged(line: Line, **more: Any) -> Line:
    """A line with other values; None takes a key away."""
    return {key: value for key, value in (line | more).items() if value is not None}


ONE = file("a", b"one")
HOSTILE: list[tuple[str, Callable[[], bytes], str]] = [
    ("up", lambda: manifest_of("bad/1", folder(".."), folder("../x")), "a name that Linux does not allow"),
    ("dot", lambda: manifest_of("bad/1", folder("./x")), "a name that Linux does not allow"),
    ("absolute", lambda: manifest_of("bad/1", folder("/etc")), "a name that Linux does not allow"),
    ("slashes", lambda: manifest_of("bad/1", folder("a"), folder("a//b")), "a name that Linux does not allow"),
    ("nul", lambda: manifest_of("bad/1", folder("a\0b")), "a name that Linux does not allow"),
    ("long name", lambda: manifest_of("bad/1", folder("a" * 256)), "a name that Linux does not allow"),
    ("long path", lambda: manifest_of("bad/1", folder("/".join(["a"] * 600_000))), "has more than 1048576 bytes"),
    ("surrogate", lambda: packed(header("bad/1"), b'{"path":"\\ud800"}'), "not well formed"),
    ("no parent", lambda: manifest_of("bad/1", folder("a/b")), "does not come before what is in it"),
    ("in a file", lambda: manifest_of("bad/1", ONE, folder("a/b")), "does not come before what is in it"),
    ("in itself", lambda: manifest_of("bad/1", folder("a/a"), folder("a")), "does not come before what is in it"),
    ("in a link", lambda: manifest_of("bad/1", link("l", "."), folder("l/b")), "does not come before what is in it"),
    ("twice", lambda: manifest_of("bad/1", folder("a"), ONE), "two entries are named 'a'"),
    ("two roots", lambda: manifest_of("bad/1", folder("")), "the root is not one directory"),
    ("root is a file", lambda: packed(header("bad/1"), file("", b""), {"end": {"entry_count": 1}}), "the root is not"),
    ("no root", lambda: packed(header("bad/1"), folder("a"), {"end": {"entry_count": 1}}), "begin with the root"),
    ("nothing", lambda: packed(header("bad/1"), {"end": {"entry_count": 0}}), "has no entries"),
    ("no footer", lambda: packed(header("bad/1"), folder("")), "without its footer"),
    ("link to itself", lambda: manifest_of("bad/1", hard_link("a", "a")), "does not come before it"),
    ("link to later", lambda: manifest_of("bad/1", hard_link("b", "a"), ONE), "does not come before it"),
    ("link to a folder", lambda: manifest_of("bad/1", folder("d"), hard_link("b", "d")), "of another kind"),
    ("link of a folder", lambda: manifest_of("bad/1", folder("d"), hard_link("b", "d", "directory")), "directory is"),
    ("link out", lambda: manifest_of("bad/1", hard_link("b", "../good/a")), "a name that Linux does not allow"),
    ("target", lambda: manifest_of("bad/1", link("l", "a\0")), "the target has not"),
    ("no target", lambda: manifest_of("bad/1", link("l", "")), "the target has not"),
    ("huge target", lambda: manifest_of("bad/1", link("l", "a" * 4096)), "the target has not"),
    ("setuid", lambda: manifest_of("bad/1", damaged(ONE, mode=0o4755)), "mode is not a whole number from 0 to 511"),
    ("mode text", lambda: manifest_of("bad/1", damaged(ONE, mode="755")), "mode is not a whole number"),
    ("mode bool", lambda: manifest_of("bad/1", damaged(ONE, mode=True)), "mode is not a whole number"),
    ("uid", lambda: manifest_of("bad/1", damaged(ONE, uid=-1)), "uid is not a whole number"),
    ("time", lambda: manifest_of("bad/1", damaged(ONE, mtime_ns=1 << 63)), "mtime_ns is not a whole number"),
    ("size", lambda: manifest_of("bad/1", damaged(ONE, size_bytes=1 << 62)), "the checksums have 8 bytes"),
    ("negative size", lambda: manifest_of("bad/1", damaged(ONE, size_bytes=-1)), "size_bytes is not a whole number"),
    ("block", lambda: manifest_of("bad/1", damaged(ONE, block_size_bytes=1 << 40)), "block_size_bytes is not"),
    ("block 0", lambda: manifest_of("bad/1", damaged(ONE, block_size_bytes=0)), "block_size_bytes is not"),
    ("checksums", lambda: manifest_of("bad/1", damaged(ONE, checksums="AAAA")), "the checksums have 3 bytes"),
    ("base64", lambda: manifest_of("bad/1", damaged(ONE, checksums="A?==")), "checksums is not base64"),
    ("algorithm", lambda: manifest_of("bad/1", damaged(ONE, checksum_algorithm="crc")), "checksum_algorithm is not"),
    ("digest", lambda: manifest_of("bad/1", damaged(ONE, digest="sha256:../../x")), "not a digest"),
    (
        "digest of a manifest",
        lambda: manifest_of("bad/1", damaged(ONE, digest=f"manifest-sha256:{'0' * 64}")),
        "a file has a digest of manifest-sha256",
    ),
    ("kind", lambda: manifest_of("bad/1", damaged(ONE, kind="device")), "kind is not one of"),
    ("no mode", lambda: manifest_of("bad/1", damaged(ONE, mode=None)), "it lacks 'mode'"),
    (
        "attribute",
        lambda: manifest_of("bad/1", {**ONE, "attributes": [{"name": "security.capability", "value_base64": ""}]}),
        "is not one of user.*",
    ),
    (
        "computed",
        lambda: manifest_of("bad/1", {**ONE, "attributes": [{"name": "user.castore.digest", "value_base64": ""}]}),
        "is computed, and cannot be set",
    ),
    (
        "attribute twice",
        lambda: manifest_of("bad/1", {**ONE, "attributes": [{"name": "user.a", "value_base64": ""}] * 2}),
        "two attributes have one name",
    ),
    (
        "huge attribute",
        lambda: manifest_of("bad/1", {**ONE, "attributes": [{"name": "user.a", "value_base64": "AAAA" * 30_000}]}),
        "the attributes have more than 65536 bytes",
    ),
    ("name", lambda: packed(header("../1", name="../../etc")), "is not a NAME"),
    ("name with NUL", lambda: packed(header("x/1", name="a\0")), "name is not 1 to 128 printable"),
    ("latest", lambda: manifest_of("bad/latest"), "is not a VERSION"),
    ("version", lambda: packed(header("bad/..")), "is not a VERSION"),
    ("producer", lambda: packed(header("bad/1", producer="\x1b[2J")), "producer is not 1 to 128 printable"),
    ("backends", lambda: packed(header("bad/1", backend_ids=[])), "backend_ids is not a list"),
    ("future", lambda: manifest_of("bad/1", published_at_ns=time.time_ns() + 2 * FUTURE_NS), "in the future"),
    ("other version", lambda: packed(header("bad/1", castore_manifest=2)), "manifest version 2"),
    (
        "values",
        lambda: manifest_of("bad/1", {**ONE, "more": [{}] * 200_000, "text": '\\"[' * 9}),
        "a line has more than 100000 values",
    ),
    ("not gzip", lambda: b"hello", "not a whole manifest"),
    ("empty", lambda: b"", "not a package manifest"),
    ("deep", lambda: packed(b"[" * 200_000), "too deep"),
    ("infinite", lambda: packed(b'{"castore_manifest":Infinity}'), "Infinity is no number"),
    ("digits", lambda: packed(b'{"castore_manifest":' + b"9" * 5000 + b"}"), "not a whole manifest"),
    ("utf-16", lambda: gzip.compress(json.dumps(header("bad/1")).encode("utf-16") + b"\n"), "not a whole manifest"),
]


@pytest.mark.parametrize(("make", "says"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
async def test_a_hostile_manifest_is_refused_and_the_others_go_on(
    world: World, make: Callable[[], bytes], says: str
) -> None:
    await world.put(b"one")
    good = [await world.put_manifest(manifest_of(f"good/{number}", ONE)) for number in range(3)]
    bad = await world.put_manifest(make())
    _, outcomes = await world.rebuild()
    [refused] = [outcome for outcome in outcomes if outcome.result is not Result.ADDED]
    assert (refused.digest, refused.result) == (bad, Result.REFUSED)
    assert says in refused.why
    assert str(world.folder) not in refused.why
    assert {outcome.digest for outcome in outcomes} == {bad, *good}
    assert world.refs() == ["good/0", "good/1", "good/2"]
    with world.reader() as reader:
        assert reader.package_name("bad") is None


async def test_a_manifest_with_another_digest(world: World) -> None:
    bad = Digest.of(b"what was published", MANIFEST_ALGORITHM)
    await world.put_as(bad, manifest_of("bad/1"))
    _, [refused] = await world.rebuild()
    assert (refused.digest, refused.result) == (bad, Result.REFUSED)
    assert "its bytes have another digest" in refused.why


@pytest.mark.parametrize("filler", [b" ", b"[", b'{"path":"', b'{"size_bytes":7,"digest":"sha256:' + b"0" * 64 + b'"'])
async def test_a_bomb_takes_no_memory(world: World, filler: bytes) -> None:
    """A line of 200 MiB in 200 KiB: it is refused at the bound, by what was read of it till then."""
    line = filler + b" " * (200 << 20) + b"\n"
    await world.put_manifest(gzip.compress(json.dumps(header("bad/1")).encode() + b"\n" + line, 1))
    del line
    tracemalloc.start()
    _, [refused] = await world.rebuild()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused.result is Result.REFUSED
    assert f"a line is longer than {UNPROVEN_LINE_MAX} bytes" in refused.why
    assert peak < 8 * UNPROVEN_LINE_MAX


async def test_who_lies_about_a_blob_is_found_by_its_bytes(world: World) -> None:
    """Whichever manifest comes first: with a wrong size and with wrong checksums."""
    await world.put(b"one")
    true = summary_of(b"one")
    lies = [
        BlobSummary(true.digest, 3, true.block_size_bytes, "xxh3-64", b"\0" * 8),
        BlobSummary(true.digest, 4, true.block_size_bytes, "xxh3-64", true.checksums),
    ]
    bad = [
        await world.put_manifest(manifest_of(f"bad{lie}/{number}", file("a", summary=lies[lie])))
        for number in range(4)
        for lie in (0, 1)
    ]
    good = {f"good/{number}": manifest_of(f"good/{number}", ONE) for number in range(8)}
    first_bad = min(bad)
    good = {ref: data for ref, data in good.items() if Digest.of(data, MANIFEST_ALGORITHM) > first_bad}
    digests = [await world.put_manifest(data) for data in good.values()]
    assert min(bad) < min(digests) < max(bad)
    tally, outcomes = await world.rebuild()
    assert world.refs() == list(good)
    assert {outcome.digest for outcome in outcomes if outcome.result is Result.REFUSED} == set(bad)
    assert tally.counts[Result.ADDED] == len(good)
    with world.reader() as reader:
        blob = reader.blob_by_digest(true.digest)
    assert blob is not None
    assert blob.summary == true


async def test_sha256_checksums_count_more(world: World) -> None:
    """Both are right, and a forger cannot make the better ones."""
    await world.put(b"one")
    hasher = BlobHasher(checksum_algorithm="sha256")
    hasher.update(b"one")
    strong = hasher.finish()
    for number in range(4):
        await world.put_manifest(manifest_of(f"weak/{number}", ONE))
        await world.put_manifest(manifest_of(f"strong/{number}", file("a", summary=strong)))
    tally, _ = await world.rebuild()
    assert tally.counts[Result.ADDED] == 8
    with world.reader() as reader:
        blob = reader.blob_by_digest(strong.digest)
    assert blob is not None
    assert blob.summary == strong


@pytest.mark.parametrize("replaces", [True, False])
async def test_two_manifests_of_one_package(world: World, replaces: bool) -> None:
    """The one that was published later counts, whichever is read first; but what a catalog has already stays."""
    if not replaces:
        await world.put_manifest(manifest_of("zlib/1", folder("kept"), published_at_ns=5))
        await world.rebuild()
    manifests = [manifest_of("zlib/1", folder(f"f{number}"), published_at_ns=10 + number) for number in range(5)]
    digests = [await world.put_manifest(manifest) for manifest in manifests]
    tally, outcomes = await world.rebuild(replaces=replaces)
    refused = [outcome.digest for outcome in outcomes if outcome.result is Result.REFUSED]
    with world.reader() as reader:
        package = reader.package("zlib", "latest")
        assert package is not None
        names = [path for path, _ in reader.walk(package.root_id)]
    if replaces:
        assert (names, sorted(refused)) == ([b"f4"], sorted(digests[:4]))
        assert tally.counts[Result.ADDED] == 1
    else:
        assert (names, sorted(refused)) == ([b"kept"], sorted(digests))


async def test_a_publish_that_did_not_end_is_left_to_ingest(world: World) -> None:
    digest = await world.put_manifest(manifest_of("zlib/1"))
    _, [outcome] = await world.rebuild(unpublished=[digest.raw])
    assert (outcome.digest, outcome.result) == (digest, Result.SKIPPED)
    assert world.refs() == []


async def test_names_keep_the_inodes_that_ingest_has(world: World) -> None:
    await world.put_manifest(manifest_of("zlib/1"))
    await world.rebuild(names={"zlib": (1024, 1025)}, first_inode=1026)
    with world.reader() as reader:
        name = reader.package_name("zlib")
    assert name is not None
    assert (name.inode, name.latest_inode) == (1024, 1025)


def test_the_key_of_a_manifest_is_where_it_is_looked_for() -> None:
    digest = Digest.of(b"x", MANIFEST_ALGORITHM)
    assert key_of(digest).startswith("manifest-sha256/")


async def test_more_folders_than_are_remembered(world: World) -> None:
    """They are found by their names then."""
    folders = [folder(f"{number}") for number in range(FOLDERS_KEPT + 1)]
    await world.put_manifest(manifest_of("zlib/1", folder("first"), folder("first/in"), *folders, folder("first/in/x")))
    await world.rebuild()
    with world.reader() as reader:
        package = reader.package("zlib", "1")
        assert package is not None
        above = reader.lookup(package.root_id, b"first")
        assert above is not None
        inner = reader.lookup(above.inode, b"in")
        assert inner is not None
        assert reader.lookup(inner.inode, b"x") is not None


async def test_a_backend_that_cannot_be_read_is_given_up(world: World) -> None:
    for number in range(AHEAD + 5):
        await world.put_manifest(manifest_of(f"p{number}/1"))
    backend = world.backends["one"]
    assert isinstance(backend, MemoryBackend)

    async def fail(operation: str) -> None:
        if operation == "get":
            raise StorageUnavailable("no answer")

    backend.before = fail
    tally, outcomes = await world.rebuild()
    assert tally.stopped == "no answer"
    assert {outcome.result for outcome in outcomes} == {Result.UNREADABLE}
    assert ERRORS_IN_A_ROW <= len(outcomes) <= AHEAD
    assert world.refs() == []


async def test_one_that_cannot_be_read_keeps_none_of_the_others(world: World) -> None:
    digests = [await world.put_manifest(manifest_of(f"p{number}/1")) for number in range(4)]
    backend = world.backends["one"]
    assert isinstance(backend, MemoryBackend)
    calls: list[str] = []

    async def fail_once(operation: str) -> None:
        if operation == "get" and not calls:
            calls.append(operation)
            raise StorageUnavailable("no answer")

    backend.before = fail_once
    tally, _ = await world.rebuild()
    assert (tally.counts[Result.UNREADABLE], tally.counts[Result.ADDED], tally.stopped) == (1, 3, "")
    tally, _ = await world.rebuild()
    assert (tally.counts[Result.KNOWN], tally.counts[Result.ADDED]) == (3, 1)
    assert len(world.refs()) == len(digests)


async def test_a_manifest_that_is_too_large_is_not_fetched(world: World) -> None:
    digest = await world.put_manifest(manifest_of("zlib/1"))
    backend = world.backends["one"]
    assert isinstance(backend, MemoryBackend)
    data, info = backend._objects[digest]
    backend._objects[digest] = data, replace(info, size_bytes=MANIFEST_BYTES_MAX + 1)
    _, [refused] = await world.rebuild()
    assert refused.result is Result.REFUSED
    assert f"a manifest has {MANIFEST_BYTES_MAX} at most" in refused.why
    assert "get" not in backend.calls


async def test_a_long_line_is_read_when_its_file_is_there(world: World) -> None:
    """A file of so many blocks that its checksums fill more than the bound; the object only says that size."""
    size = (UNPROVEN_LINE_MAX // 8) * 4096
    digest = Digest.of(b"large")
    summary = BlobSummary(digest, size, 4096, "xxh3-64", b"\x12" * (size // 4096 * 8))
    await world.put_as(digest, b"large")
    backend = world.backends["one"]
    assert isinstance(backend, MemoryBackend)
    data, info = backend._objects[digest]
    await world.put_manifest(manifest_of("zlib/1", file("a", summary=summary)))
    _, [refused] = await world.rebuild()
    assert "and no object needs that" in refused.why
    backend._objects[digest] = data, replace(info, size_bytes=size)
    _, [added] = await world.rebuild()
    assert added.result is Result.ADDED
