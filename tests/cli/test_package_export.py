"""`castore package export`, `sums` and `diff`, and what `list` and `show` tell: of real packages and of forged ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from castore.catalog.connection import open_writer
from castore.catalog.records import Kind
from castore.digest import Digest
from castore.failpoint import VARIABLE
from tests import damage
from tests.cli.conftest import Cli
from tests.mount.store import MountedStore
from tests.mount.trees import assert_same, make_tree, snapshot
from tests.places import Place
from tests.published import PublishedStore

FILES = {b"a": b"a" * 300_000, b"sub/b": b"b", b"sub/deep/c": b"", b"sub/same": b"b", b"odd\n\\name": b"odd"}


_HERE = "WITH here(root) AS (SELECT root_id FROM packages WHERE version = '2') "


class Exporting:
    """A store with demo/1 and demo/2, which share some files. No daemon runs."""

    def __init__(self, root: Path, place: Place, cli: Cli) -> None:
        self.store = PublishedStore(root, place, "one", "two")
        cli.environ["CASTORE_CONFIG"] = str(self.store.config_path)
        self.cli = cli
        self.place = root / "place"
        self.place.mkdir()
        trio.run(self._fill)

    async def _fill(self) -> None:
        await self.store.create()
        self.digests = await self.store.publish("demo/1", FILES)
        await self.store.publish("demo/2", FILES | {b"a": b"A", b"new": b"new"} | {b"sub/same": b"c"}, "one")
        await self.store.aclose()

    def damage(self, digest: Digest, *backend_ids: str) -> None:
        for backend_id in backend_ids:
            damage.flip_a_bit(self.store.config.backends[backend_id], digest)

    def execute(self, sql: str, *parameters: object) -> None:
        database = open_writer(self.store.catalog_path).conn
        database.execute("PRAGMA ignore_check_constraints = ON")
        database.execute(sql, parameters)
        database.close()

    def left(self) -> list[str]:
        return sorted(os.listdir(self.place))


@pytest.fixture
def exporting(tmp_path: Path, place: Place, cli: Cli) -> Exporting:
    return Exporting(tmp_path, place, cli)


def contents(top: Path) -> dict[bytes, bytes]:
    return {os.fsencode(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def test_a_package_of_a_mount_comes_out_as_it_is(tmp_path: Path, cli: Cli) -> None:
    store = MountedStore(tmp_path)
    try:
        store.mount()
        make_tree(store.ingest("tree/1"), attributes=True)
        store.publish("tree/1")
        expected = snapshot(store.package("tree/1"))
        store.umount()
    finally:
        store.close()
    cli.environ["CASTORE_CONFIG"] = str(store.config)
    target = tmp_path / "out"
    document = json.loads(cli("package", "export", "tree/latest", target, "--json").stdout)
    assert_same(target, expected)
    assert (document["ref"], document["directory"]) == ("tree/1", str(target))
    sums = subprocess.run(
        [*cli.command, "package", "sums", "tree/1"], env=cli.environ, stdout=subprocess.PIPE, check=True
    )
    assert b"\n" in sums.stdout
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict"], input=sums.stdout, cwd=target, check=True)


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_without_a_daemon_from_any_backend(exporting: Exporting) -> None:
    exporting.damage(exporting.digests[b"a"], "one")  # the other copy is good
    (exporting.place / "out").mkdir()
    exporting.cli("package", "export", "demo/1", exporting.place / "out")
    assert contents(exporting.place / "out") == FILES
    assert exporting.left() == ["out"]
    sums = exporting.cli("package", "sums", "demo/1").stdout
    subprocess.run(["sha256sum", "-c", "--quiet"], input=sums, text=True, cwd=exporting.place / "out", check=True)
    found = {
        entry["path"]: entry["sha256"]
        for entry in json.loads(exporting.cli("package", "sums", "demo/1", "--json").stdout)["files"]
    }
    assert found == {path.decode(): exporting.digests[path].hex for path in FILES}


_DEEP = """import os, sys
for _ in range(int(sys.argv[1])):
    os.mkdir(sys.argv[2])
    os.chdir(sys.argv[2])
