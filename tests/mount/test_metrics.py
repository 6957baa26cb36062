"""The metrics of a mount, as Prometheus would scrape them while it is used."""

from __future__ import annotations

import os
import urllib.request

from tests.api.exposition import documented, promtool, samples, served
from tests.mount.store import MountedStore, wait_until

MIB = 1 << 20


def scrape(store: MountedStore) -> str:
    with urllib.request.urlopen(f"{store.status()['http_url']}/metrics", timeout=60) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text: str = answer.read().decode()
        return text


def test_what_a_mount_serves_is_documented(shared_store: MountedStore) -> None:
    text = scrape(shared_store)
    assert {name: kind for name, (kind, _) in served(text).items()} == {
        name: kind for name, (kind, *_) in documented().items()
    }
    checked = promtool("check", "metrics", text=text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_labels_are_documented(shared_store: MountedStore) -> None:
    folder = shared_store.ingest("labels/1")
    (folder / "a").write_bytes(b"a")
    (shared_store.publish("labels/1") / "a").read_bytes()
    stated = {name: labels for name, (_, labels, _) in documented().items()}
    for name in samples(scrape(shared_store)):
        family, _, labels = name.partition("{")
        family = family if family in stated else family.removesuffix("_sum").removesuffix("_count")
        for label in labels.rstrip("}").split(",") if labels else ():
            key, value = label.split("=")
            assert key in stated[family], name
            free = key in ("backend", "version", "status", "kind", "operation", "state")
            assert free or value.strip('"') in stated[family], name


def test_reads_and_prefetch(shared_store: MountedStore) -> None:
    data = os.urandom(24 * MIB)
    (shared_store.ingest("streams/1") / "large").write_bytes(data)
    path = shared_store.publish("streams/1") / "large"
    before = samples(scrape(shared_store))

    def grown(name: str) -> float:
        return samples(scrape(shared_store))[name] - before[name]

    with path.open("rb", buffering=0) as file:
        # The kernel's readahead asks for more than is read here; it stops with the reader.
        assert b"".join(file.read(MIB) for _ in range(8)) == data[: 8 * MIB]
    fetched = "castore_prefetch_blocks_total"
    used, unused = "castore_prefetch_used_blocks_total", "castore_prefetch_unused_blocks_total"
    wait_until(lambda: grown(fetched) == grown(used) + grown(unused), "each prefetched block is used or given up")
    assert grown(used) > 0
    assert grown(unused) > 0  # what was ahead of the reader when it went away
    assert grown("castore_read_bytes_total") >= 8 * MIB
    assert grown("castore_reads_total") > 0
    assert grown("castore_read_wait_seconds_count") > 0
    assert grown("castore_read_errors_total") == 0
    assert grown("castore_fetched_bytes_total") == grown('castore_backend_read_bytes_total{backend="local"}')
    assert grown('castore_backend_written_bytes_total{backend="local"}') == 0


def test_the_queue(shared_store: MountedStore) -> None:
    folder = shared_store.ingest("queued/1")
    (folder / "a").write_bytes(b"12345")
    shared_store.wait_stored(folder / "a")
    with (folder / "b").open("wb") as file:
        file.write(b"1")
        file.flush()
        found = samples(scrape(shared_store))
    assert found['castore_queue_files{state="stored"}'] == 1
    assert found['castore_queue_bytes{state="stored"}'] == 5
    assert found['castore_queue_files{state="receiving"}'] == 1
    assert found["castore_staged_bytes"] >= 6
    assert found["castore_mounted"] == 1
