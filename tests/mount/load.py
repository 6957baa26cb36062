"""Eight writers, two publishers and two readers on one mount for minutes; nothing is lost, nothing grows, all drains.

python -m tests.mount.load MINUTES [SEED] [--s3]
    goes on until that time is over and 10,000 files for each minute are written; with --s3 on a SeaweedFS of its own
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from tests.mount.daemons import resident_kib
from tests.mount.store import MountedStore, wait_until
from tests.places import S3Place
from tests.servers.seaweedfs import SeaweedFS

WRITERS: Final = 8
PUBLISHERS: Final = 2
READERS: Final = 2
FILES_PER_MINUTE: Final = 10_000
"""What a long run writes at least: 50,000 in five minutes."""
WAITING_VERSIONS: Final = 16
"""Versions that wait for a publisher before writers wait, too."""
SAMPLE_SECONDS: Final = 0.5
"""Between two looks at the daemon's memory and status."""
MEMORY_MARGIN_KIB: Final = 32 * 1024
"""What the daemon may hold more in the last third of a run than in the middle one, by the medians and beside the blocks
that it keeps: each connection to the catalog fills a cache of 16 MiB as that grows, and there are two."""
MEMORY_MOST_KIB: Final = 400 * 1024
"""What it may ever hold: half as much again as was seen in runs of 50,000 files, on a server 273 MiB."""
FILES_MARGIN: Final = 4
"""Files that the daemon may have open more at the end than at the start: databases come and go."""
SOCKETS_MARGIN: Final = 64
"""The same of sockets: connections to a server are kept for a while."""
DRAIN_SECONDS: Final = 300.0

Recorded = dict[str, str]
"""Path below a version -> the sha256 of a file, `-> TARGET` of a symbolic link, "" of a directory."""


@dataclass(slots=True)
class Sample:
    """One look at the daemon."""

    resident_kib: int
    unfinished_files: int
    kept_bytes: int
    """Checked blocks that it keeps in memory, within a bound of its own."""


