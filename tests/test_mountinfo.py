"""What is mounted, as the kernel writes it. Mounts of castore itself are in tests/cli and tests/mount."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from castore.errors import DeadlineExceeded
from castore.mountinfo import (
    Mount,
    mount_at,
    mount_source,
    parse_mountinfo,
    read_mounts,
    resolve_mountpoint,
    wait_unmounted,
)

LINES = b"\n".join(
    [
        rb"22 28 0:20 / /proc rw,nosuid - proc proc rw",
        rb"36 35 98:0 /mnt1 /mnt/a\040b\134c\011d rw master:1 shared:2 - fuse.castore castore:/var/a\040b,c rw",
        rb"37 35 98:1 / /mnt/ro ro,noatime - fuse.castore castore:/var/x ro,user_id=0",
        rb"38 35 98:2 / /mnt/super rw - fuse.castore castore:/var/caf%C3%A9%25 ro",
        rb"39 35 98:3 / /mnt/fake rw - tmpfs castore:/var/x rw",
        b"40 35 98:4 / /mnt/\xff\r rw - tmpfs  rw",
        b"",
    ]
)


def test_lines() -> None:
    mounts = parse_mountinfo(LINES)
    assert mounts[1] == Mount(36, Path("/mnt/a b\\c\td"), "fuse.castore", Path("/var/a b,c"), False)
    assert [mount.mount_id for mount in mounts] == [22, 36, 37, 38, 39, 40]
    assert [mount.read_only for mount in mounts] == [False, False, True, True, False, False]
    state_dirs = [None, Path("/var/a b,c"), Path("/var/x"), Path("/var/caf\xe9%"), None, None]
    assert [mount.state_dir for mount in mounts] == state_dirs
    assert os.fsencode(mounts[5].mountpoint) == b"/mnt/\xff\r"


@pytest.mark.parametrize("name", [b"/plain dir,\\#", b"/caf\xc3\xa9", b"/100%41", b"/\xff\t\n"])
def test_sources(name: bytes) -> None:
    """What a mount names as its source is plain ASCII and comes back as the state directory."""
    state_dir = Path(os.fsdecode(name))
    source = mount_source(state_dir)
    assert re.fullmatch(r"castore:[ -~]+", source)
    escaped = re.sub(r"[ \\#]", lambda match: f"\\{ord(match[0]):03o}", source)
    (mount,) = parse_mountinfo(f"1 2 0:3 / /mnt rw - fuse.castore {escaped} rw\n".encode())
    assert mount.state_dir == state_dir


def test_here() -> None:
    there = mount_at(Path("/proc"))
    assert there is not None
    assert there.fs_type == "proc"
    assert there in read_mounts()
    assert mount_at(Path("/proc/self")) is None


def test_resolving(tmp_path: Path) -> None:
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "far").symlink_to(tmp_path / "link/inner")
    (tmp_path / "loop").symlink_to("loop")
    inner = tmp_path / "real/inner"
    for path in ("real/inner", "link/inner", "far", "real/inner/", "real/../link/inner/."):
        assert resolve_mountpoint(tmp_path / path) == inner
        assert resolve_mountpoint(Path(os.path.relpath(tmp_path)) / path) == inner
    assert resolve_mountpoint(tmp_path / "missing") == tmp_path / "missing"
    assert resolve_mountpoint(tmp_path / "loop") == tmp_path / "loop"
    assert resolve_mountpoint(Path("/")) == Path("/")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system mounted over another one."""
    path = tmp_path / "mnt"
    path.mkdir()
    for _ in range(2):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    yield path
    while mount_at(path) is not None:
        subprocess.run(["umount", path], check=True)


def test_the_topmost_mount_and_its_end(mounted: Path) -> None:
    top = mount_at(mounted)
    assert top is not None
    assert [mount.mount_id for mount in read_mounts() if mount.mountpoint == mounted][-1] == top.mount_id
    with pytest.raises(DeadlineExceeded, match=r"mnt is still mounted after 0\.05 seconds"):
        wait_unmounted(top, 0.05)
    waits = threading.Event()
    ended: list[float] = []

    def wait() -> None:
        waits.set()
        wait_unmounted(top, 60)
        ended.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    waits.wait()
    subprocess.run(["umount", mounted], check=True)
    begin = time.monotonic()
    thread.join(60)
    # It is told by the kernel and does not wait for the deadline; the mount below is another one.
    assert ended
    assert ended[0] - begin < 10
    below = mount_at(mounted)
    assert below is not None
    assert below.mount_id != top.mount_id
