"""The daemon dies at each named step from creating a file to the answer to a publish. `test_crash` kills at random."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from castore.failpoint import COMMAND_POINTS, POINTS, VARIABLE
from tests.mount.crash_round import rows
from tests.mount.store import MountedStore, wait_until

SOURCE = Path(__file__).parents[2]
DIED = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}
"""What the kernel answers for a daemon that is gone: before, while, and from a page that it cannot fetch."""
OF_OTHERS = ("import.", "deletion.", "events.")
"""What a small package does not meet: `test_package_import`, `test_delete` and `test_event_delivery` do."""
FILES = {"small": b"small", "dir/large": os.urandom(3_000_000), "dir/twin": b"small", "empty": b""}


class Writer:
    """Copies FILES in and publishes, as far as it comes; what was promised to it by then is what counts."""

    def __init__(self, store: MountedStore) -> None:
        self.store = store
        self.closed: set[str] = set()
        self.published = False
        self.died = False

    def run(self) -> None:
        try:
            self._write()
            self.store.publish("point/1")
            self.published = True
        except OSError as exc:
            if exc.errno not in DIED:
                raise
            self.died = True

    def _write(self) -> None:
        box = self.store.ingest("point/1")
        (box / "dir").mkdir()
        for name, data in FILES.items():
            with open(box / name, "wb", buffering=0) as file:
                for start in range(0, len(data), 1 << 20):
                    file.write(data[start : start + (1 << 20)])
            self.closed.add(name)
        os.link(box / "small", box / "dir/link")
        os.symlink("small", box / "pointer")


def check_whole(top: Path) -> None:
    files = {str(path.relative_to(top)): path for path in top.rglob("*") if path.is_file() and not path.is_symlink()}
    assert {name: path.read_bytes() for name, path in files.items()} == FILES | {"dir/link": b"small"}
    assert files["dir/link"].stat().st_ino == files["small"].stat().st_ino
    assert (top / "pointer").readlink() == Path("small")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("?" * 64) if path.is_file()}


def known(store: MountedStore, algorithm: str) -> set[str]:
    """The objects that the catalog knows of: any other is an orphan, or missing."""
    query = f"SELECT hex(digest) FROM storage_locations JOIN blobs USING (blob_id) WHERE algorithm = '{algorithm}'"
    return {row[0].lower() for row in rows(store.state / "catalog.db", query)}


@pytest.mark.parametrize("point", [point for point in POINTS if not point.startswith(OF_OTHERS)])
def test_dies_at(make_store: Callable[..., MountedStore], point: str) -> None:
    store = make_store()
    os.environ[VARIABLE] = point
    try:
        store.mount()
    finally:
        del os.environ[VARIABLE]
    writer = Writer(store)
    thread = threading.Thread(target=writer.run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert writer.died or point == "publish.forgotten", "the point was never met"
    wait_until(lambda: not Path(f"/proc/{store.pid}").exists(), "the daemon has ended")
    store.pid = 0
    store.mount()  # nothing is in a cache but what this daemon reads
    package, box = store.package("point/1"), store.mnt / "ingest/point/1"
    if package.exists():
        assert point in list(POINTS)[list(POINTS).index("publish.committed") :]
        assert not box.exists()
    else:
        assert not writer.published
        for name in writer.closed:
            assert (box / name).read_bytes() == FILES[name], name
        box.mkdir(parents=True, exist_ok=True)
        (box / "dir").mkdir(exist_ok=True)
        for name in FILES.keys() - writer.closed:
            (box / name).write_bytes(FILES[name])
        if not (box / "dir/link").exists():
            os.link(box / "small", box / "dir/link")
        if not (box / "pointer").is_symlink():
            os.symlink("small", box / "pointer")
        store.publish("point/1")
    check_whole(package)
    check_no_leftovers(store)


def check_no_leftovers(store: MountedStore) -> None:
    wait_until(lambda: not list((store.state / "staging/data").iterdir()), "no bytes are left in staging")
    wait_until(lambda: not list((store.state / "staging/manifests").iterdir()), "no manifest is left in staging")
    workspace = store.state / "staging/workspace.db"
    for table in ("publishing", "nodes"):
        where = "WHERE version_inode <> 0" if table == "nodes" else ""
        assert rows(workspace, f"SELECT * FROM {table} {where}") == []
    wait_until(lambda: rows(store.state / "catalog.db", "SELECT * FROM put_intents") == [], "no intent is left")
    assert store.status()["staged_bytes"] == 0
    assert names(store.objects / "manifest-sha256") == known(store, "manifest-sha256")
    # Perhaps one more than the package has: a half-written file is stored as far as it came, until it is written on. If
    # that is done while it is put, nobody knows what was put, and the object is left to garbage collection.
    there, expected = names(store.objects / "sha256"), known(store, "sha256")
    assert there >= expected
    if left := there - expected:
        assert left <= {hashlib.sha256(FILES["dir/large"][:size]).hexdigest() for size in (1 << 20, 2 << 20)}
        store.castore("storage", "gc", "--grace", "0s", "--delete")
        assert names(store.objects / "sha256") == known(store, "sha256")
    assert len(known(store, "manifest-sha256")) == 1


def test_every_point_is_somewhere() -> None:
    found = []
    for folder in ("castore", "mount"):
        for path in (SOURCE / folder).rglob("*.py"):
            found += re.findall(r"\bfailpoint\(\"([a-z._]+)\"\)", path.read_text())
    assert sorted(found) == sorted([*POINTS, *COMMAND_POINTS])
