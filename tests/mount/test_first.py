"""The main job in one test: copy in, publish, read back, unmount, mount again."""

from __future__ import annotations

import os
import subprocess

from tests.mount.store import MountedStore


def test_copy_publish_read_remount(store: MountedStore) -> None:
    box = store.ingest("demo/1.0")
    (box / "sub").mkdir()
    (box / "sub/hello.txt").write_text("hello\n")
    (box / "big.bin").write_bytes(os.urandom(3_000_000))
    big = (box / "big.bin").read_bytes()
    package = store.publish("demo/1.0")
    assert not box.exists()
    assert (package / "sub/hello.txt").read_text() == "hello\n"
    assert (package / "big.bin").read_bytes() == big
    assert (store.mnt / "packages/demo/latest").readlink().name == "1.0"
    store.umount()
    store.mount()
    assert (package / "big.bin").read_bytes() == big
    subprocess.run(["diff", "-r", package, store.mnt / "packages/demo/latest/"], check=True)
