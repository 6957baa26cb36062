"""One round: a daemon is killed while a program writes and publishes; then all that it may not lose is looked for.

The crash test runs a few rounds, `scripts/crash-rounds` as many as one likes. What may be there after a kill is told by
`crash_writer`, never guessed.
"""

from __future__ import annotations

import errno
import json
import os
import random
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from castore.catalog.reader import CatalogReader
from tests.mount import crash_writer
from tests.mount.crash_objects import MANIFESTS, FolderObjects, Objects
from tests.mount.crash_writer import Facts
from tests.mount.store import WAIT_SECONDS, MountedStore, wait_until

Tree = dict[str, dict[str, Any]]
"""Path below a version (`.` for itself) -> what is there."""


class Told:
    """What the writer told until its daemon died, about the version that it was in, and those it published."""

    def __init__(self) -> None:
        self.ref = ""
        self.tree: dict[str, Facts] = {}
        self.step = ""
        self.pending: dict[str, list[Facts]] = {}
        self.publishing = False
        self.published: dict[str, Tree] = {}
        self.died: int | None = None

    def hear(self, line: dict[str, Any]) -> None:
        """Take in one line."""
        if "begin" in line:
            self.step = line["begin"]
            if self.step == "version":
                self.ref, self.tree = next(iter(line["paths"])).removeprefix("ingest/"), {}
            self.pending = {self.below(path): facts for path, facts in line["paths"].items()}
        elif "end" in line:
            self.tree |= {self.below(path): facts for path, facts in line["end"].items()}
            self.step, self.pending = "", {}
        elif "publish" in line:
            self.publishing = True
        elif "published" in line:
            self.publishing = False
            self.published[self.ref] = {path: facts for path, facts in self.tree.items() if facts is not None}
            self.ref, self.tree = "", {}
        else:
            self.died = line["died"]

    def below(self, path: str) -> str:
        """A path of the mount as one below the version."""
        return os.path.relpath(path, f"ingest/{self.ref}")


def tree_of(top: Path) -> Tree:
    """What is at and below a version now, files with their digest, all read anew."""
    tree: Tree = {}
    pending = [top]
    while pending:
        path = pending.pop()
        facts = crash_writer.facts_of(str(path))
        if facts["kind"] == stat.S_IFREG:
            facts["sha256"] = crash_writer.digest_of(str(path))
        elif facts["kind"] == stat.S_IFDIR:
            pending += path.iterdir()
        tree[os.path.relpath(path, top)] = facts
    return tree


def assert_same(found: Tree, expected: Tree) -> None:
    """Both trees are alike; names each path that differs."""
    differ = {path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path)}
    assert not differ, {path: (found.get(path), expected.get(path)) for path in differ}


