"""Tags beside a mount: links that move at once, a pinned `latest`, and what they keep from being deleted or made."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from tests.mount.store import MountedStore, fails, wait_until


def publish(store: MountedStore, version: str) -> Path:
    (store.ingest(f"zlib/{version}") / "file").write_text(version)
    return store.publish(f"zlib/{version}")


def link(store: MountedStore, name: str) -> str:
    """What a link points to, '' when there is none."""
    try:
        return os.readlink(store.mnt / "packages/zlib" / name)
    except FileNotFoundError:
        return ""


def points_to(store: MountedStore, name: str, version: str) -> None:
    wait_until(lambda: link(store, name) == version, f"zlib/{name} is {version!r}", 10)


def test_tags(store: MountedStore) -> None:
    publish(store, "1.1")
    publish(store, "1.2")
    assert link(store, "stable") == ""
    assert store.castore("package", "tag", "zlib", "stable", "1.1") == "zlib/stable -> 1.1\n"
    points_to(store, "stable", "1.1")
    names = store.mnt / "packages/zlib"
    assert sorted(os.listdir(names)) == ["1.1", "1.2", "latest", "stable"]
    assert (names / "stable/file").read_text() == "1.1"
    assert (names / "stable").lstat().st_size == 3
    assert json.loads(store.castore("package", "show", "zlib/stable", "--json"))["ref"] == "zlib/1.1"

    store.castore("package", "tag", "zlib", "stable", "1.2")
    points_to(store, "stable", "1.2")
    assert (names / "stable/file").read_text() == "1.2"
    assert store.castore("package", "tag", "zlib", "stable", "--rollback") == "zlib/stable -> 1.1\n"
    points_to(store, "stable", "1.1")
    assert [line.split()[:2] for line in store.castore("package", "tag", "zlib").splitlines()[1:]] == [
        ["stable", "1.1"]
    ]
    history = json.loads(store.castore("package", "tag", "zlib", "--history", "--json"))["changes"]
    assert [change["version"] for change in history] == ["1.1", "1.2", "1.1"]

    # What a tag points to cannot go, and no version takes its name; nor the other way round.
    assert "tagged stable" in store.run("package", "delete", "zlib/1.1", "--yes").stderr
    assert "a tag of zlib/1.1" in store.run("package", "delete", "zlib/stable", "--yes").stderr
    (store.ingest("zlib/stable") / "file").write_text("")
    with fails(errno.ENOTDIR):  # from the kernel: the link is in the way
        (store.mnt / "ingest/zlib/stable").rename(names / "stable")
    assert "is a tag of zlib" in store.run("package", "publish", "zlib/stable").stderr
    assert "is a version" in store.run("package", "tag", "zlib", "1.2", "1.1").stderr
    for arguments in (("zlib", "stable", "9"), ("zlib", "none", "--rollback"), ("zlib", "none", "--remove"), ("a b",)):
        assert store.run("package", "tag", *arguments).returncode == 2

    store.castore("package", "tag", "zlib", "stable", "--remove")
    points_to(store, "stable", "")
    assert store.castore("package", "tag", "zlib") == "zlib has no tags\n"
    store.castore("package", "delete", "zlib/1.1", "--yes")


def test_a_tag_that_moves_is_always_there(store: MountedStore) -> None:
    """Whatever the kernel has kept of it: no reader meets a moment without it, nor what it was after the command."""
    for version in ("1.1", "1.2"):
        publish(store, version)
    file = store.mnt / "packages/zlib/stable/file"
    for version in ("1.1", "1.2", "1.1", "1.2"):
        store.castore("package", "tag", "zlib", "stable", version)
        assert link(store, "stable") == version
        assert file.read_text() == version
        assert (store.mnt / "packages/zlib/stable").lstat().st_size == len(version)


def test_latest_can_be_pinned(store: MountedStore) -> None:
    publish(store, "1.1")
    publish(store, "1.2")
    assert link(store, "latest") == "1.2"
    store.castore("package", "tag", "zlib", "latest", "1.1")
    points_to(store, "latest", "1.1")
    publish(store, "1.3")
    assert (store.mnt / "packages/zlib/1.3/file").read_text() == "1.3"
    assert json.loads(store.castore("package", "show", "zlib/latest", "--json"))["ref"] == "zlib/1.1"
    points_to(store, "latest", "1.1")
    assert "tagged latest" in store.run("package", "delete", "zlib/1.1", "--yes").stderr
    store.castore("package", "tag", "zlib", "latest", "--remove")
    points_to(store, "latest", "1.3")
    store.castore("package", "tag", "zlib", "latest", "--rollback")
    points_to(store, "latest", "1.1")
    assert sorted(os.listdir(store.mnt / "packages/zlib")) == ["1.1", "1.2", "1.3", "latest"]
