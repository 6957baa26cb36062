"""The most memory that a daemon needs while many readers stream as many large files through one mount.

python -m tests.bench.stream_memory FOLDER [--mib N] [--readers N] [--place s3|local]
    with a server of its own in the folder, twice as many bytes of room as all files have; prints the figures, and ends
    with 1 when they are above what is promised
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.mount.store import MountedStore
from tests.places import Place, S3Place
from tests.servers.seaweedfs import SeaweedFS

LIMIT_BYTES: Final = 300 * 1000 * 1000
"""What the daemon may take while 64 files are streamed."""
READERS: Final = 64

_MIB: Final = 1 << 20
_PATTERN: Final = random.Random(64).randbytes(_MIB)


@dataclass(frozen=True, slots=True)
class Figures:
    """Peaks of the daemon's resident memory since its mount: before the first read, and after the last one."""

    idle_bytes: int
    peak_bytes: int
    seconds: float
    gets: int
    wrong: int


def _piece(file: int, number: int) -> bytes:
    """The MiB `number` of a file: no other MiB of any file is the same."""
    stamp = file.to_bytes(8) + number.to_bytes(8)
    return stamp + _PATTERN[len(stamp) :]


def peak_bytes(pid: int) -> int:
    """The most resident memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024


def fill(store: MountedStore, readers: int, mib: int) -> Path:
    """A package of so many files, which neither the kernel nor a cache has; the daemon is a new one."""
    box = store.ingest("stream/1")
    for file in range(readers):
        with (box / str(file)).open("wb", buffering=0) as stream:
            for number in range(mib):
                stream.write(_piece(file, number))
    store.castore("package", "publish", "stream/1")
    store.umount()
    shutil.rmtree(store.root / "cache", ignore_errors=True)
    store.mount()
    return store.package("stream/1")


def stream(store: MountedStore, package: Path, readers: int, mib: int) -> Figures:
    """All files at the same time, each from its beginning to its end by a reader of its own."""
    wrong: list[str] = []

    def read(file: int) -> None:
        buffer = bytearray(_MIB)
        with (package / str(file)).open("rb", buffering=0) as source:
            for number in range(mib):
                done = 0
                while count := source.readinto(memoryview(buffer)[done:]):
                    done += count
                if buffer != _piece(file, number) or done != _MIB:
                    wrong.append(f"{file}: {number}")

    idle, began = peak_bytes(store.pid), time.monotonic()
    threads = [threading.Thread(target=read, args=(file,)) for file in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    return Figures(idle, peak_bytes(store.pid), seconds, store.status()["reads"]["gets"], len(wrong))


def measure(root: Path, place: Place | None, *, readers: int, mib: int) -> Figures:
    """In an empty folder; nothing stays mounted."""
    store = MountedStore(root, place=place)
    try:
        store.mount()
        return stream(store, fill(store, readers, mib), readers, mib)
    finally:
        store.close()
        for folder in (store.objects, store.state, store.root / "cache"):
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--readers", type=int, default=READERS)
    parser.add_argument("--place", choices=("s3", "local"), default="s3")
    given = parser.parse_args()
    folder = given.folder.resolve()
    root = folder / "store"
    root.mkdir(parents=True)
    (folder / "server").mkdir()
    with ExitStack() as stack:
        place = None
        if given.place == "s3":
            place = S3Place(root, stack.enter_context(SeaweedFS(folder / "server")), None)
        figures = measure(root, place, readers=given.readers, mib=given.mib)
    rate = given.readers * given.mib / figures.seconds
    print(f"{given.readers} readers of {given.mib} MiB each, {given.place}: {figures.seconds:.1f} s, {rate:.0f} MiB/s")
    print(f"idle {figures.idle_bytes / 1e6:.0f} MB, at most {figures.peak_bytes / 1e6:.0f} MB; {figures.gets} gets")
    print(f"wrong: {figures.wrong}")
    sys.exit(figures.peak_bytes >= LIMIT_BYTES or figures.wrong > 0)


if __name__ == "__main__":
    main()
