"""The status page and the metrics of a mount: its queue, and what being looked at costs."""

from __future__ import annotations

import errno
import os
import re
import urllib.request
from pathlib import Path

from tests.api.test_page import section
from tests.mount.store import MountedStore, fails, wait_until

IDLE_MAX_BYTES = 120_000_000
"""What a daemon that does nothing may use, whoever looks at it."""


def fetch(store: MountedStore, path: str = "/") -> str:
    with urllib.request.urlopen(f"{store.status()['http_url']}{path}", timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def test_the_queue(shared_store: MountedStore) -> None:
    folder = shared_store.ingest("demo/2")
    (folder / "done").write_bytes(b"12345")
    shared_store.wait_stored(folder / "done")
    (folder / os.fsdecode(b"\x1b[31m<b>\xff")).write_bytes(b"1")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  done\n")
    shared_store.wait_stored(folder / "SHA256SUMS")
    wait_until(lambda: "stored 3 " in section(fetch(shared_store), "queue"), "all is stored")
    with (folder / "open").open("wb") as file:
        file.write(b"1")
        file.flush()
        wait_until(lambda: re.search(r"receiving 1 1 B", section(fetch(shared_store), "queue")), "it is there")
        assert re.search(r"demo/2 3 of 4 ", section(fetch(shared_store), "queue"))
    (folder / "open").unlink()
    with fails(errno.EBADMSG):
        folder.rename(shared_store.package("demo/2"))
    wait_until(lambda: "SHA256SUMS" in section(fetch(shared_store), "queue"), "why it is not published")


def test_being_looked_at_costs_little(shared_store: MountedStore) -> None:
    for _ in range(20):
        for path in ("/", "/metrics", "/health", "/page.js", "/style.css"):
            fetch(shared_store, path)
    status = Path(f"/proc/{shared_store.pid}/status").read_text()
    (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
    assert int(resident) * 1024 < IDLE_MAX_BYTES


def test_where_it_is(shared_store: MountedStore) -> None:
    page = fetch(shared_store)
    assert f'<span class="where">{shared_store.mnt}</span>' in page
    assert "All is well" in section(page, "health")
