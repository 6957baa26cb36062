"""How fast verify is beside a bare client that feeds hashlib, and the most memory that it needs. Tests nothing.

python -m tests.bench.verify_speed DIR [--rounds N] [--local N] [--large N] [--large-mib N] [--small N]
    [--memory-large N] [--memory-small N] [--skip-memory] [--skip-speed] [--skip-s3]
In a folder with 25 GiB of room. Ends with 1 when the memory is above what is promised.

Everything of a round reads the same objects, from a server or a folder whose pages the host has in memory, in a process
of its own. The time of verify is that of its summary: from its start on the event loop, without the interpreter's.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import trio

from castore.digest import BLOCK_SIZE_BYTES, BlobSummary, Digest
from castore.storage.layout import key_of
from castore.storage.open import open_backend
from castore.storage.source import BytesSource
from castore.storage.spi import Source
from tests.places import LocalPlace, Place, S3Place
from tests.published import PublishedStore
from tests.servers.seaweedfs import SeaweedFS

MIB: Final = 1 << 20
LIMIT_BYTES: Final = 150 * 1000 * 1000
"""What verify may take, however many objects there are and however large they are."""
SMALL_BYTES: Final = 4096
PUTS: Final = 8
"""Objects that are put at a time."""
BARE_AT_ONCE: Final = {"large": 4, "small": 16}
"""Objects that the bare client reads at a time: as many as verify."""


@contextmanager
def a_store(root: Path, place: Place) -> Iterator[PublishedStore]:
    root.mkdir(parents=True, exist_ok=True)
    store = PublishedStore(root, place, "main")
    yield trio.run(store.create)
    trio.run(store.aclose)


class Large:
    """Objects of random bytes that are nobody's in memory: made piece by piece, once for the digest, once to be put."""

    def __init__(self, number: int, size_bytes: int) -> None:
        self._block = hashlib.shake_128(f"{number}".encode()).digest(MIB)
        self.size_bytes = size_bytes
        hasher = hashlib.sha256()
        for piece in self.pieces():
            hasher.update(piece)
        self.digest = Digest("sha256", hasher.digest())

    def piece(self, number: int) -> bytes:
        return number.to_bytes(8) + self._block[8:]

    def pieces(self) -> Iterator[bytes]:
        return map(self.piece, range(self.size_bytes // MIB))

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in self.pieces():
                file.write(piece)


def small(number: int) -> bytes:
    return (b"%d " % number).ljust(SMALL_BYTES, b".")


def known(store: PublishedStore, digests: dict[Digest, int]) -> None:
    """The catalog has a location of each of these digests and sizes, and of nothing else."""
    store.execute("DELETE FROM storage_locations")
    store.add_locations(
        (BlobSummary(digest, size_bytes, BLOCK_SIZE_BYTES, "xxh3-64", b""), "main")
        for digest, size_bytes in digests.items()
    )


def verify(store: PublishedStore) -> tuple[float, int, int]:
    """(seconds, bytes read, peak of the resident memory in bytes) of one run of `castore storage verify`."""
    command = [sys.executable, "-m", "castore.cli", "--config", str(store.config_path), "storage", "verify", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    last, peak_kib = b"", 0
    for number, line in enumerate(process.stdout):
        last = line
        if number % 64 == 0:
            peak_kib = max(peak_kib, high_water_kib(process.pid))
        if last.startswith(b'{"summary"'):
            peak_kib = max(peak_kib, high_water_kib(process.pid))
    assert process.wait() == 0, last
    summary = json.loads(last)
    return summary["duration_s"], summary["read_bytes"], peak_kib * 1024


def high_water_kib(pid: int) -> int:
    """The most memory that a process had resident so far; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


# the others: each prints the seconds that it took


def bare_files(paths: list[str]) -> float:
    """hashlib on all cores, with files as fast as Python's own function reads them."""

    def digest(path: str) -> bytes:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(digest, paths))
    return time.perf_counter() - started


async def bare_client(endpoint_url: str, bucket: str, keys: list[str], at_once: int) -> float:
    """aioboto3: each object with one request, its body fed to hashlib in a thread as it comes."""
    import aioboto3
    from botocore.config import Config

    waiting = iter(keys)
    settings = Config(s3={"addressing_style": "path"}, max_pool_connections=at_once)
    credentials = {
        "aws_access_key_id": os.environ["BENCH_ACCESS_KEY"],
        "aws_secret_access_key": os.environ["BENCH_SECRET_KEY"],
    }
    session = aioboto3.Session(region_name="us-east-1", **credentials)
    async with session.client("s3", endpoint_url=endpoint_url, config=settings) as client:

        async def work() -> None:
            for key in waiting:
                hasher = hashlib.sha256()
                answer = await client.get_object(Bucket=bucket, Key=key)
                while piece := await answer["Body"].read(MIB):
                    if len(piece) <= 65536:
                        hasher.update(piece)
                    else:
                        await asyncio.to_thread(hasher.update, piece)
                assert hasher.hexdigest() == key.rpartition("/")[2]

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(at_once)))
        return time.perf_counter() - started


