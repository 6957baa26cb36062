"""`castore cache`: show, warm and clear, on a real store, with and without a daemon."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mount.store import MountedStore

MIB = 1024 * 1024
FILES = {"a/large": 20 * MIB + 17, "a/small": 100, "a/b/deep": 5000, "empty": 0, "z": 300_000}
TOTAL = sum(FILES.values())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A store with the package `lib/1`, whose files all differ but for a link; not mounted."""
    store = MountedStore(tmp_path_factory.mktemp("store"))
    try:
        store.mount()
        box = store.ingest("lib/1")
        for name, size in FILES.items():
            (box / name).parent.mkdir(parents=True, exist_ok=True)
            (box / name).write_bytes(os.urandom(size))
        (box / "copy").write_bytes((box / "z").read_bytes())
        (box / "link").symlink_to("z")
        store.publish("lib/1")
        store.umount()
        yield store
    finally:
        store.close()


@pytest.fixture
def store(published: MountedStore) -> Iterator[MountedStore]:
    """The same, with an empty cache; the configuration is as before in the end."""
    text = published.config.read_text()
    published.castore("cache", "clear")
    shutil.rmtree(published.root / "cache", ignore_errors=True)  # the mount made the folder
    yield published
    published.config.write_text(text)


def bound(store: MountedStore, size: object) -> None:
    text = store.config.read_text()
    store.config.write_text(text.replace("[cache]\n", f"[cache]\nmax_bytes = {size}\n"))


def warm(store: MountedStore, *arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(store.castore("cache", "warm", "lib/latest", "--json", *arguments))
    return document


def show(store: MountedStore) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(store.castore("cache", "show", "--json"))
    return document


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    assert done.stdout == ""
    return done.stderr.splitlines()[-1].removeprefix("castore: error: ")


def test_an_empty_cache_is_shown_and_not_made(store: MountedStore) -> None:
    shown = show(store)
    assert shown == {
        "dir": str(store.root / "cache"),
        "max_bytes": 20 * 2**30,
        "used_bytes": 0,
        "file_count": 0,
        "oldest_use_ns": 0,
        "tiny_bytes": 8192,
        "tiny_used_bytes": shown["tiny_used_bytes"],
        "tiny_max_bytes": 2**30,
        "not_kept_backend_ids": ["local"],
    }
    assert not (store.root / "cache").exists()
    assert store.castore("cache", "clear") == "removed 0 files, 0 B, and 0 small blobs\n"
    assert not (store.root / "cache").exists()


def test_a_warm_package_is_read_without_its_backend(store: MountedStore) -> None:
    document = warm(store)
    assert document.pop("seconds") >= 0
    assert document == {
        "ref": "lib/1",
        "blob_count": 4,
        "size_bytes": TOTAL,
        "fetched_bytes": TOTAL,
        "unreadable": [],
    }
    shown = show(store)
    assert shown["file_count"] == 4  # three segments of the large one; small blobs are in no file
    assert TOTAL - 5100 < shown["used_bytes"] < TOTAL + MIB
    assert shown["tiny_used_bytes"] > 5100
    assert shown["not_kept_backend_ids"] == ["local"]
    away = store.objects.with_name("away")
    store.objects.rename(away)
    try:
        store.mount()
        for name, size in FILES.items():
            assert len((store.package("lib/1") / name).read_bytes()) == size
        store.umount()
    finally:
        away.rename(store.objects)


def test_only_what_is_missing_is_fetched(store: MountedStore) -> None:
    assert warm(store, "--path", "a/small")["fetched_bytes"] == 100
    assert warm(store, "--path", "a")["fetched_bytes"] == FILES["a/large"] + 5000
    assert warm(store)["fetched_bytes"] == 300_000
    assert warm(store)["fetched_bytes"] == 0


def test_a_damaged_cache_is_mended(store: MountedStore) -> None:
    warm(store)
    file = max((store.root / "cache").rglob("*.8388608"))
    with file.open("r+b") as stream:
        stream.seek(200_000)
        stream.write(b"damage")
    assert warm(store)["fetched_bytes"] == 128 * 1024
    assert warm(store)["fetched_bytes"] == 0


def test_what_does_not_fit_is_said_before_anything_is_fetched(store: MountedStore) -> None:
    bound(store, 10 * MIB)
    message = refused(store.run("cache", "warm", "lib/1"))
    assert message.startswith("lib/1 takes 20.3 MiB, and the cache in ")
    assert message.endswith(" keeps 9.0 MiB: raise cache.max_bytes, make room on its disk, or warm a part with --path")
    assert show(store)["file_count"] == 0
    assert warm(store, "--path", "z")["fetched_bytes"] == 300_000


def test_room_is_made_for_what_fits(store: MountedStore) -> None:
    bound(store, 24 * MIB)
    warm(store, "--path", "z")
    os.utime(next(path for path in (store.root / "cache").rglob("*.0")), (1, 1))
    warm(store, "--path", "a")
    assert show(store)["used_bytes"] <= 24 * MIB


def test_without_a_bound_there_is_nothing_to_warm(store: MountedStore) -> None:
    bound(store, 0)
    assert refused(store.run("cache", "warm", "lib/1")).startswith("cache.max_bytes = 0: nothing is cached")
    assert "nothing is cached" in store.castore("cache", "show")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lib/2",), "lib/2: no such package is published"),
        (("lib",), "'lib' is not a package reference"),
        (("lib/1", "--path", "absent"), "lib/1: no file or directory 'absent' in it"),
        (("lib/1", "--path", "z/more"), "lib/1: no file or directory 'z/more' in it"),
        (("lib/1", "--path", "link"), "lib/1: no file or directory 'link' in it"),
        (("lib/1", "--path", "../.."), "lib/1: no file or directory '../..' in it"),
    ],
)
def test_what_cannot_be_warmed_is_named(store: MountedStore, arguments: tuple[str, ...], message: str) -> None:
    assert refused(store.run("cache", "warm", *arguments)).startswith(message)


