"""Verify beside a mount that is written, published to and read: no false report, and nothing lost.

python -m tests.mount.scrub_beside [MINUTES] [SEED]    on a server that is started for it
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.mount.store import MountedStore
from tests.places import S3Place
from tests.servers.seaweedfs import SeaweedFS

SCHEDULE: Final = '[verify]\nevery = "1s"\nrate = "50MiB/s"\n'
PUBLISHERS: Final = 2
FILES: Final = 12
COMMON: Final = [bytes([number]) * 5000 for number in range(20)]
"""Bytes that come again and again: what is deduplicated."""


@dataclass(slots=True)
class Run:
    """What was done, and what was published: ref -> path -> sha256."""

    published: dict[str, dict[str, str]] = field(default_factory=dict)
    verifies: int = 0
    looked_at: int = 0
    reads: int = 0


def publish_always(store: MountedStore, run: Run, number: int, draws: random.Random, is_over: threading.Event) -> None:
    version = 0
    while not is_over.is_set():
        version += 1
        ref = f"part{number}/{version}"
        box = store.ingest(ref)
        sums: dict[str, str] = {}
        for name in range(FILES):
            data = draws.choice(COMMON) if draws.random() < 0.4 else draws.randbytes(draws.choice((10, 5000, 400_000)))
            (box / f"{name}").write_bytes(data)
            sums[f"{name}"] = hashlib.sha256(data).hexdigest()
        store.publish(ref)
        run.published[ref] = sums


def read_always(store: MountedStore, run: Run, draws: random.Random, is_over: threading.Event) -> None:
    while not is_over.wait(0.01):
        if run.published:
            check_package(store, run, draws.choice(list(run.published)))
            run.reads += 1


def check_package(store: MountedStore, run: Run, ref: str) -> None:
    for name, digest in run.published[ref].items():
        assert hashlib.sha256((store.package(ref) / name).read_bytes()).hexdigest() == digest, f"{ref}/{name}"


def verify_always(store: MountedStore, run: Run, is_over: threading.Event) -> None:
    is_last = False
    while not is_last:
        is_last = is_over.is_set()
        done = store.run("storage", "verify", "--json")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        summary = json.loads(done.stdout.splitlines()[-1])
        assert (summary["failed"], summary["unreachable"]) == (0, 0), summary
        run.verifies += 1
        run.looked_at += summary["looked_at"]


def beside(store: MountedStore, *, seconds: float, seed: int) -> Run:
    """All of it on a mounted store, for so long. Raises AssertionError."""
    run, is_over = Run(), threading.Event()
    tasks: list[Callable[[], None]] = [
        *(
            lambda number=number: publish_always(store, run, number, random.Random(seed + number), is_over)
            for number in range(PUBLISHERS)
        ),
        lambda: read_always(store, run, random.Random(seed), is_over),
        lambda: verify_always(store, run, is_over),
    ]

    def guard(task: Callable[[], None]) -> None:
        try:
            task()
        finally:
            is_over.set()

    with ThreadPoolExecutor(len(tasks)) as pool:
        running = [pool.submit(guard, task) for task in tasks]
        is_over.wait(seconds)
        is_over.set()
    for each in running:
        each.result()
    for ref in run.published:
        check_package(store, run, ref)
    events = [json.loads(line) for line in store.castore("events", "--json").splitlines()]
    assert not [event for event in events if event["type"].endswith("location_failed")]
    assert not [event for event in events if event["data"].get("status") == "failed"]
    return run


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 30)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as relays:
        root = Path(folder)
        (root / "server").mkdir()
        with SeaweedFS(root / "server") as server:
            store = MountedStore(root, SCHEDULE, place=S3Place(root, server, relays))
            try:
                store.mount()
                started = time.monotonic()
                run = beside(store, seconds=minutes * 60, seed=seed)
                store.umount()
            finally:
                store.close()
    print(
        f"{time.monotonic() - started:.0f} s: {len(run.published)} packages of {FILES} files published, "
        f"{run.reads} read, {run.verifies} verifies of {run.looked_at} locations; no false report, nothing lost"
    )


if __name__ == "__main__":
    os.umask(0o022)
    main()
