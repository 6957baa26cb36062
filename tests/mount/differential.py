"""Random reads of published files against plain copies, while caches and a backend are damaged. Not a speed test.

python -m tests.mount.differential N[min] [SEED]
    so many reads, or minutes of them, on a store of its own in a temporary folder; exit 1: some read was not right
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from castore.digest import BLOCK_SIZE_BYTES, Digest
from castore.storage.layout import key_of
from tests.mount.store import MountedStore
from tests.mount.test_disk_cache import cached_files, configure

MIB: Final = 1 << 20
LARGE_BYTES: Final = (40 * MIB + 17, 32 * MIB, 24 * MIB + 4096, 16 * MIB - 1)
"""Together nearly twice what the daemon keeps in memory, so that there is always something to evict."""
SMALL_BYTES: Final = (
    *(0, 1, 100, 4095, 4096, 8191, 8192, 8193, 50_000, BLOCK_SIZE_BYTES - 1, BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES + 1),
    *(300_000, 700_001, MIB, 3 * MIB + 5, 5 * MIB),
)
CACHE_BYTES: Final = 40 * MIB
"""Of the disk cache: a third of all files."""
PROCESSES: Final = 2
THREADS: Final = 8
"""In each process."""
HEAL_SECONDS: Final = 4.0
"""Between two times that the damaged backend is made good again: else it would be asked last for ever."""
ERRORS_SHOWN: Final = 20


# reading


class Pair:
    """A published file and its copy, open in every way that is needed."""

    def __init__(self, name: str, package: Path, copies: Path) -> None:
        self.name = name
        self.path = package / name
        self.size = (copies / name).stat().st_size
        self.copy = os.open(copies / name, os.O_RDONLY)
        self.plain = os.open(self.path, os.O_RDONLY)
        self.direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)

    def close(self) -> None:
        """All three descriptors."""
        for descriptor in (self.copy, self.plain, self.direct):
            os.close(descriptor)

    def expected(self, offset: int, length: int) -> bytes:
        """Reads of a plain file may be cut short as well, but are not."""
        return os.pread(self.copy, length, offset)


@dataclass(slots=True)
class Found:
    """What the threads of a process did, and what was not right."""

    counts: Counter[str] = field(default_factory=Counter)
    read_bytes: int = 0
    wrong: list[str] = field(default_factory=list)


class Reader:
    """One thread's reads. Every kind of them compares what it gets."""

    def __init__(self, pairs: list[Pair], rng: random.Random) -> None:
        self.found = Found()
        self._pairs = pairs
        self._rng = rng
        # Of large files more: else they would be read less often than the bytes that they have.
        self._weights = [1 + 3 * (pair.size > 8 * MIB) for pair in pairs]
        self.kinds: dict[Callable[[Pair], None], int] = {
            self.pread: 30,
            self.direct: 12,
            self.mapped: 12,
            self.sendfile: 12,
            self.sequential: 6,
            self.whole: 6,
            self.readahead: 8,
            self.advise: 6,
            self.drop: 8,
        }

    def step(self) -> None:
        """One read, or another call that moves what is where."""
        pair = self._rng.choices(self._pairs, self._weights)[0]
        kind = self._rng.choices([*self.kinds], [*self.kinds.values()])[0]
        self.found.counts[kind.__name__] += 1
        try:
            kind(pair)
        except OSError as exc:
            self.found.wrong.append(f"{kind.__name__} of {pair.name}: {exc}")

    def _range(self, pair: Pair, longest: int = MIB) -> tuple[int, int]:
        """Offset and length: often at the edge of a block, sometimes beyond the end, seldom long."""
        rng = self._rng
        offset = rng.randrange(pair.size + 1000)
        if rng.random() < 0.3:
            offset = max(0, offset // BLOCK_SIZE_BYTES * BLOCK_SIZE_BYTES + rng.randint(-3, 3))
        length = min(longest, int(rng.choice((100, 4096, 70_000, 300_000, MIB)) * rng.random()) + 1)
        return offset, length

    def _compare(self, what: str, pair: Pair, offset: int, length: int, got: bytes) -> None:
        self.found.read_bytes += len(got)
        expected = pair.expected(offset, length)
        if got != expected:
            first = next((n for n, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), "none")
            self.found.wrong.append(
                f"{what} of {pair.name}, {length} bytes at {offset}: {len(got)} instead of {len(expected)}, "
                f"the first wrong one at {first}"
            )

    def pread(self, pair: Pair) -> None:
        offset, length = self._range(pair)
        self._compare("pread", pair, offset, length, os.pread(pair.plain, length, offset))

    def direct(self, pair: Pair) -> None:
        offset, length = self._range(pair)
        self._compare("O_DIRECT", pair, offset, length, os.pread(pair.direct, length, offset))

    def mapped(self, pair: Pair) -> None:
        offset, length = self._range(pair)
        offset = min(offset, pair.size) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = min(length, pair.size - offset)
        if not length:
            return
        flags = self._rng.choice((mmap.MAP_SHARED, mmap.MAP_PRIVATE))
        with mmap.mmap(pair.plain, length, flags=flags, prot=mmap.PROT_READ, offset=offset) as view:
            if self._rng.random() < 0.3:
                view.madvise(self._rng.choice((mmap.MADV_RANDOM, mmap.MADV_SEQUENTIAL, mmap.MADV_WILLNEED)))
            start = self._rng.randrange(length)
            self._compare("mmap", pair, offset + start, length - start, view[start:])

    def sendfile(self, pair: Pair) -> None:
        offset, length = self._range(pair)
        target = os.memfd_create("sendfile")
        try:
            done = 0
            while done < length and (count := os.sendfile(target, pair.plain, offset + done, length - done)):
                done += count
            self._compare("sendfile", pair, offset, length, os.pread(target, length, 0))
        finally:
            os.close(target)

    def sequential(self, pair: Pair) -> None:
        """As `cat` does for a while, on a handle of its own."""
        offset, length = self._range(pair)
        descriptor = os.open(pair.path, os.O_RDONLY)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            for _ in range(8):
                got = os.read(descriptor, length)
                self._compare("read", pair, offset, length, got)
                offset += len(got)
        finally:
            os.close(descriptor)

    def whole(self, pair: Pair) -> None:
        """Open, read all of it, close; of a large file, the beginning."""
        length = min(pair.size + 1, 2 * MIB)
        with pair.path.open("rb", buffering=0) as file:
            self._compare("read", pair, 0, length, file.read(length) or b"")

    def readahead(self, pair: Pair) -> None:
        offset, length = self._range(pair)
        os.posix_fadvise(pair.plain, offset, length, os.POSIX_FADV_WILLNEED)
        offset += self._rng.randrange(length)
        self._compare("pread ahead", pair, offset, length, os.pread(pair.plain, length, offset))

    def advise(self, pair: Pair) -> None:
        advices = (os.POSIX_FADV_NORMAL, os.POSIX_FADV_RANDOM, os.POSIX_FADV_SEQUENTIAL)
        os.posix_fadvise(pair.plain, 0, 0, self._rng.choice(advices))
        self.pread(pair)

    def drop(self, pair: Pair) -> None:
        """What the kernel keeps of a range, or of all of the file, goes; then it is read."""
        offset, length = self._range(pair, 8 * MIB)
        whole = self._rng.random() < 0.5
        os.posix_fadvise(pair.plain, 0 if whole else offset, 0 if whole else length, os.POSIX_FADV_DONTNEED)
        self.pread(pair)


def read_on(package: Path, copies: Path, seed: str, *, operations: int, seconds: float) -> Found:
    """Some threads read until the operations or the seconds are over, or something is not right."""
    pairs = [Pair(path.name, package, copies) for path in sorted(copies.iterdir())]
    readers = [Reader(pairs, random.Random(f"{seed} {number}")) for number in range(THREADS)]
    end = time.monotonic() + seconds
    stop = threading.Event()

    def run(reader: Reader) -> None:
        try:
            for _ in range(-(-operations // THREADS)):
                if stop.is_set() or time.monotonic() > end:
                    break
                reader.step()
                if reader.found.wrong:
                    stop.set()
        except BaseException as exc:
            reader.found.wrong.append(f"the reader failed: {exc!r}")
            stop.set()
            raise

    threads = [threading.Thread(target=run, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pair in pairs:
        pair.close()
    found = Found()
    for reader in readers:
        found.counts += reader.found.counts
        found.read_bytes += reader.found.read_bytes
        found.wrong += reader.found.wrong
    return found


# doing harm


class Harm:
    """Damages cache files, small blobs in the cache, and objects of one backend, in a thread, until it is told to end.

    Now and then that backend is made good again, by plain copies of its objects and a verify of castore.
    """

    def __init__(self, store: MountedStore, bad: Path, good: Path, digests: list[Digest], rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self._store = store
        self._bad = bad
        self._good = good
        self._keys = [key_of(digest) for digest in digests]
        self._rng = rng
        self._end = threading.Event()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Beside the block."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def _run(self) -> None:
        heal_at = time.monotonic() + HEAL_SECONDS
        kinds = (self.flip_in_cache, self.flip_in_cache, self.cut_in_cache, self.remove_from_cache, self.alter_tiny)
        try:
            while not self._end.wait(0.02):
                self._do(self._rng.choice(kinds))
                if self._rng.random() < 0.2:
                    self._do(self._rng.choice((self.flip_object, self.flip_object, self.cut_object, self.lose_object)))
                if time.monotonic() > heal_at:
                    self._do(self.heal)
                    heal_at = time.monotonic() + HEAL_SECONDS
        except BaseException as exc:
            self.errors.append(repr(exc))
            raise

    def _do(self, harm: Callable[[], bool]) -> None:
        with suppress(FileNotFoundError):  # evicted, or lost before
            self.counts[harm.__name__] += harm()

    def _cached(self) -> Path:
        return self._rng.choice(cached_files(self._store.root / "cache") or [Path("/nowhere")])

    def flip_in_cache(self) -> bool:
        return _flip(self._cached(), self._rng)

    def cut_in_cache(self) -> bool:
        path = self._cached()
        os.truncate(path, self._rng.randrange(path.stat().st_size + 1))
        return True

    def remove_from_cache(self) -> bool:
        self._cached().unlink()
        return True

    def alter_tiny(self) -> bool:
        path = self._store.state / "tiny.db"
        one = "SELECT number FROM tiny ORDER BY random() LIMIT 1"
        query = f"UPDATE tiny SET data = zeroblob(length(data)) WHERE number = ({one})"
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=5)) as database, database:
                return bool(database.execute(query).rowcount)
        except sqlite3.OperationalError:  # it is not there yet
            return False

    def flip_object(self) -> bool:
        return _flip(self._bad / self._rng.choice(self._keys), self._rng)

    def cut_object(self) -> bool:
        path = self._bad / self._rng.choice(self._keys)
        os.truncate(path, self._rng.randrange(path.stat().st_size + 1))
        return True

    def lose_object(self) -> bool:
        (self._bad / self._rng.choice(self._keys)).unlink()
        return True

    def heal(self) -> bool:
        for key in self._keys:
            new = (self._bad / key).with_name("new")
            new.write_bytes((self._good / key).read_bytes())
            new.rename(self._bad / key)
        done = self._store.run("storage", "verify", "--backend", "bad")
        if done.returncode:
            self.errors.append(f"verify after healing: {done.stdout}{done.stderr}")
        return True


def _flip(path: Path, rng: random.Random) -> bool:
    """Some bytes of a file are others, in place."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return False
        offset = rng.randrange(size)
        old = os.pread(file.fileno(), rng.randint(1, 100), offset)
        os.pwrite(file.fileno(), bytes(byte ^ 0x55 for byte in old), offset)
    return True


# all of it


@dataclass(frozen=True, slots=True)
class Report:
    """What was done, by whom, and what was not right."""

    seed: str
    seconds: float
    reads: dict[str, int]
    read_bytes: int
    harms: dict[str, int]
    daemon: dict[str, int]
    wrong: list[str]

    def __str__(self) -> str:
        reads = f"{sum(self.reads.values())} reads, {self.read_bytes / 1e9:.1f} GB"
        lines = [f"seed {self.seed}: {reads}, in {self.seconds:.0f} s"]
        for title, counts in (("reads", self.reads), ("harm", self.harms), ("daemon", self.daemon)):
            lines.append(f"{title}: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}")
        return "\n".join([*lines, f"not right: {len(self.wrong)}", *self.wrong[:ERRORS_SHOWN]])


def _make_files(folder: Path, seed: str) -> list[Digest]:
    folder.mkdir()
    digests = []
    for number, size in enumerate((*LARGE_BYTES, *SMALL_BYTES)):
        data = random.Random(f"{seed} {number}").randbytes(size)
        (folder / f"{number:02}-{size}").write_bytes(data)
        digests.append(Digest.of(data))
    return digests


def _make_store(root: Path) -> MountedStore:
    """With a backend that will be damaged, asked first, and one that stays good."""
    store = MountedStore(root)
    text = store.config.read_text()
    before, http = text[: text.index("[backends.")], text[text.index("[http]") :]
    backends = "".join(
        f'[backends.{name}]\ntype = "local"\npath = "{root}/objects-{name}"\n' for name in ("bad", "good")
    )
    rule = '[routing]\ndefault = "bad"\n[[routing.rules]]\nbackend = "bad"\ncopies = ["good"]\n'
    store.config.write_text(f"{before}{backends}{rule}{http}")
    configure(store, max_bytes=CACHE_BYTES, same_disk="true")
    store.castore("init")
    return store


def run(root: Path, seed: str, *, operations: int = 1 << 60, seconds: float = 1e9) -> Report:
    """Everything, in an empty folder, until the operations or the seconds are over. Nothing stays mounted."""
    copies = root / "copies"
    digests = _make_files(copies, seed)
    (root / "store").mkdir()
    store = _make_store(root / "store")
    try:
        store.mount()
        box = store.ingest("diff/1")
        for path in copies.iterdir():
            (box / path.name).write_bytes(path.read_bytes())
        package = store.publish("diff/1")
        harm = Harm(store, store.root / "objects-bad", store.root / "objects-good", digests, random.Random(seed))
        began = time.monotonic()
        with harm.going_on():
            found = _read_in_processes(package, copies, seed, operations=operations, seconds=seconds)
        took = time.monotonic() - began
        status = store.status()
        assert "Traceback" not in store.log(), store.log()
    finally:
        store.close()
    wrong = found.wrong + harm.errors
    counts = {name: status["reads"][name] for name in ("gets", "bad_blocks", "disk_bad", "disk_hits", "memory_bad")}
    counts["evicted_files"] = status["cache"]["evicted_files"]
    return Report(seed, took, dict(found.counts), found.read_bytes, dict(harm.counts), counts, wrong)


def _read_in_processes(package: Path, copies: Path, seed: str, *, operations: int, seconds: float) -> Found:
    """Each of them in a process of its own: a read of a mapping that fails would end it, and Python's lock is one."""
    each = -(-operations // PROCESSES)
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "tests.mount.differential",
        "reader",
        package,
        copies,
        str(each),
        str(seconds),
    ]
    processes = [
        subprocess.Popen([*command, f"{seed} {number}"], stdout=subprocess.PIPE, text=True)
        for number in range(PROCESSES)
    ]
    found = Found()
    for process in processes:
        output = process.communicate()[0]
        if process.returncode:
            found.wrong.append(f"a reader ended with {process.returncode}: {output}")
            continue
        part: dict[str, Any] = json.loads(output)
        found.counts += Counter(part["counts"])
        found.read_bytes += part["read_bytes"]
        found.wrong += part["wrong"]
    return found


def _amount(text: str) -> tuple[int, float]:
    """(operations, seconds) of `1000000` or `20min`."""
    return (1 << 60, 60 * float(text[:-3])) if text.endswith("min") else (int(text), 1e9)


def main() -> None:
    if sys.argv[1:2] == ["reader"]:
        package, copies, operations, seconds, seed = sys.argv[2:]
        found = read_on(Path(package), Path(copies), seed, operations=int(operations), seconds=float(seconds))
        print(json.dumps({"counts": found.counts, "read_bytes": found.read_bytes, "wrong": found.wrong}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("amount", type=_amount, metavar="N[min]")
    parser.add_argument("seed", nargs="?", default=str(random.randrange(10**9)))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="castore-differential-") as folder:
        report = run(Path(folder), given.seed, operations=given.amount[0], seconds=given.amount[1])
    print(report)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