def alone(request: dict[str, Any], environ: dict[str, str]) -> float:
    """Run one of the others in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.verify_speed", "--other"],
        input=json.dumps(request),
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def other() -> None:
    request = json.load(sys.stdin)
    if request["kind"] == "files":
        print(bare_files(request["paths"]))
    else:
        print(asyncio.run(bare_client(request["url"], request["bucket"], request["keys"], request["at_once"])))


# the runs


def speed(store: PublishedStore, request: dict[str, Any], environ: dict[str, str], rounds: int, what: str) -> None:
    verify(store)
    alone(request, environ)
    figures = []
    for _ in range(rounds):
        theirs = alone(request, environ)
        ours, size_bytes, _ = verify(store)
        figures.append((ours, theirs, theirs / ours))
    ours, theirs, ratio = (statistics.median(column) for column in zip(*figures, strict=True))
    print(
        f"{what}: {size_bytes / ours / MIB:.0f} MiB/s in {ours:.2f} s, the other {size_bytes / theirs / MIB:.0f} MiB/s "
        f"in {theirs:.2f} s; ratio {ratio:.2f} (medians of {rounds}; load {os.getloadavg()[0]:.1f})",
        flush=True,
    )


def speed_of_local(root: Path, larges: list[Large], rounds: int) -> None:
    with a_store(root / "local", LocalPlace(root / "local")) as store:
        folder = Path(store.config.backends["main"].place)
        for large in larges:
            large.write(folder / key_of(large.digest))
        known(store, {large.digest: large.size_bytes for large in larges})
        paths = [str(folder / key_of(large.digest)) for large in larges]
        speed(store, {"kind": "files", "paths": paths}, {}, rounds, "local, large, beside hashlib on all cores")
    shutil.rmtree(root / "local")


def speed_of_s3(root: Path, larges: list[Large], small_count: int, rounds: int) -> None:
    (root / "s3/server").mkdir(parents=True)
    with SeaweedFS(root / "s3/server") as server:
        place = S3Place(root / "s3", server, None)
        environ = {"BENCH_ACCESS_KEY": server.access_key, "BENCH_SECRET_KEY": server.secret_key}
        with a_store(root / "s3", place) as store:
            settings: Any = store.config.backends["main"]
            client = server.client()
            small_digests = {Digest.of(small(number)): SMALL_BYTES for number in range(small_count)}
            for number in range(small_count):
                data = small(number)
                client.put_object(
                    Bucket=settings.bucket, Key=f"{settings.key_prefix}/{key_of(Digest.of(data))}", Body=data
                )
            for large in larges:
                large.write(root / "s3/large")
                key = f"{settings.key_prefix}/{key_of(large.digest)}"
                client.upload_file(str(root / "s3/large"), settings.bucket, key)
            client.close()
            for kind, digests in (
                ("large", {large.digest: large.size_bytes for large in larges}),
                ("small", small_digests),
            ):
                known(store, digests)
                keys = [f"{settings.key_prefix}/{key_of(digest)}" for digest in digests]
                request = {
                    "kind": "s3",
                    "url": server.endpoint_url,
                    "bucket": settings.bucket,
                    "keys": keys,
                    "at_once": BARE_AT_ONCE[kind],
                }
                speed(store, request, environ, rounds, f"S3, {kind}, beside a bare aioboto3 and hashlib")
                _, size_bytes, peak = verify(store)
                print(f"S3, {kind}: {size_bytes / MIB:.0f} MiB, {peak / 1e6:.0f} MB of memory", flush=True)
    shutil.rmtree(root / "s3")


def memory(root: Path, large_count: int, small_count: int) -> bool:
    """Whether the peaks of both are below the limit."""
    peaks = []
    with a_store(root / "large", LocalPlace(root / "large")) as store:
        folder = Path(store.config.backends["main"].place)
        digests: dict[Digest, int] = {}
        hasher, zeros = hashlib.sha256(), bytes(MIB)
        for _ in range(2048):
            hasher.update(zeros)
        for number in range(large_count):
            # Holes: they take no room, and are read and hashed as any other bytes.
            digest, size_bytes = Digest("sha256", hasher.digest()), (2048 + number) * MIB
            path = folder / key_of(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, size_bytes)
            digests[digest] = size_bytes
            hasher.update(zeros)
        known(store, digests)
        seconds, size_bytes, peak = verify(store)
        peaks.append(peak)
        print(f"{large_count} of 2 GiB: {peak / 1e6:.0f} MB, {size_bytes / seconds / MIB:.0f} MiB/s", flush=True)
    shutil.rmtree(root / "large")
    with a_store(root / "small", LocalPlace(root / "small")) as store:
        folder = Path(store.config.backends["main"].place)
        digests = {}
        for number in range(small_count):
            data = small(number)
            digest = Digest.of(data)
            path = folder / key_of(digest)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            digests[digest] = SMALL_BYTES
        known(store, digests)
        seconds, _, peak = verify(store)
        peaks.append(peak)
        print(f"{small_count} of 4 KiB: {peak / 1e6:.0f} MB, {small_count / seconds:.0f} objects/s", flush=True)
    shutil.rmtree(root / "small")
    return max(peaks) < LIMIT_BYTES


class LargeSource:
    """A large object to be put, made as it is read: it needs no room on this disk."""

    def __init__(self, large: Large) -> None:
        self._large = large
        self.size_bytes = large.size_bytes

    def open(self) -> BinaryIO:
        return io.BufferedReader(_LargeFile(self._large), MIB)


class _LargeFile(io.RawIOBase):
    def __init__(self, large: Large) -> None:
        self._large = large
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._large.size_bytes}[whence]
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._large.size_bytes:
            return 0
        number, begin = divmod(self._position, MIB)
        piece = self._large.piece(number)[begin : begin + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


async def fill(store: PublishedStore, sources: Iterator[tuple[Digest, Source]]) -> dict[Digest, int]:
    """Put objects as a mount does, so many at a time; their sizes."""
    sizes: dict[Digest, int] = {}
    backend = open_backend(store.config.backends["main"])

    async def work() -> None:
        for digest, source in sources:
            await backend.put(digest, source)
            sizes[digest] = source.size_bytes

    async with trio.open_nursery() as nursery:
        for _ in range(PUTS):
            nursery.start_soon(work)
    await backend.aclose()
    return sizes


def memory_on_s3(root: Path, large_count: int, small_count: int) -> bool:
    """The same, the objects of both on a server."""
    peaks = []
    for kind in ("large", "small"):
        server_folder = root / f"s3-{kind}/server"
        server_folder.mkdir(parents=True)
        with SeaweedFS(server_folder) as server, a_store(server_folder.parent, S3Place(root, server, None)) as store:
            if kind == "large":
                larges = (Large(number, (2048 + number) * MIB) for number in range(large_count))
                sources: Iterator[tuple[Digest, Source]] = ((large.digest, LargeSource(large)) for large in larges)
            else:
                smalls = (small(number) for number in range(small_count))
                sources = ((Digest.of(data), BytesSource(data)) for data in smalls)
            known(store, trio.run(fill, store, sources))
            seconds, size_bytes, peak = verify(store)
        peaks.append(peak)
        count = large_count if kind == "large" else small_count
        print(
            f"S3, {kind}, {count} objects, {size_bytes / MIB:.0f} MiB: {peak / 1e6:.0f} MB, "
            f"{size_bytes / seconds / MIB:.0f} MiB/s, {count / seconds:.1f} objects/s",
            flush=True,
        )
        shutil.rmtree(server_folder.parent)
    return max(peaks) < LIMIT_BYTES


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local", type=int, default=160)
    parser.add_argument("--large", type=int, default=48)
    parser.add_argument("--large-mib", type=int, default=32)
    parser.add_argument("--small", type=int, default=5000)
    parser.add_argument("--memory-large", type=int, default=10)
    parser.add_argument("--memory-small", type=int, default=200_000)
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-s3", action="store_true")
    parser.add_argument("--other", action="store_true")
    options = parser.parse_args()
    if options.other:
        other()
        return
    if options.folder is None:
        parser.error("DIR is missing")
    root: Path = options.folder
    root.mkdir(parents=True, exist_ok=True)
    if not options.skip_speed:
        larges = [Large(number, options.large_mib * MIB) for number in range(max(options.large, options.local))]
        speed_of_local(root, larges[: options.local], options.rounds)
        if not options.skip_s3:
            speed_of_s3(root, larges[: options.large], options.small, options.rounds)
    if not options.skip_memory:
        is_small = memory(root, options.memory_large, options.memory_small)
        if not options.skip_s3:
            is_small &= memory_on_s3(root, options.memory_large, options.memory_small)
        if not is_small:
            sys.exit(f"more than {LIMIT_BYTES / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
