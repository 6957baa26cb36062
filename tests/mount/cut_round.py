"""Rounds of `crash_round` with the objects on an S3 server that is killed, stopped, or answers 503 half of the time.

A round draws what is wrong with the server, when that begins, and whether it ends before the daemon is killed or
after the next one is there. What was closed is read while the server is gone; the rest once it is back.
"""

from __future__ import annotations

import errno
import json
import random
import select
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Final
from urllib.parse import urlsplit

from tests.mount.crash_objects import BLOBS, BucketObjects
from tests.mount.crash_round import CrashRounds, Told, rows, run_rounds, tree_of
from tests.mount.parts_place import PART, UNAVAILABLE, InParts
from tests.mount.store import MountedStore, wait_until
from tests.servers.fault_proxy import Exchange, FaultProxy
from tests.servers.rgw import Rgw
from tests.servers.s3_server import LocalServer
from tests.servers.seaweedfs import SeaweedFS

TROUBLES: Final = ("killed", "stopped", "503")
TROUBLE_SECONDS: Final = 3.0
"""The longest that it lasts while the daemon lives: some tries of a put, and a wait of a publish."""


class Trouble:
    """One server behind one proxy, and what can be wrong with it."""

    def __init__(self, server: LocalServer, proxy: FaultProxy, seed: int) -> None:
        self._server = server
        self._proxy = proxy
        self._rng = random.Random(seed)
        self._now = ""

    def begin(self, what: str) -> None:
        """From now on, one of TROUBLES."""
        self._now = what
        if what == "killed":
            self._server.kill()
            self._proxy.cut()
        elif what == "stopped":
            self._server.pause()
        else:
            self._proxy.break_with(self._answer_503_half_of_the_time)

    def end(self) -> None:
        """The server serves, if it does not."""
        what, self._now = self._now, ""
        if what == "killed":
            self._server.revive()
            self._proxy.restore()
        elif what == "stopped":
            self._server.resume()
        elif what:
            assert self._proxy.met, "nobody was answered 503"
            self._proxy.break_with(_pass_on, times=0)

    @property
    def is_on(self) -> bool:
        return bool(self._now)

    def _answer_503_half_of_the_time(self, exchange: Exchange) -> bool:
        """Some of them after the server has done what was asked for."""
        draw = self._rng.random()
        answer = exchange.ask() if draw >= 0.25 else UNAVAILABLE
        exchange.answer(answer if draw >= 0.5 else UNAVAILABLE)
        return True


def _pass_on(exchange: Exchange) -> bool:
    exchange.answer(exchange.ask())
    return True


