"""The processor time of one get and one put: castore's whole path, a plain aioboto3 client, and a signer with aiohttp.

python -m tests.bench.request_cpu FOLDER [--rounds N]
    starts a server in the folder, and prints a table: milliseconds of processor time for one request, in brackets
    those until it was done, and castore's ratios. All in one run, in turn, so that a busy host is unfair to none

castore has two data paths, by its setting `transfer`. The other two do less: no retries, no deadlines, no MD5 and no
proof of what was stored. They are what it is held against. What counts is the time of all threads of this process; the
server is another one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import aioboto3
import aiohttp
import trio
from aiobotocore.config import AioConfig
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from castore.digest import Digest
from castore.storage.layout import key_of
from castore.storage.open import open_backend
from castore.storage.source import BytesSource
from tests.bench.peak_memory import environment_of, settings_of_client
from tests.servers.s3_server import S3Server
from tests.servers.seaweedfs import SeaweedFS

ROUNDS: Final = 5
WARM_UP: Final = 3
"""Requests that do not count, at the beginning of each turn: connections, and what is loaded by the first."""


@dataclass(frozen=True, slots=True)
class Load:
    """Objects of one size, and how many of them one turn puts and gets, one after the other."""

    name: str
    size_bytes: int
    count: int

    def blobs(self) -> Iterator[tuple[Digest, bytes]]:
        """The same each time."""
        generator = random.Random(self.name)
        for _ in range(WARM_UP + self.count):
            data = generator.randbytes(self.size_bytes)
            yield Digest.of(data), data


LOADS: Final = (Load("4 KiB", 4096, 200), Load("8 MiB", 8 << 20, 12))


@dataclass(slots=True)
class Timer:
    """Adds up the processor time and the time of the requests between the warm-up and the end."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    _begun: tuple[float, float] = field(default=(0.0, 0.0))

    def begin(self) -> None:
        self._begun = time.process_time(), time.perf_counter()

    def end(self) -> None:
        self.cpu_s = time.process_time() - self._begun[0]
        self.wall_s = time.perf_counter() - self._begun[1]


Put = Callable[[Digest, bytes], Awaitable[None]]
Get = Callable[[Digest, int], Awaitable[bytes | memoryview]]


async def transfer(load: Load, blobs: list[tuple[Digest, bytes]], put: Put, get: Get) -> dict[str, Timer]:
    """Put all, then get all; the same for whoever does it."""
    timers = {"put": Timer(), "get": Timer()}
    for number, (digest, data) in enumerate(blobs):
        if number == WARM_UP:
            timers["put"].begin()
        await put(digest, data)
    timers["put"].end()
    for number, (digest, data) in enumerate(blobs):
        if number == WARM_UP:
            timers["get"].begin()
        got = await get(digest, load.size_bytes)
        if len(got) != len(data):
            raise ValueError(f"{len(got)} bytes instead of {len(data)}")
    timers["get"].end()
    if got != data:
        raise ValueError("other bytes came back")
    return timers


def with_castore(transfer_by: str, server: S3Server, load: Load, blobs: list[tuple[Digest, bytes]]) -> dict[str, Timer]:
    async def run() -> dict[str, Timer]:
        backend = open_backend(settings_of_client(transfer_by))
        buffer = bytearray(load.size_bytes)

        async def put(digest: Digest, data: bytes) -> None:
            await backend.put(digest, BytesSource(data))

        async def get(digest: Digest, size: int) -> memoryview:
            return await backend.get(digest, offset=0, length=size, into=buffer)

        try:
            return await transfer(load, blobs, put, get)
        finally:
            await backend.aclose()

    return trio.run(run)


