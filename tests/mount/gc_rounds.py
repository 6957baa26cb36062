"""Garbage collection beside ingest, publish, delete, restore, verify and readers; afterwards nothing may be missing.

All files come from a small pool, so what is deleted is put again all the time, and much is shared.
"""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from castore.catalog.writer import CatalogWriter
from castore.errors import CastoreError
from castore.registry.deletion import delete_package, restore_package
from tests.mount.store import MountedStore, wait_until

POOL = [bytes([number]) * (number * 1009 + 1) for number in range(24)]
ENOUGH_SECONDS = 120.0
_GC = ("storage", "gc", "--json", "--delete", "--grace", "0s")


@dataclass
class Rounds:
    """What happened, and the packages that have to be there."""

    published: int = 0
    deleted: int = 0
    restored: int = 0
    busy: int = 0
    collections: int = 0
    deleted_objects: int = 0
    verified: int = 0
    there: dict[str, dict[str, bytes]] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)


def run_rounds(
    store: MountedStore, *, seconds: float, seed: int, enough: Callable[[Rounds], bool] = lambda _: True
) -> Rounds:
    """Work for that long, then prove that every package reads right, cold, and that no object is lost or left.

    On a busy host it takes longer: until `enough` happened, or ENOUGH_SECONDS more.
    """
    rounds = Rounds()
    lock = threading.Lock()
    until = time.monotonic() + seconds

    def goes_on() -> bool:
        now = time.monotonic()
        return now < until or (now < until + ENOUGH_SECONDS and not enough(rounds))

    writer = CatalogWriter(store.state / "catalog.db")

    def always(work: Callable[[random.Random], None], number: int) -> None:
        chance = random.Random(seed * 1000 + number)
        try:
            while goes_on() and not rounds.errors:
                work(chance)
        except BaseException as exc:
            rounds.errors.append(exc)

    def publish(chance: random.Random) -> None:
        with lock:
            rounds.published += 1
            ref = f"gc/{rounds.published}"
        files = {f"file{number}": chance.choice(POOL) for number in range(chance.randint(1, 6))}
        box = store.ingest(ref)
        for name, data in files.items():
            (box / name).write_bytes(data)

        def try_publish() -> bool:
            try:
                box.rename(store.package(ref))
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    raise
                rounds.busy += 1
                return False
            return True

        wait_until(try_publish, f"publish of {ref}")
        with lock:
            rounds.there[ref] = files

    def delete(chance: random.Random) -> None:
        with lock:
            if len(rounds.there) < 5:
                ref = ""
            else:
                ref = chance.choice(sorted(rounds.there))
                files = rounds.there.pop(ref)
        if not ref:
            time.sleep(0.01)
            return
        name, version = ref.split("/")
        work = partial(delete_package, name=name, version=version, uid=0, restore_within_seconds=0, reason="request")
        writer.run_sync(work)
        rounds.deleted += 1
        if chance.random() < 0.3:
            try:
                writer.run_sync(partial(restore_package, name=name, version=version, uid=0))
            except CastoreError:
                return  # garbage collection was quicker
            rounds.restored += 1
            with lock:
                rounds.there[ref] = files

    def collect(_: random.Random) -> None:
        done = store.run(*_GC)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        rounds.collections += 1
        rounds.deleted_objects += sum(backend["deleted_count"] for backend in document["backends"])

    def verify(_: random.Random) -> None:
        done = store.run("storage", "verify")
        assert done.returncode == 0, done.stdout + done.stderr
        rounds.verified += 1

    def read(chance: random.Random) -> None:
        with lock:
            ref, files = chance.choice(sorted(rounds.there.items())) if rounds.there else ("", {})
        for name, data in files.items():
            try:
                found = (store.package(ref) / name).read_bytes()
            except FileNotFoundError:
                continue  # deleted meanwhile
            except OSError as exc:
                # Opened, deleted and collected within one call, as there is no grace here: an error, never other bytes.
                with lock:
                    is_deleted = ref not in rounds.there
                if exc.errno != errno.EIO or not is_deleted:
                    raise
                continue
            assert found == data, ref
        time.sleep(0.005)

    tasks = [publish, publish, delete, collect, verify, read]
    threads = [threading.Thread(target=always, args=(task, number)) for number, task in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    if rounds.errors:
        raise rounds.errors[0]
    check(store, rounds)
    return rounds


def check(store: MountedStore, rounds: Rounds) -> None:
    """Every package reads right after everything that is cached is gone; objects are those of the catalog."""
    store.umount()
    store.castore("cache", "clear")
    done = store.run(*_GC)
    assert done.returncode == 0, done.stderr
    listed = {package["ref"] for package in json.loads(store.castore("package", "list", "--json"))["packages"]}
    assert listed == set(rounds.there)
    store.castore("storage", "verify")
    store.castore("storage", "verify", "--orphans")
    store.mount()
    for ref, files in rounds.there.items():
        assert {name: (store.package(ref) / name).read_bytes() for name in os.listdir(store.package(ref))} == files
    wanted = {data for files in rounds.there.values() for data in files.values()}
    stored = [path for path in (store.objects / "sha256").rglob("*") if path.is_file()]
    assert len(stored) == len(wanted)


def main() -> None:
    """`scripts/gc-rounds [SECONDS [SEED]]`."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 300.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory(prefix="castore-gc-") as folder:
        store = MountedStore(Path(folder))
        try:
            store.mount()
            rounds = run_rounds(store, seconds=seconds, seed=seed)
        finally:
            store.close()
    counts = {key: value for key, value in vars(rounds).items() if isinstance(value, int)}
    print(", ".join(f"{key} {value}" for key, value in counts.items()), f"packages left {len(rounds.there)}", sep=", ")


if __name__ == "__main__":
    main()
