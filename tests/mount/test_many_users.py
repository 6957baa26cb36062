"""Other users of a mount with --allow-other: what the kernel lets each of them do. Needs root, to become them."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.store import MountedStore, run_tool

NOBODY, LODGER = 65534, 54321
"""A user with a login name, and one whom the host does not know."""


@pytest.fixture
def many(make_store: Callable[..., MountedStore]) -> MountedStore:
    """A store that every user of the host can use."""
    store = make_store(reachable=True)
    store.mount("--allow-other")
    return store


def _as(uid: int, script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a folder as another user; whatever its exit code."""
    return subprocess.run(
        ["sh", "-c", script],
        cwd=folder,
        user=uid,
        group=uid,
        extra_groups=[],
        umask=0o022,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _must(uid: int, script: str, folder: Path) -> str:
    done = _as(uid, script, folder)
    assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
    return done.stdout


def _refused(uid: int, script: str, folder: Path, why: str = "Permission denied") -> None:
    done = _as(uid, script, folder)
    assert done.returncode != 0, f"{script} was allowed: {done.stdout}"
    assert why in done.stderr, done.stderr


_PUBLISH = """
set -e
mkdir -p ingest/tool/1
echo one > ingest/tool/1/file
chmod 640 ingest/tool/1/file
mkdir ingest/tool/1/dir && ln -s file ingest/tool/1/link && ln ingest/tool/1/file ingest/tool/1/dir/again
sync ingest/tool/1
mv ingest/tool/1 packages/tool/
"""


@pytest.mark.parametrize(("uid", "producer"), [(NOBODY, "nobody"), (LODGER, f"uid:{LODGER}")])
def test_an_unprivileged_publisher(many: MountedStore, uid: int, producer: str) -> None:
    _must(uid, _PUBLISH, many.mnt)
    package = many.package("tool/1")
    assert (package / "file").read_text() == "one\n"
    status = (package / "file").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode), status.st_nlink) == (uid, uid, 0o640, 2)
    name = (many.mnt / "packages/tool").stat()
    assert (name.st_uid, name.st_gid, stat.S_IMODE(name.st_mode)) == (uid, uid, 0o755)
    assert os.getxattr(package, "user.castore.producer").decode() == producer
    assert _must(uid, "cat packages/tool/latest/file", many.mnt) == "one\n"
    assert f"by uid {uid}" in many.castore("package", "show", "tool/1")
    assert _must(uid, "rmdir ingest/tool && ls ingest", many.mnt) == ""


def test_published_modes_count(many: MountedStore) -> None:
    box = many.ingest("mixed/1")
    for name, mode in (("open", 0o644), ("closed", 0o600), ("tool", 0o755)):
        (box / name).write_text(f"#!/bin/sh\necho {name}\n")
        (box / name).chmod(mode)
    (box / "cellar").mkdir(mode=0o700)
    (box / "cellar/file").write_text("deep")
    many.publish("mixed/1")
    inside = many.package("mixed/1")
    assert _must(NOBODY, "cat open && ./tool", inside).endswith("tool\n")
    _refused(NOBODY, "cat closed", inside)
    _refused(NOBODY, "ls cellar", inside)
    _refused(NOBODY, "cat cellar/file", inside)
    _refused(NOBODY, "./open", inside)
    _refused(NOBODY, "echo x > new", inside)
    _refused(NOBODY, "rm -f open", inside)
    # The owner of a file may write it as far as modes go; then it is read-only.
    _must(LODGER, "mkdir -p ingest/own/1 && echo x > ingest/own/1/f && mv ingest/own/1 packages/own/", many.mnt)
    _refused(LODGER, "echo y > packages/own/1/f", many.mnt, "Read-only file system")
    _refused(LODGER, "touch packages/own/1/g", many.mnt, "Read-only file system")


def test_ingest_is_sticky(many: MountedStore) -> None:
    assert stat.S_IMODE((many.mnt / "ingest").stat().st_mode) == 0o1777
    for script in ("chmod 755 ingest", "chown 1 ingest", "touch ingest", "setfattr -n user.x -v y ingest"):
        done = subprocess.run(["sh", "-c", script], cwd=many.mnt, stderr=subprocess.PIPE, text=True)
        assert "Operation not permitted" in done.stderr, script
    _must(NOBODY, "mkdir -p ingest/mine/1 && echo x > ingest/mine/1/file", many.mnt)
    for script in (
        "rm -rf ingest/mine",
        "mv ingest/mine ingest/yours",
        "mkdir ingest/mine/2",
        "echo y > ingest/mine/1/file",
        "chmod 777 ingest/mine",
        "chown 54321 ingest/mine",
        "setfattr -n user.castore.producer -v other ingest/mine/1",
    ):
        done = _as(LODGER, script, many.mnt)
        assert done.returncode != 0, script
        assert "Permission denied" in done.stderr or "Operation not permitted" in done.stderr, done.stderr
    assert (many.mnt / "ingest/mine/1/file").read_text() == "x\n"
    _must(LODGER, "cat ingest/mine/1/file && ls -l ingest/mine/1", many.mnt)
    _must(NOBODY, "chmod 700 ingest/mine", many.mnt)
    _refused(LODGER, "ls ingest/mine", many.mnt)


