"""How much the ways to an S3 server cost: this project's two, and a bare client. Tests nothing; see docs/BENCHMARKS.md.

python -m tests.bench.transfer DIR [--rounds N] [--json FILE]

Each contender is a process of its own, which lives through all rounds; in each round every contender does every
piece of work in turn, so that a busy host disturbs all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import trio

from castore import __version__
from castore.config import S3Settings
from castore.config_values import SecretRef
from castore.digest import BlobHasher, BlobSummary, Digest
from castore.storage.layout import key_of
from castore.storage.open import open_backend
from castore.storage.source import BytesSource, FileSource
from tests.servers.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, free_ports
from tests.servers.seaweedfs import SeaweedFS

MIB: Final = 1 << 20
LARGE_BYTES: Final = 512 * MIB
RANGE_BYTES: Final = 8 * MIB
PART_BYTES: Final = 16 * MIB
RANGES_AT_ONCE: Final = 8
PARTS_AT_ONCE: Final = 4
SMALL_BYTES: Final = 4096
SMALL_GETS: Final = 1000
SMALL_PUTS: Final = 400
SMALL_AT_ONCE: Final = 8

CONTENDERS: Final = ("bare", "aioboto3", "native")
WORK: Final = ("get-large", "get-small", "get-small-8", "put-small-8", "put-large")
OVER_TLS: Final = ("get-large", "get-small")


def small(number: int, salt: str) -> bytes:
    return f"{number} {salt}".encode().ljust(SMALL_BYTES, b".")


SMALL: Final = small(0, "to get")


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    figures: dict[str, float] = {}
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    yield figures
    after = resource.getrusage(resource.RUSAGE_SELF)
    figures["wall"] = time.perf_counter() - start
    figures["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    figures["faults"] = after.ru_minflt - before.ru_minflt


# contenders: each reads names of work from standard input, and writes figures


def work_by_castore(endpoint_url: str, folder: Path, transfer: str) -> None:
    settings = S3Settings(
        backend_id="bench",
        endpoint_url=endpoint_url,
        region="us-east-1",
        bucket=BUCKET,
        key_prefix="bench",
        access_key_ref=SecretRef("file:access", "access", folder / "access"),
        secret_key_ref=SecretRef("file:secret", "secret", folder / "secret"),
        storage_class="STANDARD",
        sse=None,
        multipart_threshold_bytes=PART_BYTES,
        multipart_chunk_bytes=PART_BYTES,
        ca_bundle=folder / "server.pem" if endpoint_url.startswith("https:") else None,
        transfer=transfer,
    )
    summary = summary_of(folder / "large")
    large, little = summary.digest, Digest.of(SMALL)

    async def serve() -> None:
        backend = open_backend(settings)
        buffers = [bytearray(RANGE_BYTES) for _ in range(RANGES_AT_ONCE)]

        async def get_large() -> None:
            async def some(lane: int) -> None:
                for offset in range(lane * RANGE_BYTES, LARGE_BYTES, RANGES_AT_ONCE * RANGE_BYTES):
                    await backend.get(large, offset=offset, length=RANGE_BYTES, into=buffers[lane])

            await lanes(some, RANGES_AT_ONCE)

        async def get_small(count: int = SMALL_GETS) -> None:
            buffer = bytearray(SMALL_BYTES)
            for _ in range(count):
                await backend.get(little, offset=0, length=SMALL_BYTES, into=buffer)

        async def get_small_8() -> None:
            await lanes(lambda _: get_small(SMALL_GETS // SMALL_AT_ONCE), SMALL_AT_ONCE)

        async def put_small_8() -> None:
            salt = os.urandom(8).hex()

            async def some(lane: int) -> None:
                for number in range(lane, SMALL_PUTS, SMALL_AT_ONCE):
                    body = small(number, salt)
                    await backend.put(Digest.of(body), BytesSource(body))

            await lanes(some, SMALL_AT_ONCE)

        async def put_large() -> None:
            await backend.put(large, FileSource(folder / "large", summary))

        async def lanes(some: Callable[[int], Awaitable[None]], count: int) -> None:
            async with trio.open_nursery() as nursery:
                for lane in range(count):
                    nursery.start_soon(some, lane)

        do = {
            "get-large": get_large,
            "get-small": get_small,
            "get-small-8": get_small_8,
            "put-small-8": put_small_8,
            "put-large": put_large,
        }
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            with measured() as figures:
                await do[line.strip()]()
            print(json.dumps(figures), flush=True)
        await backend.aclose()

    trio.run(serve)


def work_by_bare_client(endpoint_url: str, folder: Path) -> None:
    """One aioboto3 client, whose answers are read as bytes: what its documentation shows."""
    import aioboto3
    from aiobotocore.config import AioConfig

    large, little = object_key(summary_of(folder / "large").digest), object_key(Digest.of(SMALL))

    async def serve() -> None:
        config = AioConfig(
            s3={"addressing_style": "path"},
            max_pool_connections=64,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        async with aioboto3.Session().client(
            "s3",
            endpoint_url=endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            verify=str(folder / "server.pem"),
            config=config,
        ) as client:

            async def get(key: str, offset: int, length: int) -> None:
                span = f"bytes={offset}-{offset + length - 1}"
                answer = await client.get_object(Bucket=BUCKET, Key=key, Range=span)
                assert len(await answer["Body"].read()) == length

            async def get_large() -> None:
                async def some(lane: int) -> None:
                    for offset in range(lane * RANGE_BYTES, LARGE_BYTES, RANGES_AT_ONCE * RANGE_BYTES):
                        await get(large, offset, RANGE_BYTES)

                await asyncio.gather(*(some(lane) for lane in range(RANGES_AT_ONCE)))

            async def get_small(count: int = SMALL_GETS) -> None:
                for _ in range(count):
                    await get(little, 0, SMALL_BYTES)

            async def get_small_8() -> None:
                await asyncio.gather(*(get_small(SMALL_GETS // SMALL_AT_ONCE) for _ in range(SMALL_AT_ONCE)))

            async def put_small_8() -> None:
                salt = os.urandom(8).hex()

                async def some(lane: int) -> None:
                    for number in range(lane, SMALL_PUTS, SMALL_AT_ONCE):
                        body = small(number, salt)
                        key = f"bare/{hashlib.sha256(body).hexdigest()}"
                        await client.put_object(Bucket=BUCKET, Key=key, Body=body)

                await asyncio.gather(*(some(lane) for lane in range(SMALL_AT_ONCE)))

            async def put_large() -> None:
                upload = await client.create_multipart_upload(Bucket=BUCKET, Key="bare/large")
                names = {"Bucket": BUCKET, "Key": "bare/large", "UploadId": upload["UploadId"]}
                turns = asyncio.Semaphore(PARTS_AT_ONCE)

                async def some(number: int) -> dict[str, Any]:
                    async with turns:
                        with (folder / "large").open("rb") as stream:
                            stream.seek((number - 1) * PART_BYTES)
                            body = stream.read(PART_BYTES)
                        answer = await client.upload_part(**names, PartNumber=number, Body=body)
                        return {"PartNumber": number, "ETag": answer["ETag"]}

                parts = await asyncio.gather(*(some(number) for number in range(1, LARGE_BYTES // PART_BYTES + 1)))
                await client.complete_multipart_upload(**names, MultipartUpload={"Parts": list(parts)})

            do = {
                "get-large": get_large,
                "get-small": get_small,
                "get-small-8": get_small_8,
                "put-small-8": put_small_8,
                "put-large": put_large,
            }
            while line := await asyncio.to_thread(sys.stdin.readline):
                with measured() as figures:
                    await do[line.strip()]()
                print(json.dumps(figures), flush=True)

    asyncio.run(serve())


# the round


class Contender:
    """A process that works when it is told to."""

    def __init__(self, name: str, endpoint_url: str, folder: Path) -> None:
        self.name = name
        self.figures: dict[str, list[dict[str, float]]] = {}
        command = [sys.executable, "-m", "tests.bench.transfer", str(folder), "--serve", name, endpoint_url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def work(self, piece: str, *, counts: bool) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{piece}\n")
        self._process.stdin.flush()
        figures = json.loads(self._process.stdout.readline())
        if counts:
            self.figures.setdefault(piece, []).append(figures)

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def medians(self, piece: str) -> dict[str, float]:
        return {key: statistics.median(one[key] for one in self.figures[piece]) for key in self.figures[piece][0]}


def run(folder: Path, rounds: int) -> dict[str, Any]:
    """Medians by scheme, piece of work and contender."""
    make_files(folder)
    https_port = free_ports(1)[0]
    files = {"cert": folder / "server.pem", "key": folder / "server.key"}
    options = {"s3.port.https": https_port, **{f"s3.{name}.file": path for name, path in files.items()}}
    results: dict[str, Any] = {"castore": __version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    with SeaweedFS(folder / "server", options=options) as server, ExitStack() as stack:
        results["server"] = f"SeaweedFS {server.version}"
        client = server.client()
        client.upload_file(str(folder / "large"), BUCKET, object_key(summary_of(folder / "large").digest))
        client.put_object(Bucket=BUCKET, Key=object_key(Digest.of(SMALL)), Body=SMALL)
        client.close()
        schemes = {"http": (server.endpoint_url, WORK), "https": (f"https://127.0.0.1:{https_port}", OVER_TLS)}
        for scheme, (endpoint_url, work) in schemes.items():
            contenders = [Contender(name, endpoint_url, folder) for name in CONTENDERS]
            for contender in contenders:
                stack.callback(contender.end)
            for number in range(rounds + 1):  # the first only warms up
                for piece in work:
                    for contender in contenders:
                        contender.work(piece, counts=number > 0)
            results[scheme] = {piece: {one.name: one.medians(piece) for one in contenders} for piece in work}
    return results


def show(results: dict[str, Any]) -> None:
    units = {"get-small": SMALL_GETS, "get-small-8": SMALL_GETS, "put-small-8": SMALL_PUTS}
    print(f"{'':20}{'':10}{'wall':>10}{'CPU':>10}{'x bare':>8}{'page faults':>13}")
    for scheme in ("http", "https"):
        for piece, by_name in results[scheme].items():
            count = units.get(piece)
            factor, unit = (1e3 / count, "ms each") if count else (1.0, "s")
            for name, figures in by_name.items():
                ratio = figures["wall"] / by_name["bare"]["wall"]
                wall, cpu = figures["wall"] * factor, figures["cpu"] * factor
                label = f"{scheme} {piece}"
                print(f"{label:20}{name:10}{wall:10.3f}{cpu:10.3f}{ratio:8.2f}{figures['faults']:13.0f}  {unit}")


def make_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "access").write_text(ACCESS_KEY)
    (folder / "secret").write_text(SECRET_KEY)
    piece = random.Random(0).randbytes(MIB)
    with (folder / "large").open("wb") as stream:
        for number in range(LARGE_BYTES // MIB):
            stream.write(number.to_bytes(8, "big") + piece[8:])
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", folder / "server.key", "-out", folder / "server.pem", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )


def summary_of(path: Path) -> BlobSummary:
    hasher = BlobHasher()
    with path.open("rb") as stream:
        while piece := stream.read(MIB):
            hasher.update(piece)
    return hasher.finish()


def object_key(digest: Digest) -> str:
    return f"bench/{key_of(digest)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, metavar=("CONTENDER", "URL"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.serve:
        name, url = given.serve
        if name == "bare":
            work_by_bare_client(url, folder)
        else:
            work_by_castore(url, folder, name)
        return
    results = run(folder, given.rounds)
    show(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
