"""What is wrong with what the daemon is given: one clear line that says how to mend it, exit 2, and nothing changed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from castore.mountinfo import mount_at
from tests.mount.store import WAIT_SECONDS, MountedStore, run_tool
from tests.namespaces import with_mounts_of_its_own

MODES = ((), ("--background",))


def listing(root: Path) -> dict[str, tuple[int, str]]:
    """Everything below a folder but the mount: mode and digest, of a database that of what it holds.

    Left out is what every start writes: the log, the lock, and the side files that SQLite makes even for a reader; and
    the empty files that a daemon that runs makes ahead.
    """
    found = {}
    for folder, folders, files in os.walk(root):
        for left_out in {"mnt", "log", "run", "spare"} & set(folders):
            folders.remove(left_out)
        for name in [*folders, *(name for name in files if not name.endswith(("-shm", "-wal")))]:
            path = Path(folder, name)
            found[str(path.relative_to(root))] = (path.lstat().st_mode, "" if path.is_dir() else digest_of(path))
    return found


def digest_of(path: Path) -> str:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            content = "\n".join(connection.iterdump()).encode()
    except sqlite3.DatabaseError:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()


def refused(store: MountedStore, *arguments: str | Path, mode: tuple[str, ...] = ()) -> str:
    """The one line with which `castore mount` refuses to start, having changed nothing."""
    before = listing(store.root)
    command = [sys.executable, "-m", "castore.cli", "--config", store.config, "mount", *(arguments or (store.mnt,))]
    done = subprocess.run(
        [*map(str, command), *mode], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert listing(store.root) == before
    [line] = done.stderr.splitlines()
    assert line.startswith("castore: error: ")
    return line.removeprefix("castore: error: ")


def write_config(store: MountedStore, old: str, new: str) -> None:
    text = store.config.read_text()
    assert old in text
    store.config.write_text(text.replace(old, new))


S3 = """
[backends.remote]
type = "s3"
endpoint_url = "http://127.0.0.1:9"
bucket = "bucket"
access_key_ref = "env:CASTORE_TEST_IS_NOT_SET"
secret_key_ref = "file:/nowhere/secret"
[routing]"""

SETTINGS = {
    "unknown key": ("[ingest]\n", "[ingest]\npublish_wiat = '5s'\n", "ingest.publish_wiat"),
    "unknown table": ("[routing]", "[rooting]", "rooting"),
    "wrong type": ("[ingest]\n", "[ingest]\nstaging_max_bytes = true\n", "ingest.staging_max_bytes = true: expected"),
    "bad value": ("[ingest]\n", "[ingest]\npublish_wait = 'soon'\n", "ingest.publish_wait = 'soon': expected"),
    "no such backend": ('default = "local"', 'default = "lokal"', "routing.default = 'lokal': expected"),
    "no TOML": ("[ingest]", "[ingest", "is not TOML"),
    "reference": ("[routing]", S3, "remote.access_key_ref: cannot resolve env:CASTORE_TEST_IS_NOT_SET: the "),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SETTINGS)
def test_settings(make_store: Callable[..., MountedStore], case: str, mode: tuple[str, ...]) -> None:
    store = make_store()
    old, new, said = SETTINGS[case]
    write_config(store, old, new)
    line = refused(store, mode=mode)
    assert said in line
    assert str(store.config) in line or case == "reference"


@pytest.mark.parametrize("mode", MODES)
def test_mountpoints(make_store: Callable[..., MountedStore], mode: tuple[str, ...]) -> None:
    store = make_store()
    missing, file, full, other = (store.root / name for name in ("missing", "file", "full", "other"))
    file.write_text("not a folder")
    full.mkdir()
    (full / "something").touch()
    other.mkdir()
    run_tool("mount", "-t", "tmpfs", "tmpfs", other)
    try:
        assert refused(store, missing, mode=mode) == f"{missing}: there is no such directory; make it with `mkdir -p`"
        assert refused(store, file, mode=mode) == f"{file}: is not a directory; name an empty directory"
        assert refused(store, full, mode=mode).startswith(f"{full}: is not empty; ")
        line = refused(store, other, mode=mode)
        assert line == f"{other}: something is mounted there (tmpfs); unmount it or choose another"
    finally:
        run_tool("umount", other)
    assert "known are" in refused(store, store.mnt, "-o", "writeback,rw", mode=mode)
    assert mount_at(store.mnt) is None


@pytest.mark.parametrize("mode", MODES)
def test_a_device_that_cannot_be_used(make_store: Callable[..., MountedStore], mode: tuple[str, ...]) -> None:
    """As for a user who may not open it; what libfuse says of it comes before."""
    store = make_store()
    command = [sys.executable, "-m", "castore.cli", "--config", str(store.config), "mount", str(store.mnt), *mode]
    done = subprocess.run(
        with_mounts_of_its_own('mount --bind /dev/null /dev/fuse; exec "$@"', *command),
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"castore: error: {store.mnt}: cannot be mounted (")
    assert "`castore doctor` says which" in done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_catalogs(make_store: Callable[..., MountedStore], mode: tuple[str, ...]) -> None:
    store = make_store()
    catalog = store.state / "catalog.db"
    with closing(sqlite3.connect(catalog)) as connection:
        [version] = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {version + 1}")
    line = refused(store, mode=mode)
    assert line == (
        f"{catalog}: has format version {version + 1}, this castore knows up to {version}; use the newer castore"
    )
    catalog.write_bytes(os.urandom(8192))
    assert refused(store, mode=mode).startswith(f"{catalog}: file is not a database; restore it from a backup")
    catalog.write_bytes(b"")
    line = refused(store, mode=mode)
    assert line.startswith(f"{catalog}: is not finished, or of an older castore; run `castore init`")
    catalog.unlink()
    assert refused(store, mode=mode) == f"{catalog}: there is no catalog; run `castore init`"
    store.state.rename(store.root / "elsewhere")
    assert refused(store, mode=mode) == f"{store.state}: there is no store; run `castore init`"


@pytest.mark.parametrize("mode", MODES)
def test_a_workspace_of_a_newer_version(store: MountedStore, mode: tuple[str, ...]) -> None:
    (store.ingest("kept/1") / "a").write_text("a")
    store.umount()
    workspace = store.state / "staging/workspace.db"
    with closing(sqlite3.connect(workspace)) as connection:
        [version] = connection.execute("PRAGMA user_version").fetchone()
        connection.execute(f"PRAGMA user_version = {version + 1}")
    assert refused(store, mode=mode).startswith(f"{workspace}: has format version {version + 1}, ")
    assert mount_at(store.mnt) is None


@pytest.mark.parametrize("mode", MODES)
def test_a_second_writing_daemon(store: MountedStore, mode: tuple[str, ...]) -> None:
    (store.ingest("kept/1") / "a").write_text("a")
    store.wait_stored(store.mnt / "ingest/kept/1/a")
    who = f"another daemon (pid {store.pid}) writes there, mounted at {store.mnt}"
    expected = f"{store.state}: {who}; unmount it or set another state_dir"
    other = store.root / "other"
    other.mkdir()
    assert refused(store, other, mode=mode) == expected
    assert refused(store, mode=mode) == expected
    assert (store.mnt / "ingest/kept/1/a").read_text() == "a"
    assert mount_at(other) is None
