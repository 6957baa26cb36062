"""The disaster drill: publish, lose the host, rebuild, compare everything; then the same with Litestream.

For tests and by itself.

python -m tests.mount.disaster DIR [--packages N] [--server rgw|seaweedfs|local] [--json FILE]
    DIR must not exist. Prints a table of what was published, what came back and how long it took: from the manifests
    alone, and from a replica of the catalog.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from castore.catalog.reader import CatalogReader
from castore.replica.litestream import find_program
from tests.mount.following import environment, replica_url, replicating
from tests.mount.store import MountedStore, run_tool, wait_until
from tests.places import LocalPlace, Place, S3Place
from tests.servers.every import EveryServer

SEED: Final = 20
SHARED: Final = b"the same in every package\n" * 4000
PART_BYTES: Final = 300_000
"""More than two blocks."""

Picture = dict[str, Any]


def fill(root: Path, number: int) -> None:
    """A tree with all that a package can have; it differs from that of any other number."""
    numbers = random.Random(SEED + number)
    (root / "lib/deep/er").mkdir(parents=True)
    (root / "empty folder").mkdir()
    (root / "lib/shared.txt").write_bytes(SHARED)
    (root / "lib/large.bin").write_bytes(numbers.randbytes(PART_BYTES + number))
    (root / "empty").touch()
    for name in range(10 + number % 10):
        (root / f"lib/deep/er/{name:03d}").write_bytes(numbers.randbytes(numbers.randrange(5000)))
    os.link(root / "lib/large.bin", root / "hard link")
    os.link(root / "lib/large.bin", root / "lib/deep/hard link")
    os.symlink("lib/deep", root / "into")
    os.symlink("../../../out", root / "out of it")
    (root / "umläut \n name").write_text("with a line feed")
    with open(os.fsencode(root) + b"/not \xff utf-8", "wb") as file:
        file.write(b"bytes")
    os.setxattr(root / "empty", "user.note", b"\0\xff of package %d" % number)
    os.setxattr(root / "lib", "user.origin", b"folder")
    (root / "lib/shared.txt").chmod(0o400)
    (root / "empty").chmod(0o755)
    (root / "lib").chmod(0o750)
    for path in [*root.rglob("*")]:
        os.utime(path, ns=(0, 1_500_000_000_123_456_789 + numbers.randrange(10**17)), follow_symlinks=False)


def publish(store: MountedStore, count: int) -> None:
    """`count` packages, of several versions each, by `cp -a` and `mv`, some with labels of their own."""
    source = store.root / "source"
    for number in range(count):
        ref = f"package-{number // 3}/1.{number % 3}"
        fill(source, number)
        target = store.mnt / "ingest" / ref
        target.mkdir(parents=True)
        if number % 2:
            os.setxattr(target, "user.castore.producer", b"ci-%d" % number)
            os.setxattr(target, "user.castore.retention_class", b"release")
        # tar keeps times, modes, hard links and attributes, and needs no cp of a certain age.
        for path in source.iterdir():
            assert os.spawnlp(os.P_WAIT, "cp", "cp", "-a", str(path), str(target)) == 0
        shutil.rmtree(source)
        store.publish(ref)


def picture(store: MountedStore) -> Picture:
    """All that can be seen of the packages: attributes, bytes, links, labels, times, the objects of each package."""
    seen: Picture = {}
    root = store.mnt / "packages"
    for folder, folders, files in os.walk(os.fsencode(root)):
        folders.sort()
        for name in [*folders, *files]:
            path = folder + b"/" + name
            seen[repr(os.path.relpath(path, os.fsencode(root)))] = _look(path)
    listed = json.loads(store.castore("package", "list", "--json"))["packages"]
    seen["list"] = {package["ref"]: package for package in listed}
    for ref in seen["list"]:
        seen[f"show {ref}"] = json.loads(store.castore("package", "show", ref, "--json"))
    return seen


def _look(path: bytes) -> Any:
    status = os.lstat(path)
    seen: list[Any] = [status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_nlink]
    seen += [status.st_mtime_ns, status.st_ctime_ns]
    if stat.S_ISLNK(status.st_mode):
        return [*seen, os.readlink(path)]
    seen.append({name: os.getxattr(path, name) for name in os.listxattr(path)})
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            seen.append(hashlib.file_digest(file, "sha256").hexdigest())
        seen.append(os.getxattr(path, "user.castore.digest"))
        seen.append(sorted(_names_of(path, status)))
    return seen


def _names_of(path: bytes, status: os.stat_result) -> list[bytes]:
    """The names in the same folder that are the same file."""
    folder = os.path.dirname(path)
    return [item.name for item in os.scandir(folder) if item.inode() == status.st_ino]


def lose_state(store: MountedStore) -> None:
    """The host is gone: its state directory and its cache."""
    shutil.rmtree(store.state)
    shutil.rmtree(store.root / "cache", ignore_errors=True)


def differences(before: Picture, after: Picture) -> list[str]:
    """Where two pictures are not the same."""
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in before.keys() | after.keys()
            if before.get(key) != after.get(key)]  # fmt: skip


def drill(root: Path, place: Place, count: int) -> dict[str, Any]:
    """All of it; raises AssertionError when something is not as it was. What it measured."""
    store = MountedStore(root, place=place)
    try:
        began = time.monotonic()
        store.mount()
        publish(store, count)
        published = time.monotonic()
        before = picture(store)
        store.umount()
        lose_state(store)
        lost = time.monotonic()
        summary = json.loads(store.castore("catalog", "rebuild", "--backend", "main", "--json").splitlines()[-1])
        rebuilt = time.monotonic()
        check = json.loads(store.castore("catalog", "check", "--json"))
        store.mount()
        readable = time.monotonic()
        after = picture(store)
        wrong = differences(before, after)
        assert not wrong, "\n".join(wrong[:20])
        verified = store.run("storage", "verify")
        assert verified.returncode == 0, verified.stdout
        store.umount()
    finally:
        store.close()
    assert check["is_sound"]
    return {
        "packages": summary["added"],
        "entries": summary["entry_count"],
        "objects": summary["object_count"],
        "things_compared": len(before),
        "publish_s": round(published - began, 1),
        "rebuild_s": round(rebuilt - lost, 1),
        "lost_to_mounted_s": round(readable - lost, 1),
    }


def drill_with_litestream(root: Path, place: Place, count: int, url: str) -> dict[str, Any]:
    """The same with a replica of the catalog: host, daemon and litestream end by a kill, and everything comes back,
    tags and the catalog's own identity among it.
    """
    store = MountedStore(root, place=place)
    try:
        store.mount()
        with replicating(store, url):
            publish(store, count)
            last = f"package-{(count - 1) // 3}/1.{(count - 1) % 3}"
            name = last.partition("/")[0]
            store.castore("package", "tag", name, "stable", "1.0")
            published = time.monotonic()
            wait_until(lambda: _is_replicated(root / "looked.db", url, name), "the replica has the last tag")
            replicated = time.monotonic()
            before = picture(store)
            identity = _identity(store)
            store.kill()
        store.close()
        lose_state(store)
        lost = time.monotonic()
        store.state.mkdir(mode=0o700)
        run_tool(find_program(), "restore", "-o", store.state / "catalog.db", url)
        store.castore("init")
        restored = time.monotonic()
        check = json.loads(store.castore("catalog", "check", "--json"))
        store.mount()
        readable = time.monotonic()
        wrong = differences(before, picture(store))
        assert not wrong, "\n".join(wrong[:20])
        assert _identity(store) == identity
        verified = store.run("storage", "verify")
        assert verified.returncode == 0, verified.stdout
        # And publishing goes on where it was.
        (store.ingest("after/1") / "file").write_text("goes on")
        store.publish("after/1")
        store.umount()
    finally:
        store.close()
    assert check["is_sound"]
    return {
        "litestream_things_compared": len(before),
        "litestream_replicated_s": round(replicated - published, 1),
        "litestream_restore_s": round(restored - lost, 1),
        "litestream_lost_to_mounted_s": round(readable - lost, 1),
    }


def _is_replicated(path: Path, url: str, name: str) -> bool:
    path.unlink(missing_ok=True)
    command = [find_program(), "restore", "-o", str(path), url]
    if subprocess.run(command, capture_output=True, check=False, timeout=60).returncode:
        return False
    with CatalogReader(path) as catalog:
        return catalog.tag(name, "stable") is not None


def _identity(store: MountedStore) -> tuple[str, list[Any]]:
    """What a rebuild makes anew."""
    with CatalogReader(store.state / "catalog.db") as catalog:
        return catalog.catalog_id(), catalog.tags()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--packages", type=int, default=50)
    parser.add_argument("--server", default="rgw", help="local, or one of the servers of tests/servers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for name in ("store", "second"):
        (options.dir / name).mkdir(parents=True)
    with ExitStack() as stack:
        if options.server == "local":
            place: Place = LocalPlace(options.dir)
            second: Place = LocalPlace(options.dir / "second")
            url = f"file://{options.dir.absolute()}/replica"
        else:

            def folder(name: str) -> Path:
                path: Path = options.dir / name
                path.mkdir()
                return path

            servers = stack.enter_context(EveryServer(folder))
            server = servers[options.server]
            place, second = (S3Place(options.dir, server, None) for _ in range(2))
            url = replica_url(server)
            os.environ |= environment(server)
            os.environ.pop("AWS_CA_BUNDLE", None)
        found = {"server": options.server, **drill(options.dir / "store", place, options.packages)}
        found |= drill_with_litestream(options.dir / "second", second, options.packages, url)
    for key, value in found.items():
        print(f"{key:20} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