def with_aioboto3(server: S3Server, load: Load, blobs: list[tuple[Digest, bytes]]) -> dict[str, Timer]:
    async def run() -> dict[str, Timer]:
        session: Any = aioboto3.Session(
            aws_access_key_id=server.access_key, aws_secret_access_key=server.secret_key, region_name=server.region
        )
        config = AioConfig(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        async with session.client("s3", endpoint_url=server.endpoint_url, config=config) as client:

            async def put(digest: Digest, data: bytes) -> None:
                await client.put_object(Bucket=server.bucket, Key=f"aioboto3/{key_of(digest)}", Body=data)

            async def get(digest: Digest, size: int) -> bytes:
                response = await client.get_object(Bucket=server.bucket, Key=f"aioboto3/{key_of(digest)}")
                async with response["Body"] as body:
                    got: bytes = await body.read()
                return got

            return await transfer(load, blobs, put, get)

    return asyncio.run(run())


def with_signer(server: S3Server, load: Load, blobs: list[tuple[Digest, bytes]]) -> dict[str, Timer]:
    async def run() -> dict[str, Timer]:
        signer: Any = S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", server.region)

        def signed(method: str, digest: Digest, data: bytes = b"") -> tuple[str, dict[str, str]]:
            url = f"{server.endpoint_url}/{server.bucket}/signer/{key_of(digest)}"
            request: Any = AWSRequest(method, url, data=data)
            request.headers["X-Amz-Content-SHA256"] = hashlib.sha256(data).hexdigest()
            signer.add_auth(request)
            return url, dict(request.headers.items())

        async with aiohttp.ClientSession(skip_auto_headers=["Content-Type"]) as session:

            async def put(digest: Digest, data: bytes) -> None:
                url, headers = signed("PUT", digest, data)
                async with session.put(url, data=data, headers=headers) as response:
                    response.raise_for_status()

            async def get(digest: Digest, size: int) -> bytes:
                url, headers = signed("GET", digest)
                async with session.get(url, headers=headers) as response:
                    response.raise_for_status()
                    return await response.read()

            return await transfer(load, blobs, put, get)

    return asyncio.run(run())


RIVALS: Final[dict[str, Callable[[S3Server, Load, list[tuple[Digest, bytes]]], dict[str, Timer]]]] = {
    "castore": partial(with_castore, "native"),
    "castore, aioboto3": partial(with_castore, "aioboto3"),
    "aioboto3": with_aioboto3,
    "signer + aiohttp": with_signer,
}


def measure(server: S3Server, rounds: int) -> dict[tuple[str, str, str], list[Timer]]:
    """All turns by (load, operation, rival)."""
    os.environ.update(environment_of(server))
    turns: dict[tuple[str, str, str], list[Timer]] = {}
    for load in LOADS:
        blobs = list(load.blobs())
        for number in range(rounds):
            rivals = list(RIVALS)
            for rival in rivals[number % len(rivals) :] + rivals[: number % len(rivals)]:
                for operation, timer in RIVALS[rival](server, load, blobs).items():
                    turns.setdefault((load.name, operation, rival), []).append(timer)
    return turns


def table(turns: dict[tuple[str, str, str], list[Timer]]) -> Iterator[str]:
    """Medians for each request, and castore's ratio to each of the others: the median of the rounds' ratios."""
    rivals = list(RIVALS)
    yield "| request | " + " | ".join(rivals) + " | " + " | ".join(f"x {rival}" for rival in rivals[1:]) + " |"
    yield "|---" * (2 * len(rivals)) + "|"
    for load in LOADS:
        for operation in ("put", "get"):
            of = {rival: turns[load.name, operation, rival] for rival in RIVALS}
            cells = [
                f"{_median(timer.cpu_s for timer in timers) / load.count * 1e3:.2f} "
                f"({_median(timer.wall_s for timer in timers) / load.count * 1e3:.1f})"
                for timers in of.values()
            ]
            own, *others = of.values()
            ratios = [_median(mine.cpu_s / its.cpu_s for mine, its in zip(own, other, strict=True)) for other in others]
            yield f"| {operation} {load.name} | {' | '.join(cells)} | " + " | ".join(f"{x:.2f}" for x in ratios) + " |"


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    with SeaweedFS(given.folder.resolve()) as server:
        for line in table(measure(server, given.rounds)):
            print(line)


if __name__ == "__main__":
    main()
