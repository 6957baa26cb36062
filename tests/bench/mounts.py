"""Times castore beside other mounts of one S3 server, and beside a client without a mount. See docs/BENCHMARKS.md.

python -m tests.bench.mounts DIR [--rounds N] [--only NAME,...] [--works NAME,...] [--json FILE] [--large-mib N]
    [--small N]

Each piece of work goes round over all contenders, `rounds` times, so that a busy host disturbs all alike. Every figure
is of a fresh mount with an empty cache folder; the server has its page cache, alike for all. What is copied in is new
each time: castore would not put again what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.bench.mounters import BIG, CONTENDERS, MIB, Contender, python_version
from tests.servers.s3_server import free_ports
from tests.servers.seaweedfs import SeaweedFS

FOLDER_FILES: Final = 50
SMALL_BYTES: Final = 4096
NEW_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work, the contender or `peer` (the best other mount) that castore is held against, and the ratio."""

    title: str
    against: str
    target: float


WORKS: Final = {
    "cold-seq": Work("cold sequential read", "direct", 1.1),
    "warm-seq": Work("warm sequential read", "peer", 1.0),
    "cold-rand": Work("100 cold random 4 KiB reads", "direct", 0.6),
    "cold-small": Work("cold small files, 8 readers", "peer", 0.6),
    "cold-stat": Work("cold `find -printf %s`", "peer", 1.0),
    "warm-stat": Work("warm `find -printf %s`", "peer", 1.1),
    "put-big": Work("copy a large file in, until stored", "direct", 0.9),
    "put-small": Work("copy small files in, until stored", "peer", 0.5),
}


def make_files(folder: Path, large_mib: int, small: int) -> Path:
    """One large file and many small ones, of random bytes; once."""
    source = folder / f"files-{large_mib}-{small}"
    if not source.exists():
        unfinished = source.with_suffix(".part")
        for number in range(small):
            path = unfinished / f"small/{number // FOLDER_FILES:03d}/{number:05d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(SMALL_BYTES))
        with (unfinished / BIG).open("wb") as file:
            for _ in range(large_mib):
                file.write(os.urandom(MIB))
        unfinished.rename(source)
    return source


def make_new(source: Path) -> None:
    """Changes the first bytes of every file, so that no two copies of them have a file in common."""
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                file.write(os.urandom(NEW_BYTES))


def ratio_of(work: str, medians: dict[str, float]) -> float | None:
    """castore's median as a multiple of what it is held against; None where that was not timed."""
    others = {name: median for name, median in medians.items() if name != "castore"}
    if WORKS[work].against != "direct":
        others.pop("direct", None)
        best = min(others.values(), default=None)
    else:
        best = others.get("direct")
    return medians["castore"] / best if best and "castore" in medians else None


def run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run, as they go into the JSON file."""
    source = make_files(folder, given.large_mib, given.small)
    filer, filer_grpc = free_ports(2)
    wanted = given.only.split(",") if given.only else [kind.name for kind in CONTENDERS]
    versions: dict[str, str] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    with SeaweedFS(folder / "server", options={"filer.port": filer, "filer.port.grpc": filer_grpc}) as server:
        contenders: list[Contender] = []
        for kind in (kind for kind in CONTENDERS if kind.name in wanted):
            version = kind.version()
            if version is None:
                print(f"{kind.name} is not installed, and left out", file=sys.stderr)
                continue
            versions[kind.name] = version
            contender = kind(folder / "contenders", server.endpoint_url, f"127.0.0.1:{filer}.{filer_grpc}")
            contender.load(source)
            contenders.append(contender)
        for work in given.works.split(","):
            for _ in range(given.rounds):
                for contender in contenders:
                    if work.startswith("put-"):
                        make_new(source)
                    took = contender.time(work, source)
                    if took is not None:
                        seconds.setdefault(work, {}).setdefault(contender.name, []).append(round(took, 4))
            show(work, seconds[work])
        server_version = server.version
    return {
        "python": python_version(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": os.uname().release,
        "server": f"SeaweedFS {server_version}",
        "versions": versions,
        "rounds": given.rounds,
        "large_mib": given.large_mib,
        "small_files": given.small,
        "load": round(os.getloadavg()[2], 1),
        "seconds": seconds,
    }


def medians_of(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in seconds.items()}


def show(work: str, seconds: dict[str, list[float]]) -> None:
    medians = medians_of(seconds)
    figures = "  ".join(f"{name} {median:.3f}" for name, median in medians.items())
    ratio = ratio_of(work, medians)
    against = "direct" if WORKS[work].against == "direct" else "the best peer"
    said = "" if ratio is None else f"  castore {ratio:.2f} x {against} (target {WORKS[work].target:g})"
    print(f"{work:11}{figures}{said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="names of contenders, separated by commas; by default all that are installed")
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--large-mib", type=int, default=512)
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    unknown = {*(given.only or "castore").split(",")} - {kind.name for kind in CONTENDERS}
    unknown |= {*given.works.split(",")} - WORKS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    given.folder.mkdir(parents=True, exist_ok=True)
    results = run(given.folder.resolve(), given)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
