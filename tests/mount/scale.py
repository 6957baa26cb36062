"""Measures a mount whose catalog has millions of entries: starting, memory, lookups, listings. No test, no real bytes.

python -m tests.mount.scale DIR [--entries N ...] [--json FILE]
    makes a catalog of each size below DIR, mounts it and prints a table. The blobs are rows alone: nothing is read.
    "Cold" is a fresh daemon and mount; the catalog itself may be in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from castore.catalog.connection import open_writer
from tests.mount.store import MountedStore

FILES_PER_DIRECTORY: Final = 50
DIRECTORIES_PER_PACKAGE: Final = 20
LARGE_DIRECTORY_FILES: Final = 100_000
LOOKUPS: Final = 2_000
FIND_PACKAGES: Final = 100
"""Walked by the `find`: 102,100 entries, whatever the size of the catalog."""
_PACKAGE_ENTRIES: Final = 1 + DIRECTORIES_PER_PACKAGE * (1 + FILES_PER_DIRECTORY)
_FIRST: Final = 2_000_000

# Entry numbers ascend package by package, directory by directory, as publish leaves them.
_NUMBERS: Final = "WITH RECURSIVE n(i) AS (SELECT :low UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :high) "
_NAMES: Final = (
    _NUMBERS + "INSERT INTO package_names SELECT printf('pkg%06d', i), :first + i * :per - 2, :first + i * :per - 1, "
    "0, 0, 493, 0, '1.0' FROM n"
)
_PACKAGES: Final = (
    _NUMBERS + "INSERT INTO packages SELECT i + 1, printf('pkg%06d', i), '1.0', :first + i * :per, 'scale', 'standard',"
    " 0, 0, :files, :files * 4096, 1, '[\"local\"]' FROM n"
)
_ROOTS: Final = (
    _NUMBERS + "INSERT INTO entries SELECT :first + i * :per, :first + i * :per - 2, CAST('1.0' AS BLOB), "
    ":first + i * :per, 1, 493, 0, 0, 0, 0, 0, 1, 0, x'', 0 FROM n"
)
_DIRECTORIES: Final = (
    _NUMBERS + "INSERT INTO entries SELECT :root + 1 + i * :step, :root, CAST(printf('dir%02d', i) AS BLOB), "
    ":root + 1 + i * :step, 1, 493, 0, 0, 0, 0, 0, 1, 0, x'', 0 FROM n"
)
_FILES: Final = (
    _NUMBERS + "INSERT INTO entries SELECT :parent + 1 + i, :parent, CAST(printf('file-%06d.dat', i) AS BLOB), "
    ":parent + 1 + i, 2, 420, 0, 0, 0, 0, 4096, 1, :blob + i, x'', 0 FROM n"
)
_BLOBS: Final = (
    _NUMBERS
    + "INSERT INTO blobs SELECT i, iif(i = 1, 'manifest-sha256', 'sha256'), CAST(printf('%032d', i) AS BLOB), 4096, "
    "131072, 'xxh3-64', x'0011223344556677' FROM n"
)
_LOCATIONS: Final = _NUMBERS + "INSERT INTO storage_locations SELECT i, 'local', 'stored', '', i, 0 FROM n"


def fill(path: Path, entries: int) -> int:
    """Add packages of a thousand files until there are `entries`, and one with a large directory; how many packages."""
    packages = max(FIND_PACKAGES, (entries - LARGE_DIRECTORY_FILES) // _PACKAGE_ENTRIES)
    files = DIRECTORIES_PER_PACKAGE * FILES_PER_DIRECTORY
    per = _PACKAGE_ENTRIES + 2
    database = open_writer(path, synchronous="OFF")
    run = database.conn.execute
    run("PRAGMA foreign_keys = OFF")
    run("BEGIN IMMEDIATE")
    blob_count = 1 + packages * files + LARGE_DIRECTORY_FILES
    run(_BLOBS, {"low": 1, "high": blob_count + 1})
    run(_LOCATIONS, {"low": 1, "high": blob_count + 1})
    numbers = {"low": 0, "high": packages + 1, "first": _FIRST, "per": per, "files": files}
    for statement in (_NAMES, _PACKAGES):
        run(statement, numbers)
    step, blob = 1 + FILES_PER_DIRECTORY, 2
    for number in range(packages):
        root = _FIRST + number * per
        run(_ROOTS, {**numbers, "low": number, "high": number + 1})
        run(_DIRECTORIES, {"low": 0, "high": DIRECTORIES_PER_PACKAGE, "root": root, "step": step})
        for directory in range(DIRECTORIES_PER_PACKAGE):
            run(
                _FILES,
                {"low": 0, "high": FILES_PER_DIRECTORY, "parent": root + 1 + directory * step, "blob": blob},
            )
            blob += FILES_PER_DIRECTORY
    root = _FIRST + packages * per
    run(_ROOTS, {**numbers, "low": packages, "high": packages + 1})
    run(_FILES, {"low": 0, "high": LARGE_DIRECTORY_FILES, "parent": root, "blob": blob})
    run(
        "UPDATE packages SET file_count = :count, size_bytes = :count * 4096 WHERE root_id = :root",
        {"count": LARGE_DIRECTORY_FILES, "root": root},
    )
    run("UPDATE sequences SET next_value = ?", (root + LARGE_DIRECTORY_FILES + 1024,))
    run("COMMIT")
    run("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    return packages


def paths(store: MountedStore, packages: int, count: int) -> Iterator[Path]:
    """Random files of the store, the same ones for each size of catalog and each run."""
    draw = random.Random(packages)
    for _ in range(count):
        package, directory = draw.randrange(packages), draw.randrange(DIRECTORIES_PER_PACKAGE)
        file = draw.randrange(FILES_PER_DIRECTORY)
        yield store.package(f"pkg{package:06d}/1.0") / f"dir{directory:02d}" / f"file-{file:06d}.dat"


def _memory_mib(pid: int) -> dict[str, float]:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: round(int(fields[key].split()[0]) / 1024, 1) for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def _scan(folder: Path) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat(follow_symlinks=False).st_size > 0 for entry in entries)


def _seconds(work: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def measure(store: MountedStore, packages: int) -> dict[str, float]:
    """All figures of one catalog, in the units that their names say."""
    figures: dict[str, float] = {}
    figures["mount_s"] = _seconds(store.mount)
    try:
        figures["memory_mounted_mib"] = _memory_mib(store.pid)["now"]
        times = sorted(_seconds(os.stat, path) for path in paths(store, packages, LOOKUPS))
        figures["cold_path_median_ms"] = statistics.median(times) * 1000
        figures["cold_path_p99_ms"] = times[len(times) * 99 // 100] * 1000
        large = store.package(f"pkg{packages:06d}/1.0")
        figures["ls_100k_cold_s"] = _seconds(_scan, large)
        figures["ls_100k_warm_s"] = _seconds(_scan, large)
        walked = [store.package(f"pkg{number:06d}") for number in range(0, packages, packages // FIND_PACKAGES)]
        counts = []
        figures["find_per_entry_us"] = _seconds(lambda: counts.append(sum(map(_walk, walked)))) / 1e-6
        figures["find_per_entry_us"] /= counts[0]
        figures["status_s"] = _seconds(store.status)
        figures["health_s"] = _seconds((store.mnt / ".castore/health.json").read_text)
        memory = _memory_mib(store.pid)
        figures["memory_after_mib"], figures["memory_peak_mib"] = memory["now"], memory["peak"]
    finally:
        store.kill()
        store.close()
    return figures


def _walk(folder: Path) -> int:
    count = 0
    for _, directories, files in os.walk(folder):
        count += len(directories) + len(files)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--entries", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    table: dict[int, dict[str, float]] = {}
    for entries in given.entries:
        folder = given.dir.resolve() / f"entries-{entries}"
        folder.mkdir(parents=True)
        store = MountedStore(folder)
        started = time.perf_counter()
        packages = fill(store.state / "catalog.db", entries)
        print(f"{entries} entries: made in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        table[entries] = measure(store, packages)
    names = next(iter(table.values()))
    print(f"{'':24}" + "".join(f"{entries:>14,}" for entries in table))
    for name in names:
        print(f"{name:24}" + "".join(f"{figures[name]:>14.3f}" for figures in table.values()))
    if given.json:
        given.json.write_text(json.dumps(table, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
