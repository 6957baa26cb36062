"""Damage injected into a store on S3: all of it is found and nothing else, whatever happens to the runs; then mended.

python -m tests.verify.injection [--objects N] [--seed N]    on a server that is started for it
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import trio

from castore.digest import Digest
from castore.storage.source import BytesSource
from tests.damage import read_object, remove, replace
from tests.places import S3Place
from tests.published import PublishedStore, summary_of
from tests.servers.seaweedfs import SeaweedFS

FLIPPED, TRUNCATED, MISSING, SWAPPED = 7, 5, 4, 3
DAMAGED: Final = FLIPPED + TRUNCATED + MISSING + SWAPPED
KILLS: Final = 10
PUTS: Final = 16
RUN_SECONDS: Final = 1800.0


def contents(count: int) -> Iterator[bytes]:
    """Bytes of files that all differ, some of them longer than others."""
    for number in range(count):
        yield (b"%d " % number) * (200 + number % 1000)


async def fill(store: PublishedStore, count: int) -> list[Digest]:
    """Put that many objects in every backend of a store."""
    queue, waiting = trio.open_memory_channel[bytes](PUTS)
    summaries = []

    async def work() -> None:
        async for data in waiting:
            summary = summary_of(data)
            for backend in store.backends.values():
                await backend.put(summary.digest, BytesSource(data))
            summaries.append(summary)

    async with trio.open_nursery() as nursery:
        for _ in range(PUTS):
            nursery.start_soon(work)
        async with queue:
            for data in contents(count):
                await queue.send(data)
    store.add_locations([(summary, backend_id) for summary in summaries for backend_id in store.backends])
    return [summary.digest for summary in summaries]


def inject(store: PublishedStore, digests: list[Digest], draws: random.Random) -> dict[str, str]:
    """Damage objects of the backend `first`; digest -> the reason that verify has to give."""
    settings = store.config.backends["first"]
    victims = draws.sample(digests, DAMAGED)
    expected: dict[str, str] = {}
    for number, victim in enumerate(victims):
        data = bytearray(read_object(settings, victim))
        if number < FLIPPED:
            place = draws.randrange(len(data) * 8)
            data[place // 8] ^= 1 << place % 8
            reason = "digest_mismatch"
        elif number < FLIPPED + TRUNCATED:
            del data[draws.randrange(len(data)) :]
            reason = "size_mismatch"
        elif number < FLIPPED + TRUNCATED + MISSING:
            remove(settings, victim)
            expected[str(victim)] = "missing"
            continue
        else:
            other = next(one for one in draws.sample(digests, len(victims) + 1) if one not in victims)
            size = len(data)
            data = bytearray(read_object(settings, other))
            reason = "digest_mismatch" if len(data) == size else "size_mismatch"
        replace(settings, victim, bytes(data))
        expected[str(victim)] = reason
    return expected


class Commands:
    """`castore` with the configuration of a store."""

    def __init__(self, store: PublishedStore) -> None:
        root = Path(__file__).resolve().parents[2]
        self._command = [sys.executable, "-m", "castore.cli", "--config", str(store.config_path)]
        self._environ = {**os.environ, "PYTHONPATH": str(root)}

    def run(self, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        """Run it to its end: the exit code, and the documents, the summary last."""
        done = subprocess.run(
            [*self._command, *arguments, "--json"],
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_SECONDS,
        )
        assert done.stdout, done.stderr
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    def kill_after(self, lines: int, *arguments: str) -> int:
        """Kill it with SIGKILL after so many lines of its output, or at its end; how many came."""
        with subprocess.Popen(
            [*self._command, *arguments, "--json"],
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            count = 0
            while count < lines and process.stdout.readline():
                count += 1
            process.kill()
        return count


def failures(documents: list[dict[str, Any]]) -> dict[str, str]:
    """Digest -> reason of what a verify said is failed."""
    return {one["digest"]: one["reason"] for one in documents if one.get("status") == "failed"}


def check(store: PublishedStore, digests: list[Digest], *, seed: int) -> Iterator[str]:
    """All of it, on a store that is filled; says how far it is. Raises AssertionError."""
    draws = random.Random(seed)
    expected = inject(store, digests, draws)
    castore = Commands(store)
    yield f"{len(expected)} of {len(digests)} objects damaged: {dict(Counter(expected.values()))}"
    for _ in range(2):
        code, documents = castore.run("storage", "verify", "--backend", "first")
        assert (code, documents[-1]["looked_at"]) == (1, len(digests))
        assert failures(documents) == expected
    yield "all found, and nothing else, twice"

    before = {key: status for key, status in store.statuses().items() if key[1] == "first"}
    store.execute("UPDATE storage_locations SET status = 'stored', reason = '', verified_at_ns = 0")
    began_ns = time.time_ns()
    seen = 0
    for _ in range(KILLS):
        seen += castore.kill_after(draws.randint(1, len(digests) // KILLS), "storage", "verify", "--backend", "first")
    left = store.execute(
        "SELECT count(*) FROM storage_locations WHERE backend_id = 'first' AND verified_at_ns = 0",
    )[0][0]
    # What was said was recorded, and none of it is looked at again while there are others.
    assert len(digests) - left >= seen
    code, documents = castore.run("storage", "verify", "--backend", "first")
    assert code == 1
    unseen = {one["digest"] for one in documents[: max(0, left - 64)]}
    assert len(unseen) == max(0, left - 64), "what was not looked at comes first"
    after = {key: status for key, status in store.statuses().items() if key[1] == "first"}
    assert after == before
    oldest = store.execute("SELECT min(verified_at_ns) FROM storage_locations WHERE backend_id = 'first'")[0][0]
    assert oldest >= began_ns
    yield f"killed {KILLS} times, {len(digests) - left} done by then; the result is the same, and none is skipped"

    code, documents = castore.run("storage", "repair", "--backend", "first")
    assert code == 0
    assert {one["digest"] for one in documents if one.get("result") == "repaired"} == expected.keys()
    code, documents = castore.run("storage", "verify", "--backend", "first")
    assert (code, documents[-1]["verified"]) == (0, len(digests))
    yield f"{len(expected)} repaired from the second backend; clean"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--objects", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as relays:
        root = Path(folder)
        (root / "server").mkdir()
        with SeaweedFS(root / "server") as server:
            store = PublishedStore(root, S3Place(root, server, relays), "first", "second")
            digests: list[Digest] = []

            async def prepare() -> None:
                await store.create()
                digests.extend(await fill(store, options.objects))
                for backend in store.backends.values():
                    await backend.aclose()

            trio.run(prepare)
            for line in check(store, digests, seed=options.seed):
                print(line, flush=True)


if __name__ == "__main__":
    main()
