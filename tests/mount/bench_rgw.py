"""Measures a mount on a Ceph RGW beside a plain boto3 client in the same run. Not a test: scripts/bench-rgw runs it.

The client puts and gets in parts of 16 MiB, eight at a time, and small objects by eight threads. castore is used as
people do: a copy in and a publish until it is acknowledged; after a remount with an empty cache, reads of whole files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from boto3.s3.transfer import TransferConfig

from tests.mount.store import MountedStore
from tests.places import S3Place
from tests.servers.rgw import Rgw
from tests.servers.s3_server import S3Server

MIB: Final = 1 << 20
LARGE_BYTES: Final = 512 * MIB
SMALL_COUNT: Final = 1000
SMALL_BYTES: Final = 4096
WORKERS: Final = 8

Figures = dict[str, list[float]]
"""Seconds of each round, by what was done."""


def seconds(act: Callable[[], Any]) -> float:
    begin = time.monotonic()
    act()
    return time.monotonic() - begin


def at_once(act: Callable[[Any], Any], over: list[Any]) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(act, over):
            pass


def by_client(server: S3Server, source: Path, scratch: Path, figures: Figures) -> None:
    client = server.client(max_pool_connections=2 * WORKERS)
    parts = TransferConfig(multipart_chunksize=16 * MIB, multipart_threshold=16 * MIB, max_concurrency=WORKERS)
    small = sorted((source / "small").iterdir())

    def put(path: Path) -> None:
        client.put_object(Bucket=server.bucket, Key=f"bench/{path.name}", Body=path.read_bytes())

    def get(path: Path) -> None:
        client.get_object(Bucket=server.bucket, Key=f"bench/{path.name}")["Body"].read()

    large = {"Bucket": server.bucket, "Key": "bench/large", "Config": parts}
    figures["put large"].append(seconds(lambda: client.upload_file(str(source / "large/file"), **large)))
    figures["get large"].append(seconds(lambda: client.download_file(Filename=str(scratch / "back"), **large)))
    figures["put small"].append(seconds(lambda: at_once(put, small)))
    figures["get small"].append(seconds(lambda: at_once(get, small)))
    (scratch / "back").unlink()
    client.delete_object(Bucket=server.bucket, Key="bench/large")
    client.close()


def by_mount(server: S3Server, source: Path, scratch: Path, figures: Figures) -> None:
    with mounted(server, scratch) as store:
        for kind in ("large", "small"):
            figures[f"put {kind}"].append(seconds(lambda: copy_in(store, source / kind, f"{kind}/1")))  # noqa: B023
        store.umount()
        shutil.rmtree(store.root / "cache", ignore_errors=True)
        shutil.rmtree(store.state / "staging", ignore_errors=True)
        store.mount()
        large = store.package("large/1") / "file"
        figures["get large"].append(
            seconds(lambda: subprocess.run(["dd", f"if={large}", "of=/dev/null", "bs=1M", "status=none"], check=True))
        )
        small = sorted(store.package("small/1").iterdir())
        figures["get small"].append(seconds(lambda: at_once(Path.read_bytes, small)))
        figures["verify"].append(seconds(lambda: store.castore("storage", "verify")))


def copy_in(store: MountedStore, source: Path, ref: str) -> None:
    subprocess.run(["cp", "-r", f"{source}/.", store.ingest(ref)], check=True)
    store.castore("package", "publish", ref)


@contextmanager
def mounted(server: S3Server, scratch: Path) -> Iterator[MountedStore]:
    root = scratch / "store"
    root.mkdir()
    store = MountedStore(root, place=S3Place(root, server, None))
    store.mount()
    try:
        yield store
    finally:
        store.close()
        shutil.rmtree(root)


def make_source(source: Path) -> None:
    """New bytes, which no server and no disk has in a cache."""
    for name in ("large", "small"):
        (source / name).mkdir(parents=True)
    with (source / "large/file").open("wb") as file:
        for _ in range(LARGE_BYTES // MIB):
            file.write(os.urandom(MIB))
    for number in range(SMALL_COUNT):
        (source / f"small/{number:04}").write_bytes(os.urandom(SMALL_BYTES))


def show(over: str, client: Figures, castore: Figures) -> None:
    print(f"\n{over}: medians\n\n| work | plain client | castore | time of castore / client |\n|---|---|---|---|")
    for work in ("put large", "get large", "put small", "get small"):
        ours, theirs = statistics.median(castore[work]), statistics.median(client[work])
        count, unit = (LARGE_BYTES / MIB, "MiB/s") if "large" in work else (SMALL_COUNT, "objects/s")
        print(f"| {work} | {count / theirs:.0f} {unit} | {count / ours:.0f} {unit} | {ours / theirs:.2f} |")
    print(f"| verify all of it | - | {statistics.median(castore['verify']):.1f} s | - |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    work = ("put large", "get large", "put small", "get small", "verify")
    with Rgw(given.dir / "server") as server:
        print(f"Ceph RGW {server.version}, {os.cpu_count()} cores, {given.rounds} rounds", flush=True)
        for over, one in (("http", server), ("https", server.tls)):
            client: Figures = {name: [] for name in work}
            castore: Figures = {name: [] for name in work}
            for _ in range(given.rounds):
                make_source(given.dir / "source")
                by_client(one, given.dir / "source", given.dir, client)
                by_mount(one, given.dir / "source", given.dir, castore)
                shutil.rmtree(given.dir / "source")
            show(over, client, castore)


if __name__ == "__main__":
    main()
