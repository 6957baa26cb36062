"""What it saves that equal files of two packages are one inode, by their size.

python -m tests.bench.shared_inodes FOLDER [--rounds N]
    with a local backend and a mount in the folder, 2 GiB of room. A package is read; then one whose files are equal but
    for their time, and so have inodes of their own; then one whose files are the same inodes. Prints the medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from castore.catalog.connection import open_writer
from tests.mount.daemons import cpu_ticks
from tests.mount.store import MountedStore

SIZES: Final = ((4, 500), (64, 500), (256, 256), (512, 128), (1024, 64), (16384, 8), (262144, 1))
"""(KiB of a file, how many files): each is a package of its own."""
_MTIMES_NS: Final = {"first": 1_000_000_000, "own": 2_000_000_000, "shared": 1_000_000_000}
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of reading all files of a package: on the clock, and of the processors, the reader's and the daemon's."""

    wall: float
    processor: float


def fill(store: MountedStore, source: Path) -> None:
    """The three packages of each size; inodes are shared for small files, too, which an import does not do."""
    for kib, count in SIZES:
        folder = source / str(kib)
        folder.mkdir(parents=True)
        for number in range(count):
            with (folder / str(number)).open("wb") as file:
                for _ in range(max(1, kib // 1024)):
                    file.write(os.urandom(min(kib * 1024, _MIB)))
        for name, mtime_ns in _MTIMES_NS.items():
            for path in folder.iterdir():
                os.utime(path, ns=(mtime_ns, mtime_ns))
            store.castore("package", "import", str(folder), f"{name}/{kib}")
        shutil.rmtree(folder)
    database = open_writer(store.state / "catalog.db")
    database.conn.execute(
        "UPDATE entries AS here SET (shared_inode, ctime_ns) = (SELECT entry_id, ctime_ns FROM entries AS first "
        "WHERE first.blob_id = here.blob_id AND first.blob_id <> 0 AND first.mtime_ns = here.mtime_ns "
        "ORDER BY entry_id LIMIT 1) WHERE kind = 2 AND shared_inode = 0 AND EXISTS (SELECT 1 FROM entries AS first "
        "WHERE first.blob_id = here.blob_id AND first.blob_id <> 0 AND first.mtime_ns = here.mtime_ns "
        "AND first.entry_id < here.entry_id)"
    )
    database.close()


def read(package: Path, buffer: bytearray) -> None:
    """Every byte of every file, in the order of the directory."""
    for path in package.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(package: Path) -> None:
    """The kernel has no page of its files."""
    for path in package.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cost(store: MountedStore, package: Path, buffer: bytearray) -> Cost:
    """What reading it takes."""
    ticks, reader, began = cpu_ticks(store.pid), time.process_time(), time.monotonic()
    read(package, buffer)
    wall, reader = time.monotonic() - began, time.process_time() - reader
    return Cost(wall, reader + (cpu_ticks(store.pid) - ticks) / os.sysconf("SC_CLK_TCK"))


def measure(store: MountedStore, kib: int, rounds: int) -> dict[str, list[Cost]]:
    """Own inodes and shared ones, each in its turn, after the first package was read."""
    found: dict[str, list[Cost]] = {"own": [], "shared": []}
    buffer = bytearray(_MIB)
    packages = {name: store.package(f"{name}/{kib}") for name in _MTIMES_NS}
    for package in packages.values():
        read(package, buffer)  # names and attributes are known from here on
    for _ in range(rounds):
        for package in packages.values():
            drop(package)
        read(packages["first"], buffer)
        for name, costs in found.items():
            costs.append(cost(store, packages[name], buffer))
    return found


def told(own: list[Cost], shared: list[Cost]) -> str:
    """A row of the table: medians on the clock, means of the processors, whose ticks are coarse, and the ratios."""
    wall = [median(each.wall for each in costs) for costs in (own, shared)]
    processor = [sum(each.processor for each in costs) / len(costs) for costs in (own, shared)]
    ratio = median(one.wall / other.wall for one, other in zip(shared, own, strict=True))
    cells = (wall[0], processor[0], wall[1], processor[1])
    return f"{' | '.join(f'{cell:.3f} s' for cell in cells)} | {ratio:.2f} | {processor[1] / processor[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    root = given.folder.resolve() / "store"
    root.mkdir(parents=True)
    store = MountedStore(root)
    try:
        fill(store, root / "source")
        store.mount()
        print("| files | own inodes: wall | CPU | shared: wall | CPU | wall, x own | CPU, x own |")
        for kib, count in SIZES:
            print(f"| {count} of {kib} KiB | {told(**measure(store, kib, given.rounds))} |", flush=True)
    finally:
        store.close()
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
