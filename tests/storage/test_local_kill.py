"""`kill -9` of a process that puts into a `LocalBackend`: what is there afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from castore.digest import Digest
from castore.storage.backends.local import LocalBackend

PUT_FOR_EVER = """
import random, sys, trio
from pathlib import Path
from castore.digest import Digest
from castore.storage.backends.local import LocalBackend
from castore.storage.source import BytesSource

async def put_some(backend, seed):
    numbers = random.Random(seed)
    while True:
        data = numbers.randbytes(numbers.randrange(2_000_000))
        digest = Digest.of(data)
        await backend.put(digest, BytesSource(data))
        print(digest, flush=True)

async def main():
    backend = LocalBackend("local", Path(sys.argv[1]))
    await backend.create()
    async with trio.open_nursery() as nursery:
        for seed in range(8):
            nursery.start_soon(put_some, backend, seed)

trio.run(main)
"""

BLOCK_IN_A_PUT = """
import sys, trio
from pathlib import Path
from castore.digest import Digest
from castore.storage.backends.local import LocalBackend
from castore.storage.conformance_sources import BlockingSource

async def main():
    backend = LocalBackend("local", Path(sys.argv[1]))
    await backend.create()
    data = bytes(3_000_000)
    source = BlockingSource(data, 1_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.put, Digest.of(data), source)
        await trio.to_thread.run_sync(source.blocked.wait)
        print("blocked", flush=True)

trio.run(main)
"""


@contextmanager
def running(program: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, str(path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def leftovers(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.name.startswith(".")]


async def test_every_object_that_is_visible_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "objects"
    acknowledged: set[Digest] = set()
    for stop_at in (1, 20, 60):
        with running(PUT_FOR_EVER, path) as process:
            assert process.stdout is not None
            for _ in range(stop_at):
                acknowledged.add(Digest.parse(process.stdout.readline().strip()))
            process.kill()
            acknowledged |= {Digest.parse(line.strip()) for line in process.stdout if line.endswith("\n")}

    backend = LocalBackend("local", path)
    async with backend.list("sha256") as objects:
        infos = [info async for info in objects]
    assert acknowledged <= {info.digest for info in infos}
    for info in infos:
        assert Digest.of(await backend.get(info.digest, offset=0, length=info.size_bytes)) == info.digest
    await backend.sweep(grace_s=0)
    assert leftovers(path) == []


async def test_the_leftover_of_a_dead_process_is_swept_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "objects"
    backend = LocalBackend("local", path)
    with running(BLOCK_IN_A_PUT, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocked\n"
        assert await backend.sweep(grace_s=0) == 0
        assert len(leftovers(path)) == 1
    assert await backend.sweep() == 0, "it is younger than the grace period"
    async with backend.list("sha256") as objects:
        assert [info async for info in objects] == []
    assert await backend.sweep(grace_s=0) == 1
    assert leftovers(path) == []