class CrashRounds:
    """Rounds on one store, each a kill and a restart. `store` is mounted at the start, and after each round."""

    largest_bytes = 3_000_000
    """About what the largest files have."""
    most_steps = 60
    """Of one version, unless it is published soon."""
    patient = False
    """Whether the backend may fail while the writer waits for it."""

    def __init__(self, store: MountedStore, seed: int, objects: Objects | None = None) -> None:
        self.store = store
        self.objects = FolderObjects(store.objects) if objects is None else objects
        self.rng = random.Random(seed)
        self.published: dict[str, Tree] = {}
        self.inodes: set[int] = set()
        self.version = 1

    def run(self) -> str:
        """One round; one line of what it met."""
        told = self._write_until_killed(in_publish=self.rng.random() < 0.5)
        leftovers = self.objects.age()
        came_to = self._publish_came_to()
        self.store.mount()
        outcome = self._check(told)
        self._finish(told)
        self._check_nothing_is_left()
        step = f"publishing ({came_to})" if told.publishing else told.step or "between steps"
        return (
            f"killed in {step}: {outcome}; {len(told.tree)} paths, {leftovers} half puts, "
            f"{len(told.published)} versions published before"
        )

    # the kill

    def _write_until_killed(self, in_publish: bool) -> Told:
        told = Told()
        script = crash_writer.__file__
        settles = in_publish and self.rng.random() < 0.8
        steps = 5 if in_publish else self.most_steps
        numbers = [self.rng.getrandbits(32), self.version, steps, int(settles), self.largest_bytes, int(self.patient)]
        command = [sys.executable, "-I", "-S", script, str(self.store.mnt), *map(str, numbers)]
        child = subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE)
        with child:
            assert child.stdout is not None
            self._listen(child.stdout, told, in_publish)
            until = time.monotonic() + self.rng.uniform(0, 0.04)
            while time.monotonic() < until:
                pass  # the moment of the kill is what is drawn: a sleep would be too coarse
            self.store.kill()
            for line in child.stdout:
                told.hear(json.loads(line))
            assert child.wait(WAIT_SECONDS) == 0
        # EIO is the kernel's for a read into the page cache that fails, and for a request that it was copying into the
        # daemon's memory when that was killed (`fuse_dev_do_read`): large ones, of bytes that are written. From the
        # daemon none may come: it would have logged it.
        expected = {*crash_writer.DIED} | ({errno.EIO} if told.step in ("append", "write") else set())
        assert told.died in expected, (told.died, told.step)
        self._check_log()
        self.version += 1 + len(told.published)
        self.published |= told.published
        self._check_inodes(told)
        return told

    def _check_log(self) -> None:
        assert "mount.guard" not in self.store.log()

    def _listen(self, lines: IO[bytes], told: Told, in_publish: bool) -> None:
        """Hear the writer out until it is time for the kill: after some steps, or when it begins some publish."""
        steps = self.rng.randint(1, 3 if in_publish else 150)
        while steps:
            line = lines.readline()
            assert line, "the writer ended by itself"
            told.hear(json.loads(line))
            assert told.died is None, f"the writer met errno {told.died}"
            steps -= told.publishing if in_publish else 1

    def _check_inodes(self, told: Told) -> None:
        """No number that was ever given to one file is given to another."""
        facts = [*told.tree.values(), *(facts for tree in told.published.values() for facts in tree.values())]
        used = {known["inode"] for known in facts if known is not None}
        assert not used & self.inodes
        self.inodes |= used

    def _publish_came_to(self) -> str:
        if len(self.objects.names(MANIFESTS)) > len(self.published):
            return "its manifest is put"
        written = any((self.store.state / "staging/manifests").iterdir())
        return "its manifest is written" if written else "it has not begun"

    # what is there

    def _check(self, told: Told) -> str:
        """Everything that was told is there, nothing else is, and it is whole."""
        self._check_published(list(told.published))
        box = self.store.mnt / "ingest" / told.ref if told.ref else None
        if told.publishing and self.store.package(told.ref).exists():
            assert box is not None
            assert not box.exists(), "a version is published and still in ingest/"
            self.published[told.ref] = {path: facts for path, facts in told.tree.items() if facts is not None}
            self._check_published([told.ref])
            told.ref = ""
            outcome = "it is published"
        else:
            self._check_ingest(told, box)
            outcome = "it is still in ingest" if told.publishing else "all there"
        listed = json.loads(self.store.castore("package", "list", "--json"))["packages"]
        assert {package["ref"] for package in listed} == self.published.keys()
        older = self.rng.sample(sorted(self.published), min(3, len(self.published)))
        self._check_published(older)
        return outcome

    def _check_published(self, refs: list[str]) -> None:
        for ref in refs:
            assert_same(tree_of(self.store.package(ref)), self.published[ref])

    def _check_ingest(self, told: Told, box: Path | None) -> None:
        top = self.store.mnt / "ingest/crash"
        versions = set(top.iterdir()) if top.exists() else set()
        assert versions <= {box}, "a version in ingest/ that was published"
        if box is None or box not in versions:
            assert "." not in told.tree, "the version is gone"
            return
        found = tree_of(box)
        certain = {path: facts for path, facts in told.tree.items() if facts and path not in told.pending}
        assert_same({path: facts for path, facts in found.items() if path not in told.pending}, certain)
        uncertain = {path: possible for path, possible in told.pending.items() if possible}
        met = {path: found.get(path) for path in uncertain}
        cases = [dict(zip(uncertain, case, strict=True)) for case in zip(*uncertain.values(), strict=True)]
        assert not uncertain or met in cases, (met, cases)

    # going on

    def _finish(self, told: Told) -> None:
        """What is left in ingest/ is stored and can be published, as it is."""
        if told.ref and (box := self.store.mnt / "ingest" / told.ref).exists():
            tree = tree_of(box)
            self.store.publish(told.ref)
            self.published[told.ref] = tree
            self._check_published([told.ref])
            self.inodes |= {facts["inode"] for facts in tree.values()}

    def _check_nothing_is_left(self) -> None:
        status = wait_until(self._settled_status, "everything is stored")
        assert status["versions"] == []
        assert status["staged_bytes"] == 0
        for folder in ("data", "manifests"):
            left = [path.name for path in (self.store.state / "staging" / folder).iterdir()]
            assert left == [], f"staging/{folder}"
        try:
            wait_until(lambda: not self.objects.half_puts(), "the half puts are gone")
        except AssertionError as exc:
            raise AssertionError(f"{exc}: {self.objects.half_puts()}") from exc
        workspace = self.store.state / "staging/workspace.db"
        wait_until(lambda: not rows(workspace, "SELECT * FROM publishing"), "every half publish is undone")
        wait_until(lambda: not rows(self.store.state / "catalog.db", "SELECT * FROM put_intents"), "no put is intended")
        with CatalogReader.open(self.store.state / "catalog.db") as catalog:
            manifests = {package.manifest_digest.hex for package in catalog.packages()}
        assert self.objects.names(MANIFESTS) == manifests

    def _settled_status(self) -> dict[str, Any] | None:
        status = self.store.status()
        return None if any(state["file_count"] for state in status["queue"].values()) else status

    def check_all(self) -> None:
        """All that was ever published reads byte for byte."""
        self._check_published(list(self.published))


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    """What a query finds in a database that a daemon may be using."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


def run_rounds(rounds: CrashRounds, count: int) -> None:
    """That many, each told on standard output; then the mount is empty of all but what is right, and ends."""
    store = rounds.store
    try:
        store.mount()
        for number in range(1, count + 1):
            print(f"{number}: {rounds.run()}", flush=True)
        rounds.check_all()
        store.umount()
    except BaseException:
        print(store.log(), file=sys.stderr)
        raise
    finally:
        store.close()
    assert "Traceback" not in store.log(), store.log()
    print(f"{len(rounds.published)} packages are as they were published")


def main() -> None:
    """Arguments: the number of rounds, and a seed; without one, one is drawn and told."""
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().getrandbits(32)
    with tempfile.TemporaryDirectory(prefix="castore-crash-") as folder:
        print(f"{count} rounds with seed {seed}", flush=True)
        run_rounds(CrashRounds(MountedStore(Path(folder)), seed), count)


if __name__ == "__main__":
    main()
