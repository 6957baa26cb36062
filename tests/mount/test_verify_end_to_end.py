"""The whole way on a real mount: in, published, read back, damaged, found, told, mended. Alike for every backend."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from castore.config import load_config
from castore.digest import Digest
from tests.damage import DAMAGES, flip_a_bit, remove
from tests.event_schemas import check_event
from tests.mount.store import WAIT_SECONDS, MountedStore, fails, run_tool, wait_until
from tests.mount.trees import make_tree, snapshot
from tests.places import EVERY_PLACE, PLACES, Place

LOCATION_VERIFIED = "v1.storage.location_verified"
LOCATION_FAILED = "v1.storage.location_failed"
LOCATION_STORED = "v1.storage.location_stored"
everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
RSS_KIB = 120 * 1024
"""What an idle daemon may take, its HTTP API in use."""


@pytest.fixture
def store(make_store: Callable[..., MountedStore], place: Place) -> MountedStore:
    """A mounted store with one backend of the type under test."""
    made = make_store(place=place)
    made.mount()
    return made


def get(url: str) -> tuple[int, Any]:
    """Status and document."""
    try:
        with urllib.request.urlopen(url, timeout=WAIT_SECONDS) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


def health(store: MountedStore) -> dict[str, Any]:
    """What the mount says of its health, the same over HTTP."""
    document: dict[str, Any] = json.loads((store.mnt / ".castore/health.json").read_text())
    return document


def digest_of(path: Path) -> Digest:
    return Digest.parse(os.getxattr(path, "user.castore.digest").decode())


def damage(store: MountedStore, kind: Callable[..., Any], digest: Digest) -> None:
    kind(load_config(store.config).backends["main"], digest)


def verify(store: MountedStore, code: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`castore storage verify --json` with the exit code it must have: the locations, and the summary."""
    done = store.run("storage", "verify", "--json")
    assert done.returncode == code, done.stdout + done.stderr
    *locations, summary = map(json.loads, done.stdout.splitlines())
    return locations, summary


def events(store: MountedStore) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in store.castore("events", "--json").splitlines()]
    for event in found:
        check_event(event)
    return found


@pytest.mark.parametrize("place", EVERY_PLACE, indirect=True)
def test_from_copying_in_to_mending(store: MountedStore, tmp_path: Path) -> None:
    # In, published, read back after a restart.
    source = tmp_path / "source"
    source.mkdir()
    make_tree(source)
    box = store.ingest("tools/1.0")
    run_tool("cp", "-a", f"{source}/.", box)
    package = store.publish("tools/1.0")
    store.umount()
    shutil.rmtree(store.root / "cache", ignore_errors=True)
    store.mount()
    expected = {path: item.content for path, item in snapshot(source).items()}
    assert {path: item.content for path, item in snapshot(package).items()} == expected
    assert health(store)["status"] == "pass"
    *stored, published = events(store)
    assert published["type"] == "v1.package.published"
    assert {event["type"] for event in stored} == {LOCATION_STORED}

    # All is well, and known to be.
    locations, summary = verify(store, 0)
    assert summary["verified"] == summary["location_count"] == len(locations)
    verified = events(store)[len(stored) + 1 :]
    assert {(event["type"], event["data"]["status"]) for event in verified} == {(LOCATION_VERIFIED, "verified")}
    assert len(verified) == len(locations)
    subjects = sorted(event["subject"] for event in stored)
    assert subjects == sorted(event["subject"] for event in verified), "each location was told to be stored, once"
    assert os.getxattr(package / "bin/tool", "user.castore.status") == b"verified"

    # One object is damaged: found, named, and nothing else is.
    victim = digest_of(package / "share/3000000")
    damage(store, flip_a_bit, victim)
    locations, summary = verify(store, 1)
    (failed,) = [location for location in locations if location["status"] != "verified"]
    assert (failed["digest"], failed["reason"]) == (str(victim), "digest_mismatch")
    assert failed["packages"] == ["tools/1.0"]
    assert {use["path"] for use in failed["paths"]} == {"share/3000000", "lib/big"}
    assert os.getxattr(package / "lib/big", "user.castore.status") == b"failed"
    (event,) = [event for event in events(store) if event["data"].get("status") == "failed"]
    assert (event["type"], event["subject"], event["data"]["backend_id"]) == (LOCATION_VERIFIED, str(victim), "main")
    made = wait_until(lambda: (found := health(store))["status"] == "fail" and found, "the health fails")
    (check,) = made["checks"]["blobs:unreadable"]
    assert (check["observedValue"], check["packages"]) == (1, ["tools/1.0"])
    assert get(f"{store.status()['http_url']}/health")[0] == 503
    assert store.run("status").returncode == 1

    # The same bytes come in once more: they are put anew, and all is well again.
    (store.ingest("again/1") / "big").write_bytes((source / "share/3000000").read_bytes())
    store.publish("again/1")
    wait_until(lambda: health(store)["status"] == "pass", "the health is good again")
    _, summary = verify(store, 0)
    assert summary["verified"] == summary["location_count"]
    assert (package / "lib/big").read_bytes() == (source / "share/3000000").read_bytes()