open("leaf", "w").close()
os.link("leaf", "hard")
os.symlink("leaf", "soft")
"""


def test_deeper_than_one_path_may_be(exporting: Exporting) -> None:
    out = exporting.place / "out"
    try:
        for ref, levels, name in (("deep/1", 90, "d" * 50), ("deep/2", 1100, "deep")):
            source = exporting.place / ref.replace("/", "-")
            source.mkdir()
            subprocess.run([sys.executable, "-c", _DEEP, str(levels), name], cwd=source, check=True)
            exporting.cli("package", "import", source, ref)
        exporting.cli("package", "export", "deep/1", out)
        script = (
            f"for i in $(seq 90); do cd -P {'d' * 50} || exit 1; done; ls; test leaf -ef hard && test leaf -ef soft"
        )
        done = subprocess.run(["sh", "-c", script], cwd=out, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout.split() == ["hard", "leaf", "soft"]
        # What fails is removed, too.
        exporting.execute("UPDATE entries SET name = x'2E2E' WHERE name = x'6C656166'")
        failed = exporting.cli("package", "export", "deep/2", exporting.place / "again", code=2)
        assert "no directory can have" in failed.stderr.splitlines()[-1]
        assert exporting.left() == ["deep-1", "deep-2", "out"]
    finally:
        subprocess.run(["rm", "-rf", exporting.place], check=True)  # Python's own stops at a depth of 1000


def test_all_or_nothing(exporting: Exporting) -> None:
    exporting.damage(exporting.digests[b"sub/b"], "one", "two")
    done = exporting.cli("package", "export", "demo/1", exporting.place / "out", code=2)
    assert "no good copy of block 0" in done.stderr.splitlines()[-1]
    assert exporting.left() == []


def test_what_is_there_stays(exporting: Exporting) -> None:
    taken, link = exporting.place / "taken", exporting.place / "link"
    taken.mkdir()
    link.symlink_to("elsewhere")
    (exporting.place / "elsewhere").mkdir()
    (taken / "mine").write_text("mine")
    for target in (taken, link, taken / "mine"):
        assert f"{target}: exists" in exporting.cli.error("package", "export", "demo/1", target)
    assert "there is no such directory" in exporting.cli.error("package", "export", "demo/1", taken / "a/b")
    done = exporting.cli("package", "export", "demo/1", "/proc/out", code=2)
    assert done.stderr.splitlines()[-1] == "castore: error: /proc/out: No such file or directory"
    assert exporting.left() == ["elsewhere", "link", "taken"]
    assert os.listdir(exporting.place / "elsewhere") == []
    assert os.listdir(taken) == ["mine"]
    assert "no such package" in exporting.cli.error("package", "export", "demo/9", exporting.place / "out")


def test_names_made_to_escape(exporting: Exporting) -> None:
    outside = exporting.place.parent / "outside"
    outside.mkdir()
    root = "(SELECT root_id FROM packages WHERE version = '1')"
    # A link out of the directory, and below the link's name a file: the link is made, nothing is written through it.
    exporting.execute(
        f"INSERT INTO entries VALUES (500, {root}, x'6C', 500, ?, 511, 0, 0, 1, 1, 0, 1, 0, ?, 0)",
        int(Kind.SYMLINK),
        os.fsencode(outside),
    )
    exporting.execute(
        "INSERT INTO entries SELECT 501, 500, x'66', 501, kind, mode, uid, gid, mtime_ns, ctime_ns, size_bytes, nlink, "
        "blob_id, target, 0 FROM entries WHERE name = x'61' LIMIT 1"
    )
    exporting.cli("package", "export", "demo/1", exporting.place / "out")
    assert (exporting.place / "out/l").readlink() == outside
    assert os.listdir(outside) == []
    for number, name in enumerate((b"..", b".", b"../outside/x", b"/etc/x", b"", b"a\0b")):
        exporting.execute("UPDATE entries SET name = ? WHERE entry_id = 500", name)
        done = exporting.cli("package", "export", "demo/1", exporting.place / f"out{number}", code=2)
        assert "no directory can have" in done.stderr.splitlines()[-1]
    assert exporting.left() == ["out"]
    assert os.listdir(outside) == []


_DIRECTORY = "1, 511, 0, 0, 1, 1, 0, 1, 0, x'', 0"
_SUB = "(SELECT min(entry_id) FROM entries WHERE name = x'737562')"
FORGED = [
    (f"INSERT INTO entries SELECT 500, root, x'6C', root, {_DIRECTORY} FROM here", "has another place"),
    (f"INSERT INTO entries SELECT 500, root, x'6C', {_SUB}, {_DIRECTORY} FROM here", "has another place"),
    ("UPDATE entries SET mode = 2541 WHERE name = x'61'", "entry "),
    ("UPDATE entries SET mode = 'x' WHERE name = x'61'", "entry "),
    ("UPDATE entries SET kind = 9 WHERE name = x'61'", "entry "),
    ("UPDATE entries SET name = 'text' WHERE name = x'61'", "entry "),
    ("UPDATE blobs SET algorithm = 'md5'", "unknown digest algorithm 'md5'"),
    ("UPDATE blobs SET digest = substr(digest, 2) WHERE algorithm = 'sha256'", "bytes"),
    ("UPDATE blobs SET block_size_bytes = 0 WHERE algorithm = 'sha256'", "blob "),
    ("UPDATE packages SET backend_ids = '{'", "Expecting property name"),
    ("UPDATE packages SET published_at_ns = 'x'", "package 'demo'/"),
    ("UPDATE package_names SET mtime_ns = 'x'", "name 'demo'"),
]


def test_a_forged_catalog_is_refused(exporting: Exporting) -> None:
    """Trees without an end, set-uid bits, values of another kind: one line, and nothing is left."""
    before = exporting.store.catalog_path.with_suffix(".before")
    exporting.execute(f"VACUUM INTO '{before}'")
    for sql, says in FORGED:
        exporting.execute(f"{_HERE if 'FROM here' in sql else ''}{sql}")
        done = exporting.cli("package", "export", "demo/latest", exporting.place / "out", code=2)
        line = done.stderr.splitlines()[-1]
        assert line.startswith("castore: error: the catalog has a row that no castore writes ("), sql
        assert says in line
        assert exporting.left() == []
        shutil.copy(before, exporting.store.catalog_path)


def test_a_forged_tree_has_an_end_for_whoever_asks_what_it_uses(exporting: Exporting) -> None:
    """A directory inside of itself, in a package and beside it, whose file is damaged."""
    exporting.execute(f"{_HERE}INSERT INTO entries SELECT 500, root, x'6C', root, {_DIRECTORY} FROM here")
    exporting.execute(f"INSERT INTO entries VALUES (600, 600, x'6C', 600, {_DIRECTORY})")
    exporting.execute(
        "INSERT INTO entries SELECT 601, 600, x'66', 601, kind, mode, uid, gid, mtime_ns, ctime_ns, size_bytes, nlink, "
        "blob_id, target, 0 FROM entries WHERE name = x'62' LIMIT 1"
    )
    exporting.damage(exporting.digests[b"sub/b"], "one")
    for command, code in (("package show demo/2", 0), ("storage verify", 1), ("storage verify --package demo/2", 1)):
        exporting.cli(*command.split(), code=code)
    assert "has another place" in exporting.cli("package", "sums", "demo/2", code=2).stderr


def test_killed_before_the_end(exporting: Exporting) -> None:
    target = exporting.place / "out[1]"
    environ = exporting.cli.environ | {VARIABLE: "export.filled"}
    exporting.cli("package", "export", "demo/1", target, code=-signal.SIGKILL, env=environ)
    (left,) = exporting.left()
    assert left.startswith(".out[1].castore-export-")
    exporting.cli("package", "export", "demo/1", target)
    assert exporting.left() == ["out[1]"]
    assert contents(target) == FILES


def test_diff(exporting: Exporting) -> None:
    done = exporting.cli("package", "diff", "demo/1", "demo/2")
    assert done.stdout == "M a\n+ new\nM sub/same\n"
    assert (
        exporting.cli("package", "diff", "demo/2", "demo/1", "--exit-code", code=1).stdout == "M a\n- new\nM sub/same\n"
    )
    assert exporting.cli("package", "diff", "demo/1", "demo/1", "--exit-code").stdout == ""
    changes = json.loads(exporting.cli("package", "diff", "demo/1", "demo/latest", "--json").stdout)["changes"]
    assert changes[1] == {"change": "added", "path": "new"}


def test_filters(exporting: Exporting) -> None:
    exporting.execute(
        "UPDATE packages SET producer = 'ci-7', retention_class = 'nightly', published_at_ns = 1 WHERE version = '1'"
    )

    def refs(*options: object) -> list[str]:
        documents = json.loads(exporting.cli("package", "list", "--json", *options).stdout)["packages"]
        return [document["ref"] for document in documents]

    assert refs() == ["demo/1", "demo/2"]
    assert refs("--producer", "ci-*") == refs("--class", "nightly") == refs("--older-than", "90d") == ["demo/1"]
    assert refs("--newer-than", "1h") == refs("--smaller-than", "1 KiB") == ["demo/2"]
    assert refs("--larger-than", "1000") == ["demo/1"]
    assert refs("--name", "other") == []
    assert exporting.cli("package", "list", "--name", "other").stdout == "no such packages\n"
    assert "expected a duration such as" in exporting.cli("package", "list", "--older-than", "soon", code=2).stderr


def test_show_tells_what_is_shared_and_where_it_is(exporting: Exporting) -> None:
    document = json.loads(exporting.cli("package", "show", "demo/1", "--json").stdout)
    # "b", "" and the odd one are in demo/2, too; "b" has two names in demo/1.
    assert (document["blob_count"], document["shared_blob_count"]) == (4, 3)
    assert (document["blob_bytes"], document["shared_blob_bytes"]) == (300_004, 4)
    states = {(state["backend_id"], state["status"]): state["location_count"] for state in document["locations"]}
    assert states == {("one", "stored"): 5, ("two", "stored"): 5}
    text = exporting.cli("package", "show", "demo/1").stdout
    assert "4 blobs, 293 KiB; shared with other packages: 3, 4 B" in text
    assert "in two" in text
