"""`castore package import`: real directories into real stores, with and without a daemon, killed, stopped, refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from castore.catalog.reader import CatalogReader
from castore.config import load_config
from castore.registry.manifest import ManifestEntry, read_manifest
from castore.storage.open import open_backend
from tests.cli.conftest import Cli
from tests.mount.crash_round import rows
from tests.mount.store import MountedStore, run_tool, wait_until
from tests.mount.trees import assert_same, make_tree
from tests.places import PLACES, Place

WITH_AND_WITHOUT_A_DAEMON = pytest.mark.parametrize("daemon", [False, True], ids=["alone", "daemon"])


@pytest.fixture
def imports(tmp_path: Path, place: Place) -> Iterator[MountedStore]:
    """A store that is not mounted."""
    with closing(MountedStore(tmp_path, place=None if place.backend_type == "local" else place)) as made:
        yield made


@pytest.fixture
def at(cli: Cli, imports: MountedStore) -> Cli:
    """The command line on that store."""
    cli.environ["CASTORE_CONFIG"] = str(imports.config)
    return cli


def document(at: Cli, *arguments: object) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(at("package", "import", *arguments, "--json").stdout)
    return answer


def refusal(at: Cli, *arguments: object) -> str:
    """The line of error, whatever was told of progress before it."""
    done = at("package", "import", *arguments, code=2)
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("castore: error: ")
    return line.removeprefix("castore: error: ")


def entries(store: MountedStore, ref: str, path: Path) -> dict[bytes, tuple[ManifestEntry, frozenset[bytes]]]:
    """Path -> what the stored manifest says of it, and all names of that file. Which name is the first is nothing."""
    with CatalogReader(store.state / "catalog.db") as reader:
        package = reader.package(*ref.split("/"))
    assert package is not None

    async def fetch() -> bytes:
        backend = open_backend(load_config(store.config).backends[package.backend_ids[0]])
        try:
            info = await backend.head(package.manifest_digest)
            return bytes(await backend.get(package.manifest_digest, offset=0, length=info.size_bytes))
        finally:
            await backend.aclose()

    path.write_bytes(trio.run(fetch))
    listed = {entry.path: entry for entry in read_manifest(path)[1]}
    names = defaultdict(set)
    for name, entry in listed.items():
        names[entry.link_to or name].add(name)
    return {
        name: (replace(listed[entry.link_to or name], path=name), frozenset(names[entry.link_to or name]))
        for name, entry in listed.items()
    }


def odd_tree(root: Path) -> None:
    """What `make_tree` makes, and names, bytes and modes that are easily lost."""
    make_tree(root, attributes=True)
    for name in (b"line\nfeed", b"not \xff utf-8", b"'\"$(x)", b"n" * 255, b"..."):
        Path(os.fsdecode(os.path.join(os.fsencode(root), name))).write_bytes(name)
    with (root / "sparse").open("wb") as sparse:
        sparse.truncate(40_000_000)
        sparse.seek(10_000_000)
        sparse.write(b"in the middle")
    (root / "set").write_text("uid")
    (root / "set").chmod(0o6755)
    (root / "closed").mkdir(mode=0o500)
    os.link(root / "lib/current", root / "linked", follow_symlinks=False)
    for number in range(300):
        (root / f"share/{number}.txt").write_text(f"{number % 100}")


# the same as a copy


@pytest.mark.parametrize("place", PLACES, indirect=True)
@WITH_AND_WITHOUT_A_DAEMON
def test_as_a_copy_by_the_mount(at: Cli, imports: MountedStore, tmp_path: Path, daemon: bool) -> None:
    source = tmp_path / "source"
    odd_tree(source)
    if daemon:
        imports.mount()
    answer = document(at, source, "pkg/imported")
    assert answer["copied_files"] > 300
    assert (answer["ref"], answer["kept_files"], answer["interrupted"]) == ("pkg/imported", 0, False)
    assert not daemon or os.listdir(imports.mnt / "ingest") == []
    if not daemon:
        imports.mount()
    box = imports.mnt / "ingest/pkg"
    box.mkdir()
    run_tool("cp", "-a", source, box / "copied")
    imports.publish("pkg/copied")
    shown = [json.loads(at("package", "show", f"pkg/{name}", "--json").stdout) for name in ("imported", "copied")]
    for key in ("file_count", "size_bytes", "producer", "retention_class", "publisher_uid"):
        assert shown[0][key] == shown[1][key]
    assert shown[0]["file_count"] == answer["file_count"]
    imports.umount()
    imported = entries(imports, "pkg/imported", tmp_path / "a")
    assert imported == entries(imports, "pkg/copied", tmp_path / "b")
    assert len(imported) > 340
    assert imported[b"set"][0].mode == 0o755
    check_nothing_is_staged(imports)


@WITH_AND_WITHOUT_A_DAEMON
def test_labels_and_a_link_to_the_directory(at: Cli, imports: MountedStore, tmp_path: Path, daemon: bool) -> None:
    make_tree(tmp_path / "source")
    (tmp_path / "link").symlink_to("source")
    if daemon:
        imports.mount()
    done = at("package", "import", tmp_path / "link", "a/1", "--producer", "ci 7", "--retention-class", "release")
    assert done.stdout.startswith("published a/1: ")
    shown = json.loads(at("package", "show", "a/1", "--json").stdout)
    assert (shown["producer"], shown["retention_class"]) == ("ci 7", "release")
    if not daemon:
        imports.mount()
    assert_same(imports.package("a/1"), tmp_path / "source")


def test_deeper_than_a_path_may_be(at: Cli, imports: MountedStore, tmp_path: Path) -> None:
    path = "/".join(["d" * 200] * 30)
    (tmp_path / "source").mkdir()
    run_tool("mkdir", "-p", path, cwd=tmp_path / "source")
    at("package", "import", tmp_path / "source", "a/1")
    shown = json.loads(at("package", "show", "a/1", "--files", "--json").stdout)
    assert shown["entries"][-1]["path"] == path


def test_progress(at: Cli, imports: MountedStore, tmp_path: Path) -> None:
    with stuck(imports, tmp_path) as place:
        place.hang()
        with at_work(at, "package", "import", place.source, "a/1") as process:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if line == "importing a/1: 0 B of 586 KiB, 2 of 2 files copied, 0 stored\n":
                    break
            else:
                pytest.fail(f"it ended, having said {said}")


# refused


@WITH_AND_WITHOUT_A_DAEMON
def test_what_is_refused(at: Cli, imports: MountedStore, tmp_path: Path, daemon: bool) -> None:
    source = tmp_path / "source"
    make_tree(source)
    if daemon:
        imports.mount()
    assert refusal(at, tmp_path / "no", "a/1") == f"{tmp_path}/no: no such file or directory"
    assert refusal(at, source / "bin/tool", "a/1") == f"{source}/bin/tool: is not a directory"
    assert "not a package reference" in refusal(at, source, "a")
    assert "user.castore.producer" in refusal(at, source, "a/1", "--producer", "")
    os.mkfifo(source / "share/odd\npipe")
    line = refusal(at, source, "a/1")
    assert line == f"{source}/share/odd\\npipe: is a fifo, which cannot be packaged"
    (source / "share/odd\npipe").unlink()
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(source / "s"))
    assert refusal(at, source, "a/1") == f"{source}/s: is a socket, which cannot be packaged"
    (source / "s").unlink()
    assert refusal(at, "/dev", "a/1").endswith(", which cannot be packaged")
    assert refusal(at, imports.root, "a/1").endswith(": belongs to the store itself and is not imported into it")
    check_nothing_is_staged(imports)
    assert json.loads(at("package", "list", "--json").stdout) == {"packages": []}
    at("package", "import", source, "a/1")
    assert refusal(at, source, "a/1") == "a/1 is published already"
    check_nothing_is_staged(imports)


def test_a_package_of_the_store_itself(at: Cli, imports: MountedStore, tmp_path: Path) -> None:
    make_tree(tmp_path / "source")
    imports.mount()
    at("package", "import", tmp_path / "source", "a/1")
    line = refusal(at, imports.package("a/1"), "a/2")
    assert line == f"{imports.package('a/1')}: belongs to the store itself and is not imported into it"


@WITH_AND_WITHOUT_A_DAEMON
def test_a_version_made_by_hand(at: Cli, imports: MountedStore, tmp_path: Path, daemon: bool) -> None:
    make_tree(tmp_path / "source")
    imports.mount()
    (imports.ingest("a/1") / "mine").write_text("made by hand")
    if not daemon:
        imports.umount()
    assert "ingest/a/1 is there, and no import made it" in refusal(at, tmp_path / "source", "a/1")
    if not daemon:
        imports.mount()
    assert (imports.mnt / "ingest/a/1/mine").read_text() == "made by hand"
    if not daemon:
        imports.umount()
    at("package", "import", tmp_path / "source", "a/1", "--resume")
    if not daemon:
        imports.mount()
    assert_same(imports.package("a/1"), tmp_path / "source")


@WITH_AND_WITHOUT_A_DAEMON
def test_sums(at: Cli, imports: MountedStore, tmp_path: Path, daemon: bool) -> None:
    """What fails at publish stays staged; with the mended file alone the same command goes on."""
    source = tmp_path / "source"
    make_tree(source)
    (source / "SHA256SUMS").write_text(f"{'0' * 64}  bin/tool\n")
    if daemon:
        imports.mount()
    line = refusal(at, source, "a/1")
    assert "'bin/tool' has other bytes than listed" in line
    assert "files stay staged in ingest/a/1, and the same command goes on from there" in line
    (source / "SHA256SUMS").write_text(run_tool("sha256sum", "bin/tool", cwd=source))
    answer = document(at, source, "a/1")
    assert answer["copied_files"] == 1
    assert answer["kept_files"] > 15
    check_nothing_is_staged(imports)


@WITH_AND_WITHOUT_A_DAEMON
def test_no_room_in_staging(at: Cli, imports: MountedStore, tmp_path: Path, daemon: bool) -> None:
    source = tmp_path / "source"
    make_tree(source)
    bound = imports.config.read_text().replace("[ingest]\n", '[ingest]\nstaging_max_bytes = "3MiB"\n')
    unbound, _ = imports.config.read_text(), imports.config.write_text(bound)
    if daemon:
        imports.mount()
    line = refusal(at, source, "a/1")
    assert line.startswith("staging is full: ingest.staging_max_bytes is 3145728")
    assert json.loads(at("package", "list", "--json").stdout) == {"packages": []}
    if daemon:
        imports.umount()
    imports.config.write_text(unbound)
    at("package", "import", source, "a/1")
    imports.mount()
    assert_same(imports.package("a/1"), source)


# killed, interrupted, resumed


@pytest.mark.parametrize(
    "point", ["import.copied:2", "import.staged", "put.intended", "put.located:3", "publish.noted", "publish.put"]
)
@WITH_AND_WITHOUT_A_DAEMON
def test_killed(at: Cli, imports: MountedStore, tmp_path: Path, point: str, daemon: bool) -> None:
    source = tmp_path / "source"
    many(source)
    killed = {"CASTORE_FAILPOINT": point}
    if daemon:
        with environment(killed):
            imports.mount()
        assert "ended before it answered" in at("package", "import", source, "a/1", code=2).stderr
        wait_until(lambda: not Path(f"/proc/{imports.pid}").exists(), "the daemon has ended")
        imports.pid = 0
    else:
        at("package", "import", source, "a/1", code=-signal.SIGKILL, env=at.environ | killed)
    assert rows(imports.state / "catalog.db", "SELECT * FROM packages") == []
    before = stored_files(imports)
    answer = document(at, source, "a/1")
    assert answer["kept_files"] + answer["copied_files"] == 400
    assert answer["copied_files"] > 0 or not point.startswith("import")
    assert answer["kept_files"] > 0 or point == "import.copied:2"
    after = stored_files(imports)
    assert before.items() <= after.items(), "what was stored was put again"
    assert bool(before) or not point.startswith(("put.located", "publish"))
    imports.close()
    imports.mount()
    assert_same(imports.package("a/1"), source)
    assert count_manifests(imports) == 1
    check_nothing_is_staged(imports)


def test_killed_after_the_commit(at: Cli, imports: MountedStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    killed = at.environ | {"CASTORE_FAILPOINT": "publish.committed"}
    at("package", "import", source, "a/1", code=-signal.SIGKILL, env=killed)
    assert refusal(at, source, "a/1") == "a/1 is published already"
    imports.mount()
    assert_same(imports.package("a/1"), source)
    check_nothing_is_staged(imports)


@WITH_AND_WITHOUT_A_DAEMON
def test_interrupted_and_changed_meanwhile(at: Cli, tmp_path: Path, imports: MountedStore, daemon: bool) -> None:
    """What went from the directory goes, what changed is copied again, the rest is not; links are as they are now."""
    with stuck(imports, tmp_path) as place:
        source = place.source
        odd_tree(source)
        (source / "goes/deep").mkdir(parents=True)
        (source / "goes/deep/file").write_text("goes")
        (source / "kind").write_text("a file that becomes a directory")
        (source / "turn").mkdir()
        os.link(source / "share/1.txt", source / "torn")
        if daemon:
            imports.mount()
        place.hang()
        with at_work(at, "package", "import", source, "a/1", "--json") as process:
            wait_staged(imports)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 130, err
            assert "files (" in err.splitlines()[-1]
            assert err.endswith("stay staged in ingest/a/1; the same command goes on from there\n")
            left = json.loads(out)
            assert left["interrupted"]
            assert left["staged_files"] > 300
        run_tool("rm", "-r", source / "goes")
        (source / "kind").unlink()
        (source / "kind").mkdir()
        (source / "turn").rmdir()
        (source / "turn").symlink_to("kind")
        (source / "share/2.txt").write_text("changed, and longer")
        (source / "lib/current").unlink()
        (source / "lib/current").symlink_to("elsewhere")
        (source / "torn").unlink()
        (source / "torn").write_text((source / "share/1.txt").read_text())
        os.utime(source / "torn", ns=(0, (source / "share/1.txt").stat().st_mtime_ns))
        (source / "share/3.txt").chmod(0o600)
        os.setxattr(source / "share/4.txt", "user.new", b"attribute")
        os.removexattr(source / "bin/tool", "user.comment")
        (source / "came").write_text("came")
        place.go_on()
        answer = document(at, source, "a/1")
        assert 0 < answer["copied_files"] < 5
        assert answer["kept_files"] > 300
        if not daemon:
            imports.mount()
        # Of set-uid bits a package has none; nor has the copy.
        (source / "set").chmod(0o755)
        assert_same(imports.package("a/1"), source)
        check_nothing_is_staged(imports)


def test_one_at_a_time(at: Cli, imports: MountedStore, tmp_path: Path) -> None:
    with stuck(imports, tmp_path) as place:
        place.hang()
        with at_work(at, "package", "import", place.source, "a/1") as process:
            wait_staged(imports)
            expected = f"{imports.state}: another import (pid {process.pid}) writes there; wait for its end"
            assert refusal(at, place.source, "a/2") == expected
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        place.go_on()
        assert document(at, place.source, "a/2")["copied_files"] == 2


def test_a_directory_that_changes_is_not_published(at: Cli, imports: MountedStore, tmp_path: Path) -> None:
    """`.castore` of another mount has another time whenever it is looked at."""
    source = tmp_path / "source"
    make_tree(source)
    inside = source / "status"
    inside.mkdir()
    other = MountedStore(make_folder(tmp_path / "other"))
    with closing(other):
        other.mount()
        run_tool("mount", "--bind", other.mnt / ".castore", inside)
        try:
            line = refusal(at, source, "a/1")
        finally:
            run_tool("umount", inside)
    assert line == f"{inside}: changed while it was read"
    assert json.loads(at("package", "list", "--json").stdout) == {"packages": []}


# the parts


class Stuck:
    """A directory to import into a store whose backend can be made to hang: it lies in the mount of another store."""

    def __init__(self, below: MountedStore, source: Path) -> None:
        self.source = source
        self._below = below

    def hang(self) -> None:
        os.kill(self._below.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._below.pid, signal.SIGCONT)


@contextmanager
def stuck(store: MountedStore, tmp_path: Path) -> Iterator[Stuck]:
    below = MountedStore(make_folder(tmp_path / "below"))
    source = make_folder(tmp_path / "source")
    with closing(below):
        below.mount()
        objects = below.ingest("objects/1") / "o"
        run_tool("cp", "-a", store.objects, objects)
        store.config.write_text(store.config.read_text().replace(f'"{store.objects}"', f'"{objects}"'))
        (source / "first").write_bytes(os.urandom(300_000))
        (source / "second").write_bytes(os.urandom(300_000))
        made = Stuck(below, source)
        try:
            yield made
        finally:
            made.go_on()
            store.close()


@contextmanager
def at_work(at: Cli, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command that runs inside, and is ended if it still does."""
    with at.start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