@everywhere
@pytest.mark.parametrize("kind", DAMAGES)
def test_each_kind_of_damage(store: MountedStore, kind: str) -> None:
    break_it, reason = DAMAGES[kind]
    box = store.ingest("demo/1")
    for number in range(20):
        (box / f"file {number}").write_bytes(b"%d" % number * 10_000)
    victim = digest_of(store.publish("demo/1") / "file 7")
    damage(store, break_it, victim)
    locations, summary = verify(store, 1)
    (failed,) = [location for location in locations if location["status"] != "verified"]
    assert (failed["digest"], failed["status"], failed["reason"]) == (str(victim), "failed", reason)
    assert failed["paths"] == [{"package": "demo/1", "path": "file 7"}]
    assert (summary["failed"], summary["verified"]) == (1, 20)
    # Found once more, and nothing else.
    _, summary = verify(store, 1)
    assert (summary["failed"], summary["verified"]) == (1, 20)


@everywhere
def test_a_read_that_meets_damage_says_so(store: MountedStore) -> None:
    data = os.urandom(300_000)
    (store.ingest("demo/1") / "a").write_bytes(data)
    path = store.publish("demo/1") / "a"
    store.umount()
    store.mount()
    damage(store, remove, digest_of(path))
    with fails(errno.EIO):
        path.read_bytes()
    assert [event for event in events(store) if event["type"] == LOCATION_VERIFIED] == [], "nothing was re-read whole"
    (event,) = [event for event in events(store) if event["type"] == LOCATION_FAILED]
    assert event["data"] == {
        "backend_id": "main",
        "digest": str(digest_of(path)),
        "size_bytes": len(data),
        "reason": "missing",
        "packages": ["demo/1"],
    }
    assert health(store)["checks"]["blobs:unreadable"][0]["packages"] == ["demo/1"]


@everywhere
def test_an_unreachable_backend_fails_no_location(store: MountedStore, place: Place) -> None:
    (store.ingest("demo/1") / "a").write_bytes(b"a")
    package = store.publish("demo/1")
    with place.unreachable("main"):
        done = store.run("storage", "verify")
        assert done.returncode == 2
        assert "backend main is given up" in done.stderr
        wait_until(lambda: health(store)["status"] == "fail", "the health fails")
    assert os.getxattr(package / "a", "user.castore.status") == b"stored"
    wait_until(lambda: health(store)["status"] == "pass", "the health is good again")


def test_the_documents_of_the_mount(store: MountedStore) -> None:
    assert sorted(path.name for path in (store.mnt / ".castore").iterdir()) == ["health.json", "status.json"]
    url = store.status()["http_url"]
    by_http, by_file = get(f"{url}/health")[1], health(store)
    assert by_http["checks"].keys() == by_file["checks"].keys() >= {"staging:utilization", "queue:failed"}
    assert by_http["serviceId"] == by_file["serviceId"]
    assert get(f"{url}/livez") == get(f"{url}/readyz") == (200, {"status": "pass"})
    (store.ingest("demo/1") / "a").write_bytes(b"a")
    store.publish("demo/1")
    assert [event["subject"] for event in get(f"{url}/v1/events?type=v1.package.published")[1]] == ["demo/1"]
    with fails(errno.EROFS):
        (store.mnt / ".castore/health.json").write_text("")


def test_a_port_that_is_taken_does_not_prevent_mounting(make_store: Callable[..., MountedStore]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        store = make_store(port=port)
        store.mount()
        (store.ingest("demo/1") / "a").write_bytes(b"a")
        store.publish("demo/1")
        assert store.status()["http_url"] == ""
        made = health(store)
    line = f"http.listen: cannot listen at 127.0.0.1:{port}: Address already in use"
    assert made["status"] == "warn"
    assert [check["output"] for check in made["checks"]["service:notices"]] == [line]
    assert store.log().count(line) == 1


@everywhere
def test_an_idle_daemon_is_small(store: MountedStore) -> None:
    url = store.status()["http_url"]
    for path in ("health", "readyz", "v1/events"):
        assert get(f"{url}/{path}")[0] == 200
    status = Path(f"/proc/{store.pid}/status").read_text()
    (rss,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
    assert rss < RSS_KIB, f"{rss} KiB"
