"""The most memory that a process needs to put and get one large object. What the server needs is not counted.

python -m tests.bench.peak_memory FOLDER [--mib N] [--transfer native|aioboto3]
    starts a server in the folder, prints the figures, and ends with 1 when they are above what is promised
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Final

import trio

from castore.config import S3Settings
from castore.config_values import SecretRef
from castore.digest import Digest
from castore.storage.open import open_backend
from castore.storage.spi import StorageBackend
from tests.servers.s3_server import S3Server
from tests.servers.seaweedfs import SeaweedFS

LIMIT_BYTES: Final = 200 * 1000 * 1000
"""What one object may take, whatever its size."""
PART_BYTES: Final = 16 << 20
"""The default of `multipart_chunk_bytes`."""
TRANSFERS: Final = ("native", "aioboto3")
"""The values of the setting `transfer`."""
RANGE_BYTES: Final = 8 << 20
RANGES: Final = 8
"""Of which so many are read at a time, into buffers that are used again: as a sequential reader of a mount has it."""

_MIB: Final = 1 << 20
_BLOCK: Final = random.Random(0).randbytes(_MIB)
_STAMP_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Figures:
    """Peaks of the resident memory of the client, from its start on, in bytes; and what the transfers took."""

    idle_bytes: int
    put_bytes: int
    get_bytes: int
    put_s: float
    get_s: float


class Synthetic(io.RawIOBase):
    """As many MiB as it is told, each with its number before random bytes; made while it is read."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self._mib = mib
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        number, start = divmod(self._position, _MIB)
        if number == self._mib:
            return 0
        target = memoryview(buffer).cast("B")[: _MIB - start]  # type: ignore[arg-type]
        target[:] = memoryview(_BLOCK)[start : start + len(target)]
        stamp = number.to_bytes(_STAMP_BYTES)[start : start + len(target)]
        target[: len(stamp)] = stamp
        self._position += len(target)
        return len(target)


@dataclass(frozen=True, slots=True)
class SyntheticSource:
    """A source of a whole number of MiB that takes no room anywhere."""

    mib: int

    @property
    def size_bytes(self) -> int:
        return self.mib * _MIB

    def open(self) -> BinaryIO:
        return io.BufferedReader(Synthetic(self.mib), _MIB)


def measure(server: S3Server, mib: int, transfer: str) -> Figures:
    """Put and get an object of that size in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.peak_memory", "client", "--mib", str(mib), "--transfer", transfer],
        env={**os.environ, **environment_of(server)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return Figures(**json.loads(done.stdout))


def environment_of(server: S3Server) -> dict[str, str]:
    """From which `settings_of_client` knows the server."""
    return {
        "BENCH_ENDPOINT": server.endpoint_url,
        "BENCH_BUCKET": server.bucket,
        "BENCH_REGION": server.region,
        "BENCH_ACCESS_KEY": server.access_key,
        "BENCH_SECRET_KEY": server.secret_key,
    }


def settings_of_client(transfer: str) -> S3Settings:
    """The defaults of a configuration, but for `transfer`."""
    return S3Settings(
        backend_id="bench",
        endpoint_url=os.environ["BENCH_ENDPOINT"],
        region=os.environ["BENCH_REGION"],
        bucket=os.environ["BENCH_BUCKET"],
        key_prefix="bench",
        access_key_ref=SecretRef("env:BENCH_ACCESS_KEY", "backends.bench.access_key_ref"),
        secret_key_ref=SecretRef("env:BENCH_SECRET_KEY", "backends.bench.secret_key_ref"),
        storage_class="STANDARD",
        sse=None,
        multipart_threshold_bytes=PART_BYTES,
        multipart_chunk_bytes=PART_BYTES,
        transfer=transfer,
    )


def peak_bytes() -> int:
    # Not `ru_maxrss`, which begins with that of the parent.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


async def be_client(mib: int, transfer: str) -> Figures:
    backend = open_backend(settings_of_client(transfer))
    small, large = Digest.of(b"small"), Digest.of(b"large")
    await backend.put(small, SyntheticSource(1))
    idle = peak_bytes()
    begin = time.perf_counter()
    await backend.put(large, SyntheticSource(mib))
    put_s, put = time.perf_counter() - begin, peak_bytes()
    begin = time.perf_counter()
    await read_all(backend, large, mib)
    get_s, get = time.perf_counter() - begin, peak_bytes()
    await backend.delete(large)
    await backend.aclose()
    return Figures(idle, put, get, put_s, get_s)


async def read_all(backend: StorageBackend, digest: Digest, mib: int) -> None:
    """Get it in ranges, several at a time. Raises ValueError when a byte of it is wrong."""
    offsets = iter(range(0, mib * _MIB, RANGE_BYTES))

    async def read_some() -> None:
        buffer = bytearray(RANGE_BYTES)
        for offset in offsets:
            length = min(RANGE_BYTES, mib * _MIB - offset)
            view = await backend.get(digest, offset=offset, length=length, into=buffer)
            for start in range(0, length, _MIB):
                stamp = (offset + start) // _MIB
                if view[start : start + _STAMP_BYTES] != stamp.to_bytes(_STAMP_BYTES):
                    raise ValueError(f"MiB {stamp} is another")
                if view[start + _STAMP_BYTES : start + _MIB] != memoryview(_BLOCK)[_STAMP_BYTES:]:
                    raise ValueError(f"MiB {stamp} has other bytes")

    async with trio.open_nursery() as nursery:
        for _ in range(RANGES):
            nursery.start_soon(read_some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--mib", type=int, default=4096)
    parser.add_argument("--transfer", choices=TRANSFERS, default=TRANSFERS[0])
    given = parser.parse_args()
    if given.folder == "client":
        print(json.dumps(asdict(trio.run(be_client, given.mib, given.transfer))))
        return
    with SeaweedFS(Path(given.folder).resolve()) as server:
        figures = measure(server, given.mib, given.transfer)
    for name, peak in (("idle", figures.idle_bytes), ("put", figures.put_bytes), ("put and get", figures.get_bytes)):
        print(f"{name:12} {peak / 1e6:6.1f} MB at most")
    print(f"{given.mib} MiB put in {figures.put_s:.1f} s, got in {figures.get_s:.1f} s")
    sys.exit(figures.get_bytes >= LIMIT_BYTES)


if __name__ == "__main__":
    main()
