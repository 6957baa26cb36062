"""`castore mount --follow`: what one host publishes, others show. A real litestream, a real server, real mounts."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.mount.following import (
    age_check,
    at,
    children_of,
    environment,
    followed,
    make_follower,
    newest,
    publish,
    replica_url,
    replicating,
)
from tests.mount.store import MountedStore, fails, wait_until
from tests.places import S3Place
from tests.servers.relay import Relay
from tests.servers.seaweedfs import SeaweedFS

SECONDS: Final = 20.0
"""Within which what is published is seen elsewhere: it takes two to three, on a busy host more."""


@pytest.fixture(scope="module")
def url(s3_server: SeaweedFS) -> str:
    return replica_url(s3_server)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory, s3_server: SeaweedFS, url: str) -> Iterator[MountedStore]:
    """A host that publishes, with one package, and whose catalog is replicated; for all tests of the file."""
    root = tmp_path_factory.mktemp("writer")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(s3_server).items():
            patch.setenv(name, value)
        # The program's library of HTTP does not take it.
        patch.delenv("AWS_CA_BUNDLE", raising=False)
        store = MountedStore(root, place=S3Place(root, s3_server, None))
        try:
            store.mount()
            publish(store, "zlib/1.0", {"lib/libz.so": b"one" * 100_000, "README": b"read me"})
            with replicating(store, url):
                wait_until(lambda: newest(url), "the replica is there")
                yield store
        finally:
            store.close()
        assert "Traceback" not in store.log()


@pytest.fixture
def follower(make_store: Callable[..., MountedStore], writer: MountedStore, url: str) -> MountedStore:
    """A host that follows it, mounted."""
    store = make_follower(make_store, writer)
    store.mount("--follow", url)
    return store


def seen(store: MountedStore, ref: str) -> Path:
    """A package of another host, once it is there."""
    path = store.package(ref)
    wait_until(path.exists, f"{ref} is seen", seconds=SECONDS)
    return path


def test_what_is_published_is_seen_elsewhere_within_seconds(writer: MountedStore, follower: MountedStore) -> None:
    old = seen(follower, "zlib/1.0")
    assert (old / "lib/libz.so").read_bytes() == b"one" * 100_000
    assert sorted(os.listdir(follower.mnt)) == [".castore", "by-digest", "packages"]
    with open(old / "README", "rb") as held:
        publish(writer, "zlib/1.1", {"README": b"read me again"})
        new = seen(follower, "zlib/1.1")
        assert (new / "README").read_bytes() == b"read me again"
        assert held.read() == b"read me"
    for ref, name in (("zlib/1.0", "lib/libz.so"), ("zlib/1.1", "README")):
        here, there = (store.package(ref) / name for store in (follower, writer))
        assert here.stat().st_ino == there.stat().st_ino
    wait_until(lambda: (follower.mnt / "packages/zlib/latest").readlink() == Path("1.1"), "latest moves")
    writer.castore("package", "delete", "zlib/1.1", "--yes")
    wait_until(lambda: not new.exists(), "what is deleted there is gone here", seconds=SECONDS)
    with fails(errno.EROFS):
        (follower.mnt / "packages/other").mkdir()


def test_a_package_is_never_seen_before_its_objects(writer: MountedStore, follower: MountedStore) -> None:
    """Each is read as a whole in the moment in which it is seen, with nothing cached; publishes go on meanwhile."""
    refs = [f"stream/{number}" for number in range(25)]
    contents = {ref: {f"{name}": os.urandom(3000 + 100_000 * (name % 2)) for name in range(4)} for ref in refs}

    def publish_all() -> None:
        for ref in refs:
            publish(writer, ref, contents[ref])

    publishing = threading.Thread(target=publish_all)
    publishing.start()
    try:
        left = dict(contents)

        def read_what_is_there() -> bool:
            folder = follower.mnt / "packages/stream"
            for version in os.listdir(folder) if folder.exists() else []:
                files = left.pop(f"stream/{version}", None) if version != "latest" else None
                if files is not None:
                    root = folder / version
                    assert {path.name: path.read_bytes() for path in root.iterdir()} == files
            return not left

        wait_until(read_what_is_there, "all are seen")
    finally:
        publishing.join()
    health = json.loads((follower.mnt / ".castore/health.json").read_text())
    assert health["checks"]["catalog:followedAge"][0]["status"] == "pass"
    assert health["checks"]["locations:failed"][0]["observedValue"] == 0


def test_it_tells_how_old_it_is(writer: MountedStore, follower: MountedStore, url: str) -> None:
    wait_until(lambda: followed(follower)["transaction"] == newest(url), "all is taken")
    check = age_check(follower)
    assert (check["status"], check["observedUnit"]) == ("pass", "seconds")
    status = follower.status()
    assert status["read_only"] is True
    assert followed(follower)["url"] == url.partition("?")[0]
    with urllib.request.urlopen(f"{status['http_url']}/metrics") as answer:
        assert "castore_followed_catalog_age_seconds " in answer.read().decode()
    transaction = followed(follower)["transaction"]
    for write in (["package", "delete", "zlib/1.0", "--yes"], ["init"], ["mount", "/mnt"]):
        done = follower.run(*write)
        assert done.returncode == 2, done
        [line] = [line for line in done.stderr.splitlines() if "error" in line]
        assert "follows" in line
    assert "zlib/1.0" in follower.castore("package", "list")
    assert follower.run("mount", str(follower.root / "mnt2"), "--follow", url).returncode == 2
    assert followed(follower)["transaction"] == transaction
    assert "secret" not in follower.log()


def test_without_the_writer_and_without_the_network(
    make_store: Callable[..., MountedStore], writer: MountedStore, url: str, s3_server: SeaweedFS
) -> None:
    port = int(s3_server.endpoint_url.rpartition(":")[2])
    with Relay(port) as link:
        address = f"http://127.0.0.1:{link.port}"
        follower = make_follower(make_store, writer)
        text = follower.config.read_text().replace(s3_server.endpoint_url, address)
        follower.config.write_text(text)
        follower.mount("--follow", at(url, address))
        old = seen(follower, "zlib/1.0")
        assert (old / "README").read_bytes() == b"read me"
        link.cut()
        publish(writer, "outage/1", {"README": b"read me again"})
        wait_until(lambda: newest(url) > followed(follower)["transaction"], "the replica has it")
        # What is cached goes on, and all names.
        assert (old / "README").read_bytes() == b"read me"
        assert sorted(os.listdir(old)) == ["README", "lib"]
        assert not follower.package("outage/1").exists()
        # A start without the network goes on with what was there, too.
        follower.umount()
        follower.mount("--follow", at(url, address))
        assert (old / "README").read_bytes() == b"read me"
        link.restore()
        assert (seen(follower, "outage/1") / "README").read_bytes() == b"read me again"
        wait_until(lambda: not followed(follower)["error"], "all is well again")
        writer.kill()
        assert (follower.package("outage/1") / "README").read_bytes() == b"read me again"
        assert (old / "lib/libz.so").read_bytes() == b"one" * 100_000
        writer.mount()


def test_the_program_that_ends_is_started_again(writer: MountedStore, follower: MountedStore, url: str) -> None:
    [first] = litestream_of(follower)
    os.kill(first, signal.SIGKILL)
    publish(writer, "again/1", {"README": b"read me again"})
    assert (seen(follower, "again/1") / "README").read_bytes() == b"read me again"
    [second] = litestream_of(follower)
    assert second != first
    # And never outlives its daemon.
    descriptor = os.pidfd_open(second)
    follower.kill()
    wait_until(lambda: select.select([descriptor], [], [], 0)[0], "it ends with the daemon")
    os.close(descriptor)
    follower.mount("--follow", url)
    assert (follower.package("again/1") / "README").read_bytes() == b"read me again"


def test_keys_of_the_settings(
    make_store: Callable[..., MountedStore],
    writer: MountedStore,
    url: str,
    s3_server: SeaweedFS,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Those of the environment are others, and not used; one that is changed counts when the program starts anew."""
    secret = tmp_path / "secret"
    secret.write_text(f"{s3_server.secret_key}\n")
    follower = make_follower(make_store, writer)
    references = f'access_key_ref = "env:REPLICA_KEY"\nsecret_key_ref = "file:{secret}"\n'
    follower.config.write_text(f"{follower.config.read_text()}\n[follow]\n{references}")
    for prefix in ("AWS", "LITESTREAM"):
        monkeypatch.setenv(f"{prefix}_ACCESS_KEY_ID", "another")
        monkeypatch.setenv(f"{prefix}_SECRET_ACCESS_KEY", "another secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another token")
    done = follower.run("mount", str(follower.mnt), "--background", "--follow", url)
    assert done.returncode == 2
    assert "follow.access_key_ref: cannot resolve env:REPLICA_KEY" in done.stderr
    monkeypatch.setenv("REPLICA_KEY", s3_server.access_key)
    follower.mount("--follow", url)
    assert (seen(follower, "zlib/1.0") / "README").read_bytes() == b"read me"
    secret.rename(tmp_path / "away")
    [first] = litestream_of(follower)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: "cannot resolve file:" in followed(follower)["error"], "it says that the key is gone")
    assert (follower.package("zlib/1.0") / "README").read_bytes() == b"read me"
    (tmp_path / "away").rename(secret)
    publish(writer, "keys/1", {"README": b"read me again"})
    seen(follower, "keys/1")
    wait_until(lambda: not followed(follower)["error"], "all is well again")
    assert s3_server.secret_key not in follower.log()


def litestream_of(store: MountedStore) -> list[int]:
    """The processes that follow for a daemon."""
    return [pid for pid in children_of(store.pid) if b"-follow-interval" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_follower_that_lags_behind_a_collection_shows_no_wrong_byte(
    make_store: Callable[..., MountedStore], writer: MountedStore, url: str, s3_server: SeaweedFS
) -> None:
    with Relay(int(s3_server.endpoint_url.rpartition(":")[2])) as link:
        follower = make_follower(make_store, writer)
        follower.mount("--follow", at(url, f"http://127.0.0.1:{link.port}"))
        publish(writer, "short/1", {"README": b"shortly", "large": os.urandom(500_000)})
        old = seen(follower, "short/1")
        assert (old / "README").read_bytes() == b"shortly"
        link.cut()  # of the replica alone: the objects can be reached
        writer.castore("package", "delete", "short/1", "--yes")
        writer.castore("storage", "gc", "--yes", "--grace", "0s")
        assert (old / "README").read_bytes() == b"shortly"  # cached, and checked
        with fails(errno.EIO):
            (old / "large").read_bytes()
        link.restore()
        wait_until(lambda: not old.exists(), "it is gone here, too", seconds=SECONDS)