@dataclass(slots=True)
class Report:
    """What a run did, and what was seen of the daemon."""

    packages: dict[str, Recorded] = field(default_factory=dict)
    file_count: int = 0
    size_bytes: int = 0
    rewrites: int = 0
    busy_publishes: int = 0
    reads: int = 0
    write_seconds: float = 0
    drain_seconds: float = 0
    check_seconds: float = 0
    samples: list[Sample] = field(default_factory=list)

    def memory_kib(self) -> list[int]:
        """The median of what the daemon held beside kept blocks, in each third of the run."""
        held = [sample.resident_kib - sample.kept_bytes // 1024 for sample in self.samples]
        third = max(1, len(held) // 3)
        return [int(statistics.median(held[start : start + third])) for start in (0, third, 2 * third)]

    def most_kib(self) -> int:
        """The most that the daemon held."""
        return max(sample.resident_kib for sample in self.samples)

    def said(self) -> str:
        """In some lines, for people."""
        memory = ", ".join(f"{each / 1024:.0f}" for each in self.memory_kib())
        return (
            f"{self.file_count} files, {self.size_bytes / 1e6:.0f} MB, {self.rewrites} changed while copying, "
            f"{len(self.packages)} packages\n"
            f"written in {self.write_seconds:.0f} s ({self.file_count / self.write_seconds:.0f} files/s), "
            f"drained in {self.drain_seconds:.1f} s more, read again in {self.check_seconds:.0f} s\n"
            f"{self.busy_publishes} publishes were busy first; {self.reads} packages read meanwhile\n"
            f"memory beside kept blocks {memory} MiB in the thirds of the run, "
            f"with them {self.most_kib() / 1024:.0f} MiB at most; "
            f"most unfinished files {max(sample.unfinished_files for sample in self.samples)}; "
            f"{len(self.samples)} status documents"
        )


class Load:
    """One run on a mounted store."""

    def __init__(self, store: MountedStore, *, seconds: float, files: int = 0, seed: int = 0) -> None:
        self.store = store
        self.seconds = seconds
        self.files = files
        self.seed = seed
        self.report = Report()
        self._lock = threading.Lock()
        self._written: queue.Queue[tuple[str, Recorded] | None] = queue.Queue(WAITING_VERSIONS)
        self._failed = threading.Event()
        self._published = threading.Event()
        self._shared = [random.Random(f"{seed} shared").randbytes(size) for size in (10, 3000, 150_000)]
        """Bytes that many files have, written by several at a time."""

    def run(self) -> Report:
        """All of it; raises AssertionError with what was lost, or what grew."""
        report = self.report
        files, sockets = self._open_counts()
        started = time.monotonic()
        self._until = started + self.seconds
        with ThreadPoolExecutor(WRITERS + PUBLISHERS + READERS + 1) as pool:
            writers = [pool.submit(self._guard, self._write_versions, number) for number in range(WRITERS)]
            publishers = [pool.submit(self._guard, self._publish_versions) for _ in range(PUBLISHERS)]
            watchers = [pool.submit(self._guard, self._read, number) for number in range(READERS)]
            watchers.append(pool.submit(self._guard, self._sample))
            try:
                wait(writers, return_when=FIRST_EXCEPTION)
                report.write_seconds = time.monotonic() - started
                for _ in publishers:
                    self._put(None)
                wait(publishers, return_when=FIRST_EXCEPTION)
            finally:
                self._published.set()
            for each in (*writers, *publishers, *watchers):
                each.result()
        self._drain()
        report.drain_seconds = time.monotonic() - started - report.write_seconds
        files_left, sockets_left = self._open_counts()
        assert files_left <= files + FILES_MARGIN, f"{files_left} files are open, {files} were"
        assert sockets_left <= sockets + SOCKETS_MARGIN, f"{sockets_left} sockets are open, {sockets} were"
        self._check_memory()
        self._check_all()
        assert "Traceback" not in self.store.log(), self.store.log()
        return report

    def _guard(self, work: Callable[..., None], *arguments: int) -> None:
        """The first error ends everybody's work."""
        try:
            work(*arguments)
        except BaseException:
            self._failed.set()
            raise

    def _goes_on(self) -> bool:
        return time.monotonic() < self._until or self.report.file_count < self.files

    # writing

    def _write_versions(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        version = 0
        while self._goes_on() and not self._failed.is_set():
            version += 1
            ref = f"load{number}/{version}"
            recorded = _Writer(self.store.ingest(ref), rng, self._shared)
            recorded.write()
            with self._lock:
                self.report.file_count += recorded.file_count
                self.report.size_bytes += recorded.size_bytes
                self.report.rewrites += recorded.rewrites
            self._put((ref, recorded.tree))

    def _put(self, item: tuple[str, Recorded] | None) -> None:
        while not self._failed.is_set():
            try:
                return self._written.put(item, timeout=0.5)
            except queue.Full:
                continue

    # publishing

    def _publish_versions(self) -> None:
        while not self._failed.is_set():
            try:
                item = self._written.get(timeout=0.5)
            except queue.Empty:
                continue
            if item is None:
                return
            ref, recorded = item
            wait_until(partial(self._moved, ref), f"publish of {ref}", DRAIN_SECONDS)
            with self._lock:
                self.report.packages[ref] = recorded

    def _moved(self, ref: str) -> bool:
        command = ["mv", "-T", str(self.store.mnt / "ingest" / ref), str(self.store.package(ref))]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        if done.returncode:
            assert "Device or resource busy" in done.stderr, done.stderr
            with self._lock:
                self.report.busy_publishes += 1
        return done.returncode == 0

    # reading

    def _read(self, number: int) -> None:
        rng = random.Random(f"{self.seed} reader {number}")
        while not self._published.is_set() and not self._failed.is_set():
            with self._lock:
                refs = list(self.report.packages)
            if not refs:
                self._published.wait(0.1)
                continue
            self._check(rng.choice(refs))
            with self._lock:
                self.report.reads += 1

    def _check(self, ref: str) -> None:
        found, expected = tree_of(self.store.package(ref)), self.report.packages[ref]
        differ = {path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path)}
        assert not differ, {f"{ref}/{path}": (found.get(path), expected.get(path)) for path in sorted(differ)[:10]}

    # watching

    def _sample(self) -> None:
        while not self._published.is_set() and not self._failed.is_set():
            self._look()
            self._published.wait(SAMPLE_SECONDS)

    def _look(self) -> Sample:
        status = self.store.status()
        queued = {state: counts["file_count"] for state, counts in status["queue"].items()}
        assert not queued["failed"], status
        assert not status["failed_location_count"], status
        unfinished = sum(queued.values()) - queued["stored"]
        sample = Sample(resident_kib(self.store.pid), unfinished, status["reads"]["kept_bytes"])
        self.report.samples.append(sample)
        return sample

    def _open_counts(self) -> tuple[int, int]:
        """(files, sockets) that the daemon has open."""
        folder = f"/proc/{self.store.pid}/fd"
        targets: list[str] = []
        for name in os.listdir(folder):
            with suppress(FileNotFoundError):  # closed meanwhile
                targets.append(os.readlink(f"{folder}/{name}"))
        sockets = sum(target.startswith("socket:") for target in targets)
        return len(targets) - sockets, sockets

    # the end

    def _drain(self) -> None:
        wait_until(lambda: not self._look().unfinished_files, "the queue drains", DRAIN_SECONDS)
        status = self.store.status()
        assert status["versions"] == []
        assert status["staged_bytes"] == 0
        assert list((self.store.state / "staging/data").iterdir()) == []

    def _check_memory(self) -> None:
        _, middle, last = self.report.memory_kib()
        assert last <= middle + MEMORY_MARGIN_KIB, f"the daemon grows: {self.report.said()}"
        assert self.report.most_kib() <= MEMORY_MOST_KIB, f"the daemon is large: {self.report.said()}"

    def _check_all(self) -> None:
        """Every package, through a daemon that was started anew and a cache with nothing in it."""
        began = time.monotonic()
        self.store.umount()
        shutil.rmtree(self.store.root / "cache", ignore_errors=True)
        self.store.mount()
        listed = json.loads(self.store.castore("package", "list", "--json"))["packages"]
        assert {package["ref"] for package in listed} == self.report.packages.keys()
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(self._check, self.report.packages):
                pass
        self.report.check_seconds = time.monotonic() - began


class _Writer:
    """Fills one version, as programs copy: mostly once, sometimes again, under another name, or for nothing."""

    def __init__(self, top: Path, rng: random.Random, shared: list[bytes]) -> None:
        self.top = top
        self.rng = rng
        self.shared = shared
        self.tree: Recorded = {".": ""}
        self.file_count = 0
        self.size_bytes = 0
        self.rewrites = 0

    def write(self) -> None:
        folders = ["."]
        for number in range(self.rng.randint(20, 200)):
            folder = self.rng.choice(folders)
            path = os.path.normpath(f"{folder}/{number:03d}")
            what = self.rng.random()
            if what < 0.03:
                (self.top / path).mkdir()
                self.tree[path] = ""
                folders.append(path)
            elif what < 0.05:
                (self.top / path).symlink_to(f"../{number}")
                self.tree[path] = f"-> ../{number}"
            else:
                self._write_file(path)
                if what > 0.85:
                    self._change(path)

    def _data(self) -> bytes:
        """Mostly small, one in a hundred up to 4 MiB; one in ten as others have it."""
        if self.rng.random() < 0.1:
            return self.rng.choice(self.shared)
        most = self.rng.choices((0, 200, 4096, 16_384, 131_073, 4 << 20), (2, 20, 45, 25, 7, 1))[0]
        return self.rng.randbytes(self.rng.randint(0, most))

    def _write_file(self, path: str) -> None:
        data = self._data()
        descriptor = os.open(self.top / path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            half = self.rng.randint(0, len(data)) if self.rng.random() < 0.1 else 0
            for start, end in ((half, len(data)), (0, half)):  # now and then not front to back
                if start < end or not half:
                    written = os.pwrite(descriptor, data[start:end], start)
                    assert written == end - start, "a short write"
        finally:
            os.close(descriptor)
        self.tree[path] = hashlib.sha256(data).hexdigest()
        self.file_count += 1
        self.size_bytes += len(data)

    def _change(self, path: str) -> None:
        self.rewrites += 1
        what = self.rng.randrange(4)
        if what == 0:
            self._write_file(path)
        elif what == 1:
            more = self._data()
            before = (self.top / path).read_bytes()
            with (self.top / path).open("ab") as file:
                file.write(more)
            self.tree[path] = hashlib.sha256(before + more).hexdigest()
            self.size_bytes += len(more)
        elif what == 2:
            self._write_file(f"{path}.part")
            os.rename(self.top / f"{path}.part", self.top / path)
            self.tree[path] = self.tree.pop(f"{path}.part")
        else:
            os.unlink(self.top / path)
            del self.tree[path]


def tree_of(top: Path) -> Recorded:
    """What is at and below a version, every byte read."""
    tree: Recorded = {".": ""}
    for folder, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(folder, name)
            below = os.path.relpath(path, top)
            if os.path.islink(path):
                tree[below] = f"-> {os.readlink(path)}"
            elif os.path.isdir(path):
                tree[below] = ""
            else:
                with open(path, "rb") as file:
                    tree[below] = hashlib.file_digest(file, "sha256").hexdigest()
    return tree


def main() -> None:
    """A long run, told on standard output."""
    parser = argparse.ArgumentParser(prog="load-rounds")
    parser.add_argument("minutes", type=float, nargs="?", default=5.0)
    parser.add_argument("seed", type=int, nargs="?", default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--s3", action="store_true", help="objects on a SeaweedFS that is started for it")
    arguments = parser.parse_args()
    where = "SeaweedFS" if arguments.s3 else "a folder"
    print(f"{arguments.minutes:g} minutes with seed {arguments.seed}, objects in {where}", flush=True)
    with tempfile.TemporaryDirectory(prefix="castore-load-") as folder, ExitStack() as running:
        place = None
        if arguments.s3:
            (Path(folder) / "server").mkdir()
            place = S3Place(Path(folder), running.enter_context(SeaweedFS(Path(folder) / "server")), None)
        store = MountedStore(Path(folder), place=place)
        running.callback(store.close)
        store.mount()
        files = int(arguments.minutes * FILES_PER_MINUTE)
        load = Load(store, seconds=60 * arguments.minutes, files=files, seed=arguments.seed)
        try:
            load.run()
        except BaseException:
            print(store.log(), file=sys.stderr)
            raise
        print(load.report.said())
        store.umount()
    print("nothing was lost")


if __name__ == "__main__":
    main()