def many(root: Path) -> None:
    """More files than share a commit, in several directories; times of 2001, so that a lost one is noticed."""
    for number in range(400):
        path = root / f"{number % 7}" / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d " % number * 1000)
        os.utime(path, ns=(0, 10**18 + number))


def wait_staged(store: MountedStore) -> None:
    """Until all is copied."""
    workspace = store.state / "staging/workspace.db"
    expected = sum(path.is_file() and not path.is_symlink() for path in (store.root / "source").rglob("*"))

    def all_copied() -> bool:
        try:
            return len(rows(workspace, "SELECT name FROM links JOIN nodes USING (inode) WHERE state <> ''")) == expected
        except sqlite3.OperationalError:
            return False  # it is just being made

    wait_until(all_copied, "all is copied")


def check_nothing_is_staged(store: MountedStore) -> None:
    workspace = store.state / "staging/workspace.db"
    if workspace.exists():
        wait_until(lambda: rows(workspace, "SELECT * FROM nodes WHERE version_inode <> 0") == [], "no node is left")
        assert list((store.state / "staging/data").iterdir()) == []
        assert rows(workspace, "SELECT * FROM imports") == []


def stored_files(store: MountedStore) -> dict[str, tuple[int, int]]:
    """Object -> its inode and time, which another put would change; of those that the catalog knows."""
    query = "SELECT lower(hex(digest)) FROM storage_locations JOIN blobs USING (blob_id) WHERE algorithm = 'sha256'"
    status = {path.name: path.stat() for path in (store.objects / "sha256").rglob("?" * 64)}
    known = [row[0] for row in rows(store.state / "catalog.db", query)]
    return {name: (status[name].st_ino, status[name].st_mtime_ns) for name in known}


def count_manifests(store: MountedStore) -> int:
    return sum(path.is_file() for path in (store.objects / "manifest-sha256").rglob("?" * 64))
