"""Random operations for `model`, drawn by hypothesis, which finds a short way to whatever differs. No test itself.

python -m tests.mount.model_machine MINUTES [SEED]
    goes on for that long with a store of its own; without a seed, one is drawn and told
"""

from __future__ import annotations

import os
import random
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.mount.model import Twins, World, data_of
from tests.mount.model_sides import FIRST_NS
from tests.mount.store import MountedStore

_T = TypeVar("_T")

PUBLISH_WAIT: Final = 'publish_wait = "300ms"'
"""A publish that is refused while a file stays open waits that long."""
STEPS: Final = 50
"""Of an example, at most."""
CALM_STEPS: Final = 10
"""Steps before the daemon of an example may be ended, and between two ends: a start takes as long as a hundred."""

_SLOTS: Final = st.integers(0, 2)
_NAMES: Final = st.sampled_from(["a", "b", "c", "d", "p", "q", "ü \n", "-"])
_VERSIONS: Final = st.sampled_from(["1", "2", "3"])
_SIZES: Final = st.sampled_from([0, 1, 100, 4096, 5000, 70_000, 131_072, 200_001])
_SEEDS: Final = st.integers(0, 999)
_MODES: Final = st.sampled_from([0o600, 0o644, 0o755, 0o444, 0o000, 0o4755, 0o2775, 0o1777, 0o6711])
_TIMES: Final = st.sampled_from([0, 1, 999_999_999, -1, 10**18 + 123_456_789, FIRST_NS - 1, -(10**18)])
_ATTRIBUTES: Final = st.sampled_from(["user.a", "user.b", "user.", "user.castore.state", "user.hash.x", "trusted.a"])
_XATTR_FLAGS: Final = st.sampled_from([0, 0, os.XATTR_CREATE, os.XATTR_REPLACE])
_OPEN_FLAGS: Final = st.sampled_from(
    [
        os.O_RDONLY,
        os.O_RDWR,
        os.O_RDWR | os.O_CREAT,
        os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_WRONLY | os.O_CREAT | os.O_APPEND,
        os.O_RDONLY | os.O_DIRECTORY,
        os.O_RDWR | os.O_NOFOLLOW,
        os.O_RDONLY | os.O_TRUNC,
        os.O_RDONLY | os.O_CREAT,
    ]
)

_machine: Final = st.runner()


def _drawn_from(of: Callable[[Any], list[_T]]) -> st.SearchStrategy[_T]:
    """One of what the machine has just now."""
    return _machine.flatmap(lambda machine: st.sampled_from(of(machine)))


_known: Final = _drawn_from(lambda machine: machine.known())
_folders: Final = _drawn_from(lambda machine: machine.folders())
_files: Final = _drawn_from(lambda machine: machine.files())
_links: Final = _drawn_from(lambda machine: machine.links())
_new: Final = st.builds("{}/{}".format, _folders, _NAMES)
_tops: Final = st.one_of(_VERSIONS, st.sampled_from(["a", ".bad"]))
_old_paths: Final = st.one_of(_files, _files, _known, _known, _links, _new)
"""Mostly what is there."""
_new_paths: Final = st.one_of(_new, _new, _new, _known, _tops)
"""Mostly what is not."""
_open_slots: Final = _drawn_from(lambda machine: sorted(machine.twins.slots))
_targets: Final = st.one_of(
    st.builds("/".join, st.lists(_NAMES, min_size=1, max_size=2)), st.builds("../{}".format, _NAMES)
)
"""At most one level up: from no version out of NAME."""
_data: Final = st.builds(data_of, _SEEDS, _SIZES)
_attribute: Final = st.tuples(_ATTRIBUTES, st.builds(data_of, _SEEDS, st.sampled_from([0, 1, 300])), _XATTR_FLAGS)


