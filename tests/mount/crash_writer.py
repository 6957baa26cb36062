"""A program, not a test: writes and publishes below a mount until the daemon dies, and tells each step.

Each step is two lines of JSON on standard output. Before: `{"begin": ..., "paths": {path: [facts, ...]}}`, what each
path may turn out to be if the daemon dies in the midst of it (`null`: absent; an empty list: anything). After:
`{"end": {path: facts}}`. Paths are relative to the mount. A publish says `{"publish": REF}`, then `{"published": REF}`.
Ends with `{"died": ERRNO}`, from the first call that failed. Standard library only, so that it starts fast.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Facts = dict[str, Any] | None

CHUNK_BYTES = 256 * 1024
DIED = (errno.ENOTCONN, errno.ECONNABORTED)
"""What the kernel answers once the daemon is gone."""


def facts_of(path: str) -> dict[str, Any]:
    """What a crash must not change of a path. Times of directories are left out: every name below changes them."""
    status = os.lstat(path)
    facts: dict[str, Any] = {"kind": stat.S_IFMT(status.st_mode), "mode": stat.S_IMODE(status.st_mode)}
    facts["inode"] = status.st_ino
    if not stat.S_ISDIR(status.st_mode):
        facts["mtime_ns"] = status.st_mtime_ns
    if stat.S_ISLNK(status.st_mode):
        facts["target"] = os.readlink(path)
    if stat.S_ISREG(status.st_mode):
        facts["size_bytes"] = status.st_size
    return facts


def digest_of(path: str) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Writer:
    """Works on one mount, as a seed tells."""

    def __init__(
        self, root: str, seed: int, first_version: int, steps_max: int, settles: int, largest_bytes: int, patient: int
    ) -> None:
        self.root = root
        self.largest_bytes = largest_bytes
        self.patient = bool(patient)
        self.rng = random.Random(seed)
        self.version = first_version
        self.steps_max = steps_max
        self.settles = bool(settles)
        self.known: dict[str, dict[str, Any]] = {}
        self.unlinked: list[int] = []
        self.count = 0

    def say(self, line: dict[str, Any]) -> None:
        os.write(1, json.dumps(line).encode() + b"\n")

    def full(self, path: str) -> str:
        return f"{self.root}/{path}"

    @contextmanager
    def step(self, what: str, paths: dict[str, list[Facts]]) -> Iterator[dict[str, Facts]]:
        """One step; the block fills in what the paths are afterwards. The n-th facts of all paths belong together."""
        self.say({"begin": what, "paths": paths})
        after: dict[str, Facts] = {}
        yield after
        for path, facts in after.items():
            if facts is None:
                self.known.pop(path, None)
            else:
                self.known[path] = facts
        self.say({"end": after})

    # steps

    def new_path(self) -> str:
        self.count += 1
        folders = [path for path, facts in self.known.items() if facts["kind"] == stat.S_IFDIR]
        return f"{self.rng.choice(folders)}/{self.count:04d} ü"

    def names(self, path: str) -> list[str]:
        """All hard links of a file, itself among them."""
        return [other for other, facts in self.known.items() if facts["inode"] == self.known[path]["inode"]]

    def files(self) -> list[str]:
        return [path for path, facts in self.known.items() if facts["kind"] == stat.S_IFREG]

    def data(self) -> bytes:
        """Mostly small, some of several blocks, a few large."""
        size = self.rng.choice((0, 1, 500, 4096, 9000, 9000, 60_000, 200_000, self.largest_bytes))
        return self.rng.randbytes(self.rng.randint(size // 2, size))

    def write_new(self, path: str) -> None:
        data = self.data()
        with self.step("write", {path: []}) as after:
            descriptor = os.open(self.full(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
            offsets = list(range(0, len(data), CHUNK_BYTES))
            if self.rng.random() < 0.2:
                self.rng.shuffle(offsets)
            for offset in offsets:
                os.pwrite(descriptor, data[offset : offset + CHUNK_BYTES], offset)
            if self.rng.random() < 0.5:
                os.fchmod(descriptor, 0o754)
                os.utime(descriptor, ns=(0, self.rng.randrange(1 << 60)))
            os.close(descriptor)
            after[path] = facts_of(self.full(path)) | {"sha256": hashlib.sha256(data).hexdigest()}

    def append(self, path: str) -> None:
        names = self.names(path)
        with self.step("append", {name: [] for name in names}) as after:
            with open(self.full(path), "ab", buffering=0) as file:
                file.write(self.data())
            facts = facts_of(self.full(path)) | {"sha256": digest_of(self.full(path))}
            after.update(dict.fromkeys(names, facts))

    def replace(self, path: str) -> None:
        """As most programs save: a temporary file, renamed over the old one."""
        temporary = f"{path}.tmp"
        self.write_new(temporary)
        old, new = self.known[path], self.known[temporary]
        with self.step("replace", {path: [old, new], temporary: [new, None]}) as after:
            os.rename(self.full(temporary), self.full(path))
            after[path], after[temporary] = new, None

    def change_attributes(self, path: str) -> None:
        old, names = self.known[path], self.names(path)
        mode, mtime_ns = self.rng.choice((0o600, 0o444, 0o777)), self.rng.randrange(1 << 60)
        half = old | {"mode": mode}
        possible: list[Facts] = [old, half, half | {"mtime_ns": mtime_ns}]
        with self.step("attributes", dict.fromkeys(names, possible)) as after:
            os.chmod(self.full(path), mode)
            os.utime(self.full(path), ns=(mtime_ns, mtime_ns))
            after.update(dict.fromkeys(names, old | facts_of(self.full(path))))

    def link(self, path: str) -> None:
        """One more name of a file."""
        name = f"{path} link"
        if name in self.known:
            return
        with self.step("link", {name: [self.known[path], None]}) as after:
            os.link(self.full(path), self.full(name))
            after[name] = self.known[path]

    def unlink(self, path: str) -> None:
        with self.step("unlink", {path: [self.known[path], None]}) as after:
            os.unlink(self.full(path))
            after[path] = None

    def keep_unlinked(self, path: str) -> None:
        """A file without a name that stays open."""
        with self.step("keep unlinked", {path: []}) as after:
            descriptor = os.open(self.full(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(descriptor, self.data())
            os.unlink(self.full(path))
            self.unlinked.append(descriptor)
            after[path] = None

    def make(self, kind: str, path: str) -> None:
        """A symbolic link or a directory."""
        with self.step(kind, {path: []}) as after:
            if kind == "symlink":
                os.symlink("nowhere/ü", self.full(path))
            else:
                os.mkdir(self.full(path))
            after[path] = facts_of(self.full(path))

    # versions

    def fill_version(self) -> str:
        """A new version below ingest/; its reference."""
        ref = f"crash/{self.version}"
        self.version += 1
        self.known.clear()
        top = f"ingest/{ref}"
        with self.step("version", {top: []}) as after:
            os.makedirs(self.full(top))
            after[top] = facts_of(self.full(top))
        for _ in range(self.rng.randint(3, self.steps_max)):
            path, files = self.new_path(), self.files()
            what = self.rng.random()
            if what < 0.5 or not files:
                self.write_new(path)
            elif what < 0.6:
                self.make("symlink" if what < 0.55 else "mkdir", path)
            elif what < 0.65:
                self.keep_unlinked(path)
            else:
                steps = (self.append, self.replace, self.change_attributes, self.link, self.unlink)
                self.rng.choice(steps)(self.rng.choice(files))
        while self.unlinked:
            os.close(self.unlinked.pop())
        return ref

    def settle(self, top: str) -> None:
        """Wait until everything is stored: the publish itself is short then. Its failure may be the backend's."""
        folder = os.open(top, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as exc:
            if not self.patient or exc.errno in DIED:
                raise
        finally:
            os.close(folder)

    def publish(self, ref: str) -> None:
        if self.settles:
            self.settle(self.full(f"ingest/{ref}"))
        self.say({"publish": ref})
        while True:
            try:
                os.rename(self.full(f"ingest/{ref}"), self.full(f"packages/{ref}"))
                break
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    raise
        self.say({"published": ref})


def main() -> None:
    """Arguments: the mount, and the numbers that a Writer takes.

    They are a seed, the first version, the most steps in one, 1 to publish only what is stored, the size of the
    largest files, 1 to bear it that a backend fails.
    """
    writer = Writer(sys.argv[1], *map(int, sys.argv[2:]))
    try:
        while True:
            writer.publish(writer.fill_version())
    except OSError as exc:
        writer.say({"died": exc.errno})


if __name__ == "__main__":
    main()