def test_files_without_good_bytes_are_named(store: MountedStore, published: MountedStore) -> None:
    objects = {path.stat().st_size: path for path in (published.objects / "sha256").rglob("*") if path.is_file()}
    hidden = objects[5000].with_name("hidden")
    objects[5000].rename(hidden)
    try:
        done = store.run("cache", "warm", "lib/1")
        assert done.returncode == 1
        assert done.stdout.splitlines()[0] == "unreadable: a/b/deep"
        assert "are cached" in done.stdout.splitlines()[1]
    finally:
        hidden.rename(objects[5000])
    assert warm(store)["fetched_bytes"] == 5000


def test_a_backend_that_is_away_ends_it(store: MountedStore) -> None:
    away = store.objects.with_name("away")
    store.objects.rename(away)
    try:
        assert "castore init" in refused(store.run("cache", "warm", "lib/1"))
    finally:
        away.rename(store.objects)


def test_progress_says_how_long_it_takes(store: MountedStore) -> None:
    done = store.run("cache", "warm", "lib/1")
    assert done.returncode == 0
    assert re.match(r"warming lib/1: .* of 20.3 MiB, \d of 4 blobs", done.stderr)
    assert done.stdout.startswith("lib/1: 20.3 MiB of 20.3 MiB are cached, 20.3 MiB of that fetched in ")


def test_clear_leaves_what_it_did_not_make(store: MountedStore) -> None:
    warm(store)
    note = store.root / "cache/blocks/note"
    note.write_text("mine")
    document = json.loads(store.castore("cache", "clear", "--json"))
    assert (document["removed_file_count"], document["removed_small_blob_count"]) == (4, 2)
    assert [path for path in (store.root / "cache/blocks").rglob("*") if path.is_file()] == [note]
    assert show(store)["file_count"] == 0


def test_a_folder_that_cannot_be_used(store: MountedStore) -> None:
    Path(store.root / "cache").write_text("a file")
    try:
        assert "cache.dir" in refused(store.run("cache", "warm", "lib/1"))
        assert store.run("cache", "show").returncode == 2
    finally:
        (store.root / "cache").unlink()
