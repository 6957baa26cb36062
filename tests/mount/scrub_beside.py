"""Verify beside a mount that is written, published to, deleted from, collected and read: no false report, nothing lost.

python -m tests.mount.scrub_beside [MINUTES] [SEED]    on a server that is started for it
"""

from __future__ import annotations

import errno
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
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from castore.catalog.writer import CatalogWriter
from castore.registry.deletion import delete_package
from tests.mount.store import WAIT_SECONDS, MountedStore
from tests.places import S3Place
from tests.servers.seaweedfs import SeaweedFS

SCHEDULE: Final = '[verify]\nevery = "1s"\nrate = "50MiB/s"\n'
PUBLISHERS: Final = 2
FILES: Final = 12
COMMON: Final = [bytes([number]) * 5000 for number in range(20)]
"""Bytes that come again and again: what is deduplicated, and put anew soon after it was collected."""
KEPT: Final = 5
"""Packages below which none is deleted."""
_GC: Final = ("storage", "gc", "--json", "--delete", "--grace", "0s")


@dataclass(slots=True)
class Run:
    """What was done, and what is there: ref -> path -> sha256."""

    there: dict[str, dict[str, str]] = field(default_factory=dict)
    published: int = 0
    deleted: int = 0
    collections: int = 0
    collected: int = 0
    verifies: int = 0
    looked_at: int = 0
    reads: int = 0

    @property
    def has_all(self) -> bool:
        """Whether each kind of work was done beside the others."""
        return bool(self.deleted and self.collected and self.reads and self.looked_at and self.verifies >= 2)


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
        run.there[ref] = sums
        run.published += 1


def delete_always(store: MountedStore, run: Run, draws: random.Random, is_over: threading.Event) -> None:
    with closing(CatalogWriter(store.state / "catalog.db")) as writer:
        while not is_over.wait(0.02):
            if len(run.there) <= KEPT:
                continue
            ref = draws.choice(list(run.there))
            del run.there[ref]
            name, version = ref.split("/")
            for_good = partial(delete_package, uid=0, restore_within_seconds=0, reason="request")
            writer.run_sync(partial(for_good, name=name, version=version))
            run.deleted += 1


def collect_always(store: MountedStore, run: Run, is_over: threading.Event) -> None:
    while not is_over.is_set():
        collect(store, run)


def collect(store: MountedStore, run: Run) -> None:
    done = store.run(*_GC)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    run.collections += 1
    run.collected += sum(backend["deleted_count"] for backend in json.loads(done.stdout)["backends"])


def read_always(store: MountedStore, run: Run, draws: random.Random, is_over: threading.Event) -> None:
    while not is_over.wait(0.01):
        ref, sums = draws.choice(list(run.there.items()) or [("", {})])
        try:
            check_package(store, ref, sums)
        except OSError as exc:
            # Deleted, and perhaps collected, while it was read: there is no grace here. An error, never other bytes.
            if exc.errno not in (errno.ENOENT, errno.EIO) or ref in run.there:
                raise
        else:
            run.reads += bool(ref)


def check_package(store: MountedStore, ref: str, sums: dict[str, str]) -> None:
    for name, digest in sums.items():
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
    """All of it on a mounted store, for so long, and until there was some of each. Raises AssertionError."""
    run, is_over = Run(), threading.Event()
    tasks: list[Callable[[], None]] = [
        *(
            lambda number=number: publish_always(store, run, number, random.Random(seed + number), is_over)
            for number in range(PUBLISHERS)
        ),
        lambda: delete_always(store, run, random.Random(seed), is_over),
        lambda: collect_always(store, run, is_over),
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
        until = time.monotonic() + seconds
        while not is_over.wait(0.1) and (now := time.monotonic()) < until + WAIT_SECONDS:
            if now >= until and run.has_all:
                break
        is_over.set()
    for each in running:
        each.result()
    assert run.has_all, {name: getattr(run, name) for name in Run.__slots__ if name != "there"}
    listed = {package["ref"] for package in json.loads(store.castore("package", "list", "--json"))["packages"]}
    assert listed == run.there.keys()
    collect(store, run)
    for arguments in (["storage", "verify"], ["storage", "verify", "--orphans"], ["catalog", "check"]):
        done = store.run(*arguments)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for ref, sums in run.there.items():
        check_package(store, ref, sums)
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
        f"{time.monotonic() - started:.0f} s: {run.published} packages of {FILES} files published, {run.reads} read, "
        f"{run.deleted} deleted, {run.collected} objects collected by {run.collections} runs of gc, "
        f"{run.verifies} verifies of {run.looked_at} locations; no false report, nothing lost"
    )


if __name__ == "__main__":
    os.umask(0o022)
    main()
