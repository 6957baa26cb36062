"""Health, metrics and the status page while the S3 server of a mount is stopped: it takes calls, and answers none."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.api.exposition import samples
from tests.mount.store import MountedStore, wait_until
from tests.places import S3Place
from tests.servers.seaweedfs import SeaweedFS

AT_ONCE_S = 10.0
"""An answer takes a second at most; a busy host may take some more, and what waits for the server takes 30."""


def fetch(store: MountedStore, url: str, path: str) -> tuple[int, str, float]:
    """Status, text and the seconds that it took."""
    started = time.monotonic()
    try:
        with urllib.request.urlopen(f"{url}{path}", timeout=60) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            status, text = exc.code, exc.read().decode()
    return status, text, time.monotonic() - started


def test_all_answer_while_the_server_does_not(
    make_store: Callable[..., MountedStore], s3_server: SeaweedFS, tmp_path: Path
) -> None:
    with ExitStack() as relays:
        store = make_store(place=S3Place(tmp_path, s3_server, relays))
        store.mount()
        url = store.status()["http_url"]
        (store.ingest("demo/1") / "a").write_bytes(b"a")
        store.publish("demo/1")
        assert fetch(store, url, "/health")[0] == 200
        s3_server.pause()
        try:
            for path in ("/health", "/livez", "/readyz", "/metrics", "/", "/v1/events"):
                status, _, took = fetch(store, url, path)
                assert took < AT_ONCE_S, path
                assert status in (200, 503), path

            def has_failed() -> bool:
                status, text, took = fetch(store, url, "/health")
                assert took < AT_ONCE_S
                return status == 503 and json.loads(text)["status"] == "fail"

            wait_until(has_failed, "health says that the sole copies cannot be reached")
            metrics = samples(fetch(store, url, "/metrics")[1])
            assert metrics['castore_backend_health{backend="main",status="fail"}'] == 1
            assert metrics['castore_health_status{status="fail"}'] == 1
            assert metrics["castore_packages"] == 1
            assert "Failing" in fetch(store, url, "/")[1]
        finally:
            s3_server.resume()
        wait_until(lambda: fetch(store, url, "/health")[0] == 200, "it is well again")
        store.umount()