def test_who_may_publish_a_version(many: MountedStore) -> None:
    _must(NOBODY, "mkdir -p ingest/theirs/1 && mv ingest/theirs/1 packages/theirs/ && rmdir ingest/theirs", many.mnt)
    # The name in ingest/ is free again, but the package still belongs to who published it first.
    _must(LODGER, "mkdir -p ingest/theirs/2 && echo bad > ingest/theirs/2/file", many.mnt)
    _refused(LODGER, "mv ingest/theirs/2 packages/theirs/", many.mnt)
    _refused(LODGER, "mv ingest/theirs/2 packages/other/", many.mnt, "")
    assert (many.mnt / "ingest/theirs/2/file").read_text() == "bad\n"
    assert sorted(os.listdir(many.mnt / "packages/theirs")) == ["1", "latest"]
    # A group may share a name: its owner says so with the mode of ingest/NAME.
    _must(
        NOBODY, "mkdir -p ingest/shared/1 && chmod 777 ingest/shared && mv ingest/shared/1 packages/shared/", many.mnt
    )
    _must(LODGER, "mkdir ingest/shared/2 && mv ingest/shared/2 packages/shared/", many.mnt)
    assert sorted(os.listdir(many.mnt / "packages/shared")) == ["1", "2", "latest"]
    assert os.getxattr(many.package("shared/2"), "user.castore.producer").decode() == f"uid:{LODGER}"


def test_what_only_the_owner_of_the_mount_sees(many: MountedStore) -> None:
    (many.ingest("known/1") / "file").write_text("x")
    many.publish("known/1")
    digest = os.getxattr(many.package("known/1") / "file", "user.hash.sha256").decode()
    for script in (
        "ls by-digest",
        f"cat by-digest/sha256/{digest[:2]}/{digest[2:4]}/{digest}",
        "ls .castore",
        "cat .castore/status.json",
        "echo x > by-digest/sha256",
    ):
        _refused(NOBODY, script, many.mnt)
    _refused(NOBODY, f"ls {many.state}", many.mnt)
    _refused(NOBODY, f"cat {many.objects}/sha256/{digest[:2]}/{digest[2:4]}/{digest}", many.mnt)
    assert "packages" in _must(NOBODY, "ls -la . packages ingest", many.mnt)
    for path in ("packages/new", "new", "ingest/Bad,Name"):
        assert _as(NOBODY, f"mkdir {path}", many.mnt).returncode != 0


def test_labels_are_the_publishers_own(many: MountedStore) -> None:
    script = """
    set -e
    mkdir -p ingest/labelled/1
    setfattr -n user.castore.producer -v ci-42 ingest/labelled/1
    mv ingest/labelled/1 packages/labelled/
    """
    _must(LODGER, script, many.mnt)
    assert os.getxattr(many.package("labelled/1"), "user.castore.producer") == b"ci-42"
    # What was declared stands beside who it was.
    assert f"by uid {LODGER}" in many.castore("package", "show", "labelled/1")


def test_room_for_each_user(make_store: Callable[..., MountedStore]) -> None:
    store = make_store('max_bytes_per_user = "2MiB"', reachable=True)
    store.mount("--allow-other")
    _must(NOBODY, "mkdir -p ingest/a/1 && head -c 1500000 /dev/zero > ingest/a/1/file", store.mnt)
    _refused(NOBODY, "head -c 1500000 /dev/zero > ingest/a/1/more", store.mnt, "No space left")
    # Another user is not harmed.
    _must(LODGER, "mkdir -p ingest/b/1 && head -c 1500000 /dev/zero > ingest/b/1/file", store.mnt)
    _must(NOBODY, "rm ingest/a/1/*; head -c 1900000 /dev/zero > ingest/a/1/file", store.mnt)


def test_without_allow_other_nobody_else_gets_in(make_store: Callable[..., MountedStore]) -> None:
    store = make_store(reachable=True)
    store.mount()
    _refused(NOBODY, f"ls {store.mnt}", store.root)
    _refused(NOBODY, f"cat {store.mnt}/packages", store.root)
    assert run_tool("ls", store.mnt)


def test_set_uid_programs_do_not_come_to_life(many: MountedStore) -> None:
    run_tool("cp", "/usr/bin/id", many.ingest("powers/1") / "id")
    (many.ingest("powers/1") / "id").chmod(0o4755)
    many.publish("powers/1")
    assert _must(NOBODY, "packages/powers/1/id -u", many.mnt) == f"{NOBODY}\n"
    options = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if str(many.mnt) in line)
    assert {"nosuid", "nodev", "default_permissions", "allow_other"} <= set(options.split()[3].split(","))
