"""`[verify]`: a daemon that serves re-reads what is stored, says what it finds, and lets readers go first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from castore.digest import Digest
from castore.storage.layout import key_of
from tests.mount.scrub_beside import SCHEDULE, beside
from tests.mount.store import MountedStore, wait_until


def status_of(path: Path) -> str:
    return os.getxattr(path, "user.castore.status").decode()


def test_what_is_published_is_verified_again_and_again(make_store: Callable[..., MountedStore]) -> None:
    store = make_store(SCHEDULE)
    store.mount()
    (store.ingest("demo/1") / "file").write_bytes(os.urandom(300_000))
    file = store.publish("demo/1") / "file"
    wait_until(lambda: status_of(file) == "verified", "it is verified")
    stored = store.objects / key_of(Digest.parse(os.getxattr(file, "user.castore.digest").decode()))
    good = stored.read_bytes()
    stored.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    wait_until(lambda: status_of(file) == "failed", "the damage is found")
    events = [json.loads(line) for line in store.castore("events", "--json").splitlines()]
    failed = [event for event in events if event["data"].get("status") == "failed"]
    assert {event["data"]["reason"] for event in failed} == {"digest_mismatch"}
    assert {tuple(event["data"]["packages"]) for event in failed} == {("demo/1",)}
    assert "digest_mismatch" in store.log()
    stored.write_bytes(good)
    wait_until(lambda: status_of(file) == "verified", "it is good again")


def test_without_a_schedule_nothing_is_verified(make_store: Callable[..., MountedStore]) -> None:
    store = make_store()
    store.mount()
    (store.ingest("demo/1") / "file").write_bytes(b"as it was stored")
    assert status_of(store.publish("demo/1") / "file") == "stored"
    store.umount()
    assert '"verified"' not in store.castore("events", "--json")


def test_verify_beside_publishing_deleting_collecting_and_reading(make_store: Callable[..., MountedStore]) -> None:
    """In short: scripts/scrub-rounds has the long form, on a server."""
    store = make_store(SCHEDULE)
    store.mount()
    beside(store, seconds=3, seed=1)