def _step(operation: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """An operation and what it takes beside a path or slot."""
    return st.tuples(st.just(operation), *arguments)


_on_slots: Final = st.one_of(
    _step("write", _SIZES, _data),
    _step("write", _SIZES, _data),
    _step("append", _data),
    _step("read", _SIZES, _SIZES),
    _step("ftruncate", _SIZES),
    _step("fchmod", _MODES),
    _step("futimens", _TIMES),
    _step("fsync"),
    _step("dup"),
    _step("fsetxattr", _attribute),
)
_on_attributes: Final = st.one_of(
    _step("chmod", _MODES),
    _step("chown", st.sampled_from([-1, 0, 1234]), st.sampled_from([-1, 0, 4321])),
    _step("utimens", _TIMES),
    _step("setxattr", _attribute),
    _step("removexattr", _ATTRIBUTES),
)


def _flat(arguments: Sequence[Any]) -> Sequence[Any]:
    return arguments[0] if arguments and isinstance(arguments[0], tuple) else arguments


def _when_open(machine: Workspace) -> bool:
    return bool(machine.twins.slots)


class Workspace(RuleBasedStateMachine):
    """One NAME from nothing to nothing."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.twins: Twins = Twins(world)
        self.reads = False
        self.calm = 0

    # what strategies draw from

    def known(self) -> list[str]:
        """Every path but NAME's own."""
        return sorted(path for path in self.twins.tree if path != ".") or ["1"]

    def _of_kind(self, kind: int, otherwise: str) -> list[str]:
        return [path for path in self.known() if kind == self.twins.kind(path)] or [otherwise]

    def folders(self) -> list[str]:
        """Directories below NAME, or one that is absent."""
        return self._of_kind(stat.S_IFDIR, "1")

    def files(self) -> list[str]:
        """Regular files, or a name that is absent."""
        return self._of_kind(stat.S_IFREG, "1/a")

    def links(self) -> list[str]:
        """Symbolic links, or a name that is absent."""
        return self._of_kind(stat.S_IFLNK, "1/b")

    # steps

    def do(self, operation: str, *arguments: object) -> None:
        self.twins.do(operation, *arguments)
        self.check()

    def check(self) -> None:
        self.calm += 1
        self.twins.compare(read=self.reads)

    @initialize(reads=st.booleans(), number=_SEEDS)
    def begin(self, reads: bool, number: int) -> None:
        """`reads`: whether the bytes are looked at after every step, too, or only when much has happened."""
        self.reads = reads
        self._fill("1", number)
        self._fill("2", number + 1)

    def _fill(self, version: str, number: int) -> None:
        """Something to begin with, where the version is absent."""
        if version in self.twins.tree:
            return
        for path in ("", "/p", "/p/q"):
            self.twins.do("mkdir", f"{version}{path}", 0o755)
        for path, size in (("a", 100), ("p/a", 140_000), ("p/b", 5000)):
            self.copy_in(f"{version}/{path}", data_of(number, size))
        self.do("link", f"{version}/a", f"{version}/p/q/a")
        self.do("symlink", "a", f"{version}/p/c")

    @rule(path=st.one_of(_new, _new, _files), data=_data)
    def copy_in(self, path: str, data: bytes) -> None:
        slot = 3
        self.twins.open(slot, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        if slot in self.twins.slots:
            self.twins.do("write", slot, 0, data)
            self.twins.close(slot)
        self.check()

    @rule(path=_files, data=_data)
    def save(self, path: str, data: bytes) -> None:
        """As most programs do: a temporary file, renamed over the old one."""
        self.copy_in(f"{path}~", data)
        self.do("rename", f"{path}~", path)

    @rule(slot=_SLOTS, path=st.one_of(_files, _old_paths, _new_paths), flags=_OPEN_FLAGS, mode=_MODES)
    def open(self, slot: int, path: str, flags: int, mode: int) -> None:
        self.twins.open(slot, path, flags, mode)
        self.check()

    @rule(slot=_SLOTS, path=_files)
    def open_to_change(self, slot: int, path: str) -> None:
        self.twins.open(slot, path, os.O_RDWR, 0)
        self.check()

    @precondition(_when_open)
    @rule(slot=_open_slots, steps=st.lists(_on_slots, min_size=1, max_size=5))
    def use(self, slot: int, steps: list[tuple[Any, ...]]) -> None:
        for operation, *arguments in steps:
            self.do(operation, slot, *_flat(arguments))

    @precondition(_when_open)
    @rule(slot=_open_slots, offset=_SIZES, data=_data)
    def write(self, slot: int, offset: int, data: bytes) -> None:
        self.do("write", slot, offset, data)

    @precondition(_when_open)
    @rule(slot=_open_slots)
    def close(self, slot: int) -> None:
        self.twins.close(slot)
        self.check()

    @rule(path=_old_paths, size=_SIZES)
    def truncate(self, path: str, size: int) -> None:
        self.do("truncate", path, size)

    @rule(path=_new_paths, mode=_MODES)
    def mkdir(self, path: str, mode: int) -> None:
        self.do("mkdir", path, mode)

    @rule(path=st.one_of(_folders, _folders, _old_paths))
    def rmdir(self, path: str) -> None:
        self.do("rmdir", path)

    @rule(text=_targets, path=_new_paths)
    def symlink(self, text: str, path: str) -> None:
        self.do("symlink", text, path)

    @rule(path=_old_paths, new=_new_paths)
    def link(self, path: str, new: str) -> None:
        self.do("link", path, new)

    @rule(path=_old_paths)
    def unlink(self, path: str) -> None:
        self.do("unlink", path)

    @rule(path=_old_paths, new=_new_paths)
    def rename(self, path: str, new: str) -> None:
        self.do("rename", path, new)

    @rule(path=_old_paths, new=_old_paths)
    def rename_over(self, path: str, new: str) -> None:
        self.do("rename", path, new)

    @rule(path=_folders, new=st.one_of(_folders, _new, _VERSIONS))
    def rename_folder(self, path: str, new: str) -> None:
        self.do("rename", path, new)

    @rule(path=_old_paths, operation=st.sampled_from(["fsync_path", "fsync_path", "fsync_path", "mkfifo"]))
    def sync(self, path: str, operation: str) -> None:
        self.do(operation, path)

    @rule(path=_old_paths, steps=st.lists(_on_attributes, min_size=1, max_size=3))
    def change(self, path: str, steps: list[tuple[Any, ...]]) -> None:
        for operation, *arguments in steps:
            self.do(operation, path, *_flat(arguments))

    @rule(time_ns=_TIMES)
    def utimens_everywhere(self, time_ns: int) -> None:
        """So that the next steps show whose time each of them changes."""
        for path in reversed(self.known()):
            self.twins.do("utimens", path, time_ns)
        self.check()

    @rule()
    def read_all(self) -> None:
        self.twins.compare(read=True)

    # versions and daemons

    @precondition(lambda self: self.calm >= CALM_STEPS)
    @rule(version=_VERSIONS)
    def publish(self, version: str) -> None:
        self.twins.publish(version)
        self.check()
        self._fill(version, len(version))

    @precondition(lambda self: self.calm >= CALM_STEPS and bool(self.twins.versions()))
    @rule(version=_drawn_from(lambda machine: machine.twins.versions()))
    def discard(self, version: str) -> None:
        self.twins.discard(version)
        self.check()
        self._fill("1", 0)

    @precondition(lambda self: self.calm >= CALM_STEPS)
    @rule(kind=st.sampled_from(["kill", "restart", "neither", "neither"]))
    def end_the_daemon(self, kind: str) -> None:
        if kind != "neither":
            self.calm = 0
            self.twins.kill() if kind == "kill" else self.twins.restart()

    def teardown(self) -> None:
        if isinstance(sys.exc_info()[1], Exception):
            self.twins.abandon()  # what differed is told already
        else:
            self.twins.end()


def run_examples(world: World, *, count: int, number: int, verbose: bool = False) -> None:
    """So many examples as `number` draws. Raises what differs, with the shortest steps to it in its notes."""

    @seed(number)
    def machine() -> Workspace:
        return Workspace(world)

    chosen = settings(
        max_examples=count,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.verbose if verbose else Verbosity.normal,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)  # type: ignore[arg-type]


def main() -> None:
    """Arguments: minutes, and a seed."""
    minutes = float(sys.argv[1])
    number = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().getrandbits(32)
    until = time.monotonic() + 60 * minutes
    print(f"{minutes:g} minutes with seed {number}", flush=True)
    with tempfile.TemporaryDirectory(prefix="castore-model-") as folder:
        (Path(folder) / "disk").mkdir()
        store = MountedStore(Path(folder), PUBLISH_WAIT)
        world = World(store, Path(folder) / "disk")
        try:
            store.mount()
            while time.monotonic() < until:
                run_examples(world, count=20, number=number)
                number += 1
                print(f"{world.said()}; next seed {number}", flush=True)
            world.check_packages()
            store.umount()
        except BaseException:
            print(store.log(), file=sys.stderr)
            raise
        finally:
            store.close()
        assert "Traceback" not in store.log(), store.log()


if __name__ == "__main__":
    main()
