"""A real S3 server that is stopped with SIGSTOP, under a real mount with its real deadlines."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from castore.storage.retry import LAST_TRY_S
from mount.guard import HANDLER_SECONDS
from tests.mount.store import MountedStore, wait_until
from tests.mount.test_deadlines import at_once, in_thread
from tests.places import Place
from tests.servers.seaweedfs import SeaweedFS

ONE_BLOCK = 100_000

on_s3 = pytest.mark.parametrize("place", ["s3"], indirect=True)


@pytest.fixture
def stop(s3_server: SeaweedFS) -> Iterator[Callable[[], None]]:
    """Call it to let the server hang until it is resumed, at the test's end at the latest."""
    yield s3_server.pause
    s3_server.resume()


def published(store: MountedStore, *names: str) -> tuple[Path, dict[str, bytes]]:
    """A package of such files, each of one block, which no cache has; and their bytes."""
    data = {name: os.urandom(ONE_BLOCK) for name in names}
    box = store.ingest("outage/1")
    for name, content in data.items():
        (box / name).write_bytes(content)
    package = store.publish("outage/1")
    store.umount()
    shutil.rmtree(store.root / "cache", ignore_errors=True)
    store.mount()
    return package, data


@on_s3
def test_the_only_location_hangs(
    make_store: Callable[..., MountedStore], place: Place, s3_server: SeaweedFS, stop: Callable[[], None]
) -> None:
    store = make_store(place=place)
    store.mount()
    package, data = published(store, "cold", "cold too", "warm")
    assert (package / "warm").read_bytes() == data["warm"]
    stop()
    started = time.monotonic()
    reads = [in_thread((package / name).read_bytes) for name in ("cold", "cold too")]
    with at_once():
        assert (package / "warm").read_bytes() == data["warm"]
        assert sorted(os.listdir(package)) == sorted(data)
        (store.ingest("outage/2") / "a").write_bytes(b"staged")
    for thread, answers in reads:
        thread.join(HANDLER_SECONDS)
        assert answers == [errno.ETIMEDOUT]
    assert LAST_TRY_S - 1 <= time.monotonic() - started < HANDLER_SECONDS
    s3_server.resume()
    for name in ("cold", "cold too"):
        wait_until(lambda name=name: in_thread_now((package / name).read_bytes) == data[name], "it reads again")  # type: ignore[misc]
    assert (store.publish("outage/2") / "a").read_bytes() == b"staged"


def in_thread_now(work: Callable[[], object]) -> object:
    """What it gives, or the errno that it raises."""
    thread, answers = in_thread(work)
    thread.join(HANDLER_SECONDS)
    return answers[0]


@on_s3
def test_another_location_serves(
    make_store: Callable[..., MountedStore],
    place: Place,
    s3_server: SeaweedFS,
    stop: Callable[[], None],
) -> None:
    """After two seconds, once: later reads do not ask the server that hangs."""
    store = make_store(place=place)
    second = f'[backends.second]\ntype = "local"\npath = "{store.root}/second"\n'
    rule = '[[routing.rules]]\nretention_class = "*"\nbackend = "main"\ncopies = ["second"]\n'
    text = store.config.read_text().replace("[routing]", f"{second}[routing]").replace("[http]", f"{rule}[http]")
    store.config.write_text(text.replace("[cache]\n", "[cache]\nprefetch_siblings = false\n"))
    store.castore("init")
    store.mount()
    package, data = published(store, "a", "b", "c", "d")
    stop()
    gets = [store.status()["reads"]["gets"]]
    for name in ("a", "b", "c"):
        assert in_thread_now((package / name).read_bytes) == data[name]
        gets.append(store.status()["reads"]["gets"])
    assert [after - before for before, after in pairwise(gets)] == [2, 1, 1]
    s3_server.resume()
    assert (package / "d").read_bytes() == data["d"]