class CutRounds(CrashRounds):
    """Rounds on one store. `store` is mounted at the start, and its place is `place`."""

    largest_bytes = 2 * PART + PART // 2
    most_steps = 25
    patient = True

    def __init__(
        self, store: MountedStore, seed: int, *, place: InParts, trouble: Trouble, troubles: tuple[str, ...] = TROUBLES
    ) -> None:
        self._bucket = BucketObjects(place.outside, place.bucket, place.prefix)
        super().__init__(store, seed, self._bucket)
        self.trouble = trouble
        self.troubles = troubles

    def run(self) -> str:
        """One round; one line of what it met."""
        what = self.rng.choice(self.troubles)
        lasts = self.rng.random() < 0.6
        self._plan = (what, self.rng.randint(0, 25), self.rng.uniform(0.1, TROUBLE_SECONDS), lasts)
        told = self._write_until_killed(in_publish=self.rng.random() < 0.5)
        self.store.mount()
        if self.trouble.is_on:
            self._check_what_needs_no_server(told)
            self.trouble.end()
        outcome = self._check(told)
        self._finish(told)
        self._check_nothing_is_left()
        step = "publishing" if told.publishing else told.step or "between steps"
        when = "still" if lasts else "no longer"
        return (
            f"killed in {step}, the server {when} {what}: {outcome}; {len(told.tree)} paths, "
            f"{len(told.published)} versions published before, {self.orphan_count()} objects for gc"
        )

    def _listen(self, lines: IO[bytes], told: Told, in_publish: bool) -> None:
        """Hear the writer out, with the trouble in between; it may wait for the server, and say nothing."""
        what, steps, seconds, lasts = self._plan
        self._hear(lines, told, steps, time.monotonic() + TROUBLE_SECONDS)
        self.trouble.begin(what)
        self._hear(lines, told, 1 << 20, time.monotonic() + seconds)
        if not lasts:
            self.trouble.end()
            self._hear(lines, told, self.rng.randint(0, 50), time.monotonic() + TROUBLE_SECONDS)

    def _hear(self, lines: IO[bytes], told: Told, count: int, until: float) -> None:
        while count and select.select([lines], [], [], max(0.0, until - time.monotonic()))[0]:
            line = lines.readline()
            assert line, "the writer ended by itself"
            told.hear(json.loads(line))
            assert told.died is None, f"the writer met errno {told.died}"
            count -= 1

    def _check_published(self, refs: list[str]) -> None:
        """Once the server is back: for some seconds the daemon may not ask it yet, and a read is EIO."""
        wait_until(lambda: self._can_be_read(refs), f"{refs} can be read")
        super()._check_published(refs)

    def _can_be_read(self, refs: list[str]) -> bool:
        try:
            for ref in refs:
                tree_of(self.store.package(ref))
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            return False
        return True

    def _check_log(self) -> None:
        """Who waits for the server hears of it, and nobody else."""
        told = [line for line in self.store.log().splitlines() if "mount.guard" in line]
        known = ("mount.guard: fsyncdir: backend main: put ", "mount.guard: read: backend main: get ")
        assert [line for line in told if not any(each in line for each in known)] == []

    def _check_what_needs_no_server(self, told: Told) -> None:
        if told.ref and not self.store.package(told.ref).exists():
            self._check_ingest(told, self.store.mnt / "ingest" / told.ref)
        assert (self.published.keys() - {told.ref}) <= set(self._listed())

    def _listed(self) -> list[str]:
        return [package["ref"] for package in json.loads(self.store.castore("package", "list", "--json"))["packages"]]

    def _check_nothing_is_left(self) -> None:
        super()._check_nothing_is_left()
        assert self._known() <= self._bucket.names(BLOBS), "an object that the catalog knows of is gone"

    def _known(self) -> set[str]:
        query = "SELECT hex(digest) FROM storage_locations JOIN blobs USING (blob_id) WHERE algorithm = 'sha256'"
        return {row[0].lower() for row in rows(self.store.state / "catalog.db", query)}

    def orphan_count(self) -> int:
        """Objects that were put and answered with an error, and whose file changed before the next try."""
        return len(self._bucket.names(BLOBS) - self._known())


@contextmanager
def cut_place(root: Path, server: LocalServer, seed: int) -> Iterator[tuple[InParts, Trouble]]:
    """A place on the server, and the trouble that it can be in; at the end it is in none."""
    port = urlsplit(server.endpoint_url).port
    assert port is not None
    with FaultProxy(port) as proxy:
        place, trouble = InParts(root, server, proxy), Trouble(server, proxy, seed)
        try:
            yield place, trouble
        finally:
            trouble.end()
            place.close()


def main() -> None:
    """Arguments: a server, `seaweedfs` or `rgw`; the number of rounds; a seed, without which one is drawn and told."""
    name, count = sys.argv[1], int(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.SystemRandom().getrandbits(32)
    with tempfile.TemporaryDirectory(prefix="castore-cut-") as folder, ExitStack() as running:
        server = running.enter_context({"seaweedfs": SeaweedFS, "rgw": Rgw}[name](Path(folder) / "server"))
        place, trouble = running.enter_context(cut_place(Path(folder), server, seed))
        print(f"{count} rounds on {server.name} {server.version} with seed {seed}", flush=True)
        run_rounds(CutRounds(MountedStore(Path(folder), place=place), seed, place=place, trouble=trouble), count)


if __name__ == "__main__":
    main()
