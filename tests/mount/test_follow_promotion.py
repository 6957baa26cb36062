"""The writer's host is lost: another one takes its place by the steps of docs/OPERATOR.md, and followers go on."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from castore.replica.litestream import find_program
from tests.mount.following import (
    environment,
    followed,
    make_follower,
    newest,
    publish,
    replica_url,
    replicating,
)
from tests.mount.store import MountedStore, fails, run_tool, wait_until
from tests.places import S3Place
from tests.servers.seaweedfs import SeaweedFS

OPERATOR: Final = Path(__file__).parents[2] / "docs/OPERATOR.md"


def steps(beginning: str) -> list[str]:
    """The commands of the block of docs/OPERATOR.md that begins so."""
    [block] = re.findall(rf"^```\n({re.escape(beginning)}.*?)^```$", OPERATOR.read_text(), re.MULTILINE | re.DOTALL)
    return [line.partition("  #")[0].strip() for line in block.splitlines()]


def follow_steps(store: MountedStore, beginning: str, url: str) -> list[str]:
    """Run them on a host, but for systemd's. Returns those that were run."""
    run = [line for line in steps(beginning) if not line.startswith("systemctl")]
    for line in run:
        words = [{"STATE_DIR": str(store.state), "URL": url, "rgw": "main"}.get(word, word) for word in line.split()]
        words = [word.replace("STATE_DIR", str(store.state)) for word in words]
        words = [re.sub("^/mnt/(store|castore)$", str(store.mnt), word) for word in words]
        if words[:2] == ["castore", "mount"]:
            store.mount()
        elif words[0] == "castore":
            store.castore(*words[1:])
        else:
            run_tool(find_program() if words[0] == "litestream" else words[0], *words[1:])
    return run


def lose(host: MountedStore) -> None:
    """Daemon, state and cache are gone."""
    host.kill()
    host.close()
    shutil.rmtree(host.state)
    shutil.rmtree(host.root / "cache", ignore_errors=True)


def test_a_lost_writer_is_replaced_twice(
    make_store: Callable[..., MountedStore],
    s3_server: SeaweedFS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First by a follower, to the same replica: others go on as they are mounted. Then by a host that restores the
    replica, to a new one: others are mounted again with that.
    """
    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    url, second_url = replica_url(s3_server), replica_url(s3_server)
    first = make_store(place=S3Place(tmp_path, s3_server, None))
    first.mount()
    publish(first, "zlib/1.0", {"README": b"read me"})
    with replicating(first, url):
        wait_until(lambda: newest(url), "the replica is there")
        heir, other = make_follower(make_store, first), make_follower(make_store, first)
        for host in (heir, other):
            host.mount("--follow", url)
        publish(first, "zlib/1.1", {"README": b"read me again"})
        for host in (heir, other):
            wait_until(host.package("zlib/1.1").exists, "it is seen")
    publish(first, "late/1", {"README": b"never replicated"})
    lose(first)

    run = follow_steps(heir, "castore umount /mnt/store", url)
    assert len(run) == 6
    assert (heir.package("late/1") / "README").read_bytes() == b"never replicated"
    publish(heir, "zlib/1.2", {"README": b"by the heir"})
    with open(other.package("zlib/1.1") / "README", "rb") as held, replicating(heir, url):
        inode = other.package("zlib/1.0").stat().st_ino
        for ref, data in (("zlib/1.2", b"by the heir"), ("late/1", b"never replicated")):
            wait_until(other.package(ref).exists, f"{ref} is seen")
            assert (other.package(ref) / "README").read_bytes() == data
        assert held.read() == b"read me again"
        assert other.package("zlib/1.0").stat().st_ino == inode == heir.package("zlib/1.0").stat().st_ino
        publish(heir, "zlib/1.3", {"README": b"replicated"})
        wait_until(other.package("zlib/1.3").exists, "it is seen")
        assert followed(other)["error"] == ""
        heir.castore("package", "tag", "zlib", "stable", "1.0")
        wait_until((other.mnt / "packages/zlib/stable").is_symlink, "the tag is seen")
    lose(heir)

    third = make_follower(make_store, other)
    run = follow_steps(third, "install -d -m 700 STATE_DIR", url)
    assert len(run) == 6
    assert (third.mnt / "packages/zlib/stable").readlink() == Path("1.0")
    publish(third, "zlib/1.4", {"README": b"by the third"})
    with replicating(third, second_url):
        wait_until(lambda: newest(second_url), "the new replica is there")
        other.umount()
        other.mount("--follow", second_url)
        assert (other.package("zlib/1.4") / "README").read_bytes() == b"by the third"
        publish(third, "zlib/1.5", {"README": b"by the third, too"})
        wait_until(other.package("zlib/1.5").exists, "it is seen")
        assert (other.package("zlib/1.5") / "README").read_bytes() == b"by the third, too"
        with fails(errno.EROFS):
            (other.mnt / "packages/own").mkdir()
    third.castore("storage", "verify")
