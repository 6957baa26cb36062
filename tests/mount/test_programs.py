"""Programs that work in ingest/ and on packages, on a real mount: git, SQLite, Python, compilers, mmap."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import sqlite3
import sys
import zipfile
from pathlib import Path

import pytest

from tests.mount.store import MountedStore, run_tool
from tests.mount.trees import sha256

_GIT = ("git", "-c", "safe.directory=*", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "gc.auto=0")


def _repository(path: Path) -> None:
    run_tool(*_GIT, "init", "-q", "-b", "main", path)
    for number in range(5):
        (path / f"file{number}").write_text(f"{number}\n" * 1000)
        (path / "link").unlink(missing_ok=True)
        (path / "link").symlink_to(f"file{number}")
        run_tool(*_GIT, "-C", path, "add", ".")
        run_tool(*_GIT, "-C", path, "commit", "-q", "-m", f"commit {number}")


def test_git_clone_into_ingest(shared_store: MountedStore, tmp_path: Path) -> None:
    _repository(tmp_path / "repo")
    (shared_store.mnt / "ingest/cloned").mkdir()
    run_tool(*_GIT, "clone", "-q", tmp_path / "repo", shared_store.mnt / "ingest/cloned/1")
    package = shared_store.publish("cloned/1")
    run_tool(*_GIT, "-C", package, "fsck", "--full", "--strict")
    head = run_tool(*_GIT, "-C", tmp_path / "repo", "rev-parse", "HEAD")
    assert run_tool(*_GIT, "-C", package, "rev-parse", "HEAD") == head
    assert run_tool(*_GIT, "-C", package, "status", "--porcelain") == ""
    # A published repository can be cloned from, too.
    run_tool(*_GIT, "clone", "-q", f"file://{package}", tmp_path / "again")
    assert run_tool(*_GIT, "-C", tmp_path / "again", "rev-parse", "HEAD") == head


def test_git_works_in_ingest(shared_store: MountedStore) -> None:
    box = shared_store.ingest("worked/1")
    _repository(box)
    run_tool(*_GIT, "-C", box, "checkout", "-q", "-b", "side", "HEAD~2")
    (box / "file1").write_text("on the side\n")
    run_tool(*_GIT, "-C", box, "commit", "-q", "-a", "-m", "side")
    run_tool(*_GIT, "-C", box, "checkout", "-q", "main")
    run_tool(*_GIT, "-C", box, "merge", "-q", "-m", "merged", "side")
    run_tool(*_GIT, "-C", box, "gc", "-q", "--prune=now")
    package = shared_store.publish("worked/1")
    run_tool(*_GIT, "-C", package, "fsck", "--full", "--strict")
    assert (package / "file1").read_text() == "on the side\n"
    assert len(run_tool(*_GIT, "-C", package, "log", "--format=%s").splitlines()) == 7


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal"])
def test_sqlite_module(shared_store: MountedStore, journal: str) -> None:
    box = shared_store.ingest(f"sqlite-{journal}/1")
    database = sqlite3.connect(box / "facts.db")
    assert database.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
    database.execute("CREATE TABLE facts (number INTEGER PRIMARY KEY, text)")
    for number in range(20):
        with database:
            database.execute("INSERT INTO facts VALUES (?, ?)", (number, "x" * 10_000))
    # A second connection sees what was committed, and a rollback takes its own back.
    other = sqlite3.connect(box / "facts.db")
    other.execute("DELETE FROM facts")
    assert other.execute("SELECT count(*) FROM facts").fetchone() == (0,)
    other.rollback()
    assert other.execute("SELECT count(*) FROM facts").fetchone() == (20,)
    other.close()
    database.execute("VACUUM")
    database.close()
    package = shared_store.publish(f"sqlite-{journal}/1")
    # A database in WAL mode needs its -shm file, which a read-only directory cannot have.
    published = sqlite3.connect(f"file:{package}/facts.db?immutable=1", uri=True)
    assert published.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert published.execute("SELECT count(*), min(length(text)) FROM facts").fetchone() == (20, 10_000)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        published.execute("DELETE FROM facts")
    published.close()


def test_sqlite_program(shared_store: MountedStore) -> None:
    box = shared_store.ingest("sqlite-cli/1")
    run_tool("sqlite3", box / "a.db", "CREATE TABLE t (x); INSERT INTO t VALUES (1), (2), (3);")
    run_tool("sqlite3", box / "a.db", "UPDATE t SET x = x * 10;")
    package = shared_store.publish("sqlite-cli/1")
    assert run_tool("sqlite3", "-readonly", package / "a.db", "SELECT sum(x) FROM t") == "60\n"


def test_import_from_a_package(shared_store: MountedStore) -> None:
    box = shared_store.ingest("pythonlib/1")
    (box / "speech").mkdir()
    (box / "speech/__init__.py").write_text("from speech.words import WORD\n")
    (box / "speech/words.py").write_text("WORD = 'hello'\n")
    with zipfile.ZipFile(box / "zipped.zip", "w") as archive:
        archive.writestr("zipped.py", "VALUE = 42\n")
    package = shared_store.publish("pythonlib/1")
    code = "import speech, zipped; print(speech.WORD, zipped.VALUE, speech.__file__)"
    environ = {"PYTHONPATH": f"{package}:{package}/zipped.zip", "PATH": os.environ["PATH"]}
    output = run_tool(sys.executable, "-c", code, env=environ)
    assert output == f"hello 42 {package}/speech/__init__.py\n"
    assert sorted(path.name for path in (package / "speech").iterdir()) == ["__init__.py", "words.py"]


def test_import_compiles_in_ingest(shared_store: MountedStore) -> None:
    box = shared_store.ingest("pythonlib/2")
    (box / "said.py").write_text("WORD = 'again'\n")
    environ = {"PYTHONPATH": str(box), "PATH": os.environ["PATH"]}
    run_tool(sys.executable, "-c", "import said", env=environ)
    assert len(list((box / "__pycache__").iterdir())) == 1
    package = shared_store.publish("pythonlib/2")
    # The compiled file is used where it is published: its time stamp of the source is still right.
    environ["PYTHONPATH"] = str(package)
    told = run_tool("sh", "-c", '"$0" -v -c "import said" 2>&1', sys.executable, env=environ)
    assert f"matches {package}/said.py" in told


def test_pip_install_into_ingest(shared_store: MountedStore, tmp_path: Path) -> None:
    wheel = tmp_path / "demo-1.0-py3-none-any.whl"
    info = "demo-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("demo/__init__.py", "NAME = 'demo'\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"demo/__init__.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    box = shared_store.ingest("installed/1")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps", "-q")
    run_tool(*pip, "--root-user-action=ignore", "--target", box, wheel)
    package = shared_store.publish("installed/1")
    output = run_tool(sys.executable, "-c", "import demo; print(demo.NAME)", env={"PYTHONPATH": str(package)})
    assert output == "demo\n"


def test_run_a_published_program(shared_store: MountedStore) -> None:
    box = shared_store.ingest("tools/1")
    run_tool("cp", "-aL", shutil.which("sha256sum") or "", box / "summer")
    (box / "script").write_text('#!/bin/sh\n"$(dirname "$0")/summer" "$0" | cut -c1-64\n')
    (box / "script").chmod(0o755)
    package = shared_store.publish("tools/1")
    assert run_tool(package / "script") == sha256(package / "script") + "\n"


def test_compile_in_ingest(shared_store: MountedStore) -> None:
    box = shared_store.ingest("built/1")
    (box / "add.c").write_text("int add(int a, int b) { return a + b; }\n")
    (box / "main.c").write_text('#include <stdio.h>\nint add(int, int);\nint main() { printf("%d\\n", add(40, 2)); }\n')
    (box / "Makefile").write_text(
        "main: main.o libadd.so\n\tcc -o $@ main.o -L. -ladd -Wl,-rpath,'$$ORIGIN'\n"
        "libadd.so: add.c\n\tcc -shared -fPIC -o $@ $<\n"
        "main.o: main.c\n\tcc -c -o $@ $<\n"
    )
    run_tool("make", "-j2", cwd=box)
    assert "up to date" in run_tool("make", cwd=box)
    assert run_tool(box / "main") == "42\n"
    package = shared_store.publish("built/1")
    assert run_tool(package / "main") == "42\n"
    run_tool("make", "-q", cwd=package)


def test_mmap_reads(shared_store: MountedStore) -> None:
    numbers = random.Random(7)
    content = numbers.randbytes(5_000_001)
    (shared_store.ingest("mapped/1") / "data").write_bytes(content)
    for find in (shared_store.ingest, shared_store.publish):
        folder = find("mapped/1")
        with (folder / "data").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            for _ in range(300):
                start = numbers.randrange(len(content))
                assert mapping[start : start + 5000] == content[start : start + 5000]
            assert mapping[:] == content


def test_mapping_outlives_publish(shared_store: MountedStore) -> None:
    content = random.Random(8).randbytes(2_000_000)
    path = shared_store.ingest("mapped/2") / "data"
    path.write_bytes(content)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert mapping[:1000] == content[:1000]
    shared_store.publish("mapped/2")
    assert mapping[:] == content
    mapping.close()
