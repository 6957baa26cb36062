"""A NAME of ingest/ and a plain directory side by side: each operation on both; all that they answer and show alike.

Where a mount differs from a disk on purpose, it is in DIFFERENCES, under a sentence of docs/SEMANTICS.md; in nothing
else may they differ. No random choices here: `model_machine` makes those.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tests.mount.model_sides import Side, Tree, assert_alike, item_of, look, walk
from tests.mount.store import MountedStore, wait_until
from tests.mount.syscalls import forced_stat

# where they differ


@dataclass(frozen=True, slots=True)
class Difference:
    """The mount answers `number` where a disk does what it is asked; the disk is left alone then."""

    sentence: str
    """As docs/SEMANTICS.md has it: a part of one, at least."""
    number: int
    operations: tuple[str, ...]
    applies: Callable[..., bool]
    """(twins, arguments of the operation) -> whether the sentence is about that."""


def _directly_in_name(twins: Twins, path: str, follow: bool) -> bool:
    return len(Path(twins.place(path, follow=follow)).parts) == 1


def _is_no_version(twins: Twins, path: str) -> bool:
    return _directly_in_name(twins, path, follow=False) and not os.path.basename(path)[:1].isalnum()


def _changes_rank(twins: Twins, path: str, new: str) -> bool:
    is_file = not stat.S_ISDIR(os.lstat(twins.there.path(path)).st_mode)
    return is_file and _directly_in_name(twins, new, follow=False)


def _tears_a_link(twins: Twins, path: str, new: str) -> bool:
    """Some file at or below `path` has a name elsewhere, and `new` is in another version."""
    if twins.place(path).split("/")[0] == twins.place(new).split("/")[0]:
        return False
    counted: dict[int, list[int]] = {}
    for each in walk(twins.there.path(path)) if os.path.isdir(twins.there.path(path)) else [twins.there.path(path)]:
        status = os.lstat(each)
        if not stat.S_ISDIR(status.st_mode):
            counted.setdefault(status.st_ino, []).append(status.st_nlink)
    return any(len(links) < links[0] for links in counted.values())


def _crosses_versions(twins: Twins, path: str, new: str) -> bool:
    return twins.place(path).split("/")[0] != twins.place(new).split("/")[0]


DIFFERENCES: Final = (
    Difference(
        "A NAME or VERSION has 1 to 128 of the characters `A-Z a-z 0-9 . _ + : @ ~ -`, and begins with a letter, a "
        "digit or `@`. Anything else is refused with `EINVAL`, however it comes there.",
        errno.EINVAL,
        ("mkdir", "rename"),
        lambda twins, *arguments: _is_no_version(twins, _last_path(arguments)),
    ),
    Difference(
        "Directly in `ingest/` lie only NAMEs, and in `ingest/NAME` only VERSIONs. Files and links there are `EPERM`.",
        errno.EPERM,
        ("open",),
        lambda twins, slot, path, flags, mode: _directly_in_name(twins, path, not flags & os.O_EXCL),
    ),
    Difference(
        "Directly in `ingest/` lie only NAMEs, and in `ingest/NAME` only VERSIONs. Files and links there are `EPERM`.",
        errno.EPERM,
        ("symlink", "link"),
        lambda twins, _, path: _directly_in_name(twins, path, False),
    ),
    Difference(
        "So is moving a directory between these ranks, but for one: a directory inside a version may become a VERSION, "
        "and the other way round.",
        errno.EPERM,
        ("rename",),
        _changes_rank,
    ),
    Difference(
        "A link into another version is `EPERM`, and so is one to what is published.",
        errno.EPERM,
        ("link",),
        _crosses_versions,
    ),
    Difference("When that would tear a hard link apart it is `EXDEV`", errno.EXDEV, ("rename",), _tears_a_link),
    Difference(
        "Devices, sockets and fifos are refused with `EPERM`.", errno.EPERM, ("mkfifo",), lambda twins, path: True
    ),
    Difference(
        "Computed attributes are not listed, so that `cp -a` copies none, and setting one is `EPERM`",
        errno.EPERM,
        ("setxattr", "fsetxattr"),
        lambda twins, place, name, value, flags: name.startswith(("user.castore.", "user.hash.")),
    ),
    Difference(
        "or `EEXIST` where it has to be new",
        errno.EEXIST,
        ("setxattr", "fsetxattr"),
        lambda twins, place, name, value, flags: name.startswith("user.castore.") and bool(flags & os.XATTR_CREATE),
    ),
    Difference(
        "Other name spaces are refused (`EOPNOTSUPP`).",
        errno.EOPNOTSUPP,
        ("setxattr", "fsetxattr"),
        lambda twins, place, name, value, flags: not name.startswith("user."),
    ),
    Difference(
        "what was open reads on, and can write no more (`EROFS`).",
        errno.EROFS,
        ("write", "append", "ftruncate", "fchmod", "futimens", "fsetxattr"),
        lambda twins, slot, *_: slot in twins.slots and twins.slots[slot].is_published,
    ),
)

DROPPED_BITS: Final = "Set-uid bits are dropped at once, and on files the set-gid and sticky bits too."
DROPPED_AT_PUBLISH: Final = (
    "Directories keep those two in `ingest/`, where they work as usual, and lose them at publish."
)
OWNER_AT_PUBLISH: Final = "At publish every entry gets the owner and group of its VERSION directory."
SENTENCES: Final = (*(each.sentence for each in DIFFERENCES), DROPPED_BITS, DROPPED_AT_PUBLISH, OWNER_AT_PUBLISH)
"""All that the two sides differ in. Directories say nlink 1 on a mount, and whatever they like on a disk."""


def _last_path(arguments: tuple[Any, ...]) -> str:
    return next(str(each) for each in reversed(arguments) if isinstance(each, str))


# both sides


@dataclass(slots=True)
class Slot:
    """A file that is open on both sides."""

    flags: int
    version_inode: int = 0
    """The version that it lies in, or lay in when it had a name."""
    is_published: bool = False

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclass(slots=True)
class Package:
    """A published package, for ever as it is here."""

    tree: Tree
    inodes: dict[str, int]


@dataclass(slots=True)
class World:
    """A mounted store, a folder on a disk, and all that was published in the store so far."""

    store: MountedStore
    disk: Path
    packages: dict[str, Package] = field(default_factory=dict)
    name_count: int = 0
    restarts: int = 0
    kills: int = 0
    steps: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """Operation and answer -> how often."""

    def new_name(self) -> str:
        """A NAME that was never used."""
        self.name_count += 1
        return f"model{self.name_count}"

    def said(self) -> str:
        """What happened so far, in a line."""
        return (
            f"{self.name_count} examples, {self.steps} operations, {len(self.packages)} packages, "
            f"{self.kills} kills, {self.restarts} restarts"
        )

    def mend(self) -> None:
        """A test that failed midway may have left no daemon."""
        store = self.store
        if not (store.pid and Path(f"/proc/{store.pid}").exists()):
            store.mount()

    def check_packages(self) -> None:
        """Every package is what was published, to the byte, by name and by digest."""
        for ref, package in self.packages.items():
            tree, inodes = look(self.store.package(ref), read=True)
            assert_alike(tree, package.tree, f"package {ref}")
            assert inodes == package.inodes, f"package {ref} has other inode numbers"
        names: dict[str, set[str]] = {}
        for ref in self.packages:
            names.setdefault(ref.split("/")[0], set()).add(ref.split("/")[1])
        listed = {path.name: {each.name for each in path.iterdir()} - {"latest"} for path in _names(self.store)}
        assert listed == names


def _names(store: MountedStore) -> list[Path]:
    return list((store.mnt / "packages").iterdir())


class Twins:
    """One NAME of ingest/ and a plain directory, alike from the first operation to the last."""

    def __init__(self, world: World) -> None:
        world.mend()
        self.world = world
        self.name = world.new_name()
        self.here = Side(world.store.mnt / "ingest" / self.name)
        self.there = Side(world.disk / self.name)
        self.slots: dict[int, Slot] = {}
        self.seen: set[str] = set()
        for side in (self.here, self.there):
            side.root.mkdir(mode=0o755)
        self.tree: Tree = {}
        self.compare(read=True)

    # doing

    def do(self, operation: str, *arguments: Any) -> object:
        """One operation on both sides; they must answer alike, but for a difference. Returns the answer."""
        self.world.steps += 1
        differences = self._differences(operation, arguments)
        here = _answer(getattr(self.here, operation), arguments)
        self.world.outcomes[f"{operation} {here if here in errno.errorcode.values() else 'done'}"] += 1
        if here in differences:
            return here
        there = _answer(getattr(self.there, operation), arguments)
        assert here == there, f"{operation}{arguments!s:.200}: mount {here!r:.200}, disk {there!r:.200}"
        if here not in errno.errorcode.values():
            self._drop_bits(operation, arguments)
        return here

    def _differences(self, operation: str, arguments: tuple[Any, ...]) -> set[str]:
        answers = set()
        for each in DIFFERENCES:
            with suppress(OSError):  # what is not there on the disk differs in nothing
                if operation in each.operations and each.applies(self, *arguments):
                    answers.add(errno.errorcode[each.number])
        return answers

    def _drop_bits(self, operation: str, arguments: tuple[Any, ...]) -> None:
        if operation == "fchmod":
            place: str | int = self.there.files[arguments[0]]
        elif operation in ("chmod", "mkdir", "open"):
            place = self.there.path(_last_path(arguments))
        else:
            return
        status = os.stat(place)
        kept = status.st_mode & (0o3777 if stat.S_ISDIR(status.st_mode) else 0o777)
        if stat.S_IMODE(status.st_mode) != kept:
            os.chmod(place, kept)

    def open(self, slot: int, path: str, flags: int, mode: int) -> None:
        """Open a file in a slot, which is closed first."""
        if slot in self.slots:
            self.close(slot)
        if self.do("open", slot, path, flags, mode) == "a file":
            self.slots[slot] = Slot(flags)

    def close(self, slot: int) -> None:
        """Close a slot."""
        self.do("close", slot)
        del self.slots[slot]

    def close_all(self) -> None:
        """Close every slot."""
        for slot in list(self.slots):
            self.close(slot)

    # where things are

    def place(self, path: str, *, follow: bool = False) -> str:
        """A path with its directories resolved, and its last name too where `follow`."""
        folder, name = os.path.split(self.there.path(path))
        resolved = os.path.realpath(self.there.path(path)) if follow else f"{os.path.realpath(folder)}/{name}"
        return os.path.relpath(resolved, os.path.realpath(self.there.root))

    def kind(self, path: str) -> int:
        """What the path was when both sides were compared last: S_IFREG, S_IFDIR, S_IFLNK."""
        return stat.S_IFMT(self.tree[path].mode) if path in self.tree else 0

    def versions(self) -> list[str]:
        """The VERSIONs in ingest/."""
        return sorted(path for path in self.tree if "/" not in path and path != ".")

    # comparing

    def compare(self, *, read: bool) -> None:
        """Both sides show the same: what the kernel keeps of the mount, then what the daemon says, then open files."""
        there, _ = look(self.there.root, read=read)
        self.seen |= there.keys()
        absent = sorted(path for path in self.seen - there.keys() if os.path.lexists(self.here.path(path)))
        assert not absent, f"on the mount alone: {absent}"
        kept = {
            path: item_of(os.lstat(name), name, read=False)
            for path in there
            if os.path.lexists(name := self.here.path(path))
        }
        assert_alike(
            kept,
            {path: replace(item, links=(), content=None) for path, item in there.items()},
            "as the kernel keeps it",
        )
        here, inodes = look(self.here.root, read=read, stat_of=forced_stat)
        assert_alike(here, there, "as the daemon says")
        self.tree = there
        for slot, each in self.slots.items():
            assert self.here.fstat(slot) == self.there.fstat(slot), f"slot {slot}"
            if not each.is_published:
                self._note_version(slot, each, inodes)

    def _note_version(self, slot: int, each: Slot, inodes: dict[str, int]) -> None:
        inode = os.fstat(self.here.files[slot]).st_ino
        path = next((path for path, other in inodes.items() if other == inode), None)
        if path is not None:
            each.version_inode = inodes[path.split("/")[0]]

    # the life of a version

    def publish(self, version: str) -> str:
        """Publish a version, or be refused as promised. Returns the errno's name or `published`."""
        store, ref = self.world.store, f"{self.name}/{version}"
        refusal = self._refusal(version)
        _, inodes = look(self.here.root, read=False)
        if refusal:
            answer = _answer(os.rename, (self.here.path(version), store.package(ref)))
            assert answer in refusal, f"publish of {version}: {answer} instead of {refusal}"
            return str(answer)
        store.publish(ref)
        top = self.world.disk / "published" / ref
        top.parent.mkdir(parents=True, exist_ok=True)
        self._as_published(self.there.root / version)
        os.rename(self.there.root / version, top)
        for slot, each in self.slots.items():
            has_name = os.fstat(self.there.files[slot]).st_nlink > 0
            each.is_published |= has_name and each.version_inode == inodes[version]
        tree, _ = look(top, read=True)
        found = {os.path.relpath(path, version): number for path, number in inodes.items() if _is_below(path, version)}
        self.world.packages[ref] = Package(tree, found)
        here, numbers = look(store.package(ref), read=True, stat_of=forced_stat)
        assert_alike(here, tree, f"package {ref}, just published")
        assert numbers == found, "publish keeps inode numbers"
        assert os.readlink(store.package(f"{self.name}/latest")) == version
        return "published"

    def _refusal(self, version: str) -> set[str]:
        refusal = set()
        if version not in self.tree:
            return {"ENOENT"}
        if f"{self.name}/{version}" in self.world.packages:
            refusal.add("EEXIST")
        if any(self._is_written_in(version, slot, each) for slot, each in self.slots.items()):
            refusal.add("EBUSY")
        return refusal

    def _is_written_in(self, version: str, slot: int, each: Slot) -> bool:
        status = os.fstat(self.there.files[slot])
        if not each.is_writable or each.is_published or not status.st_nlink:
            return False
        return each.version_inode == os.lstat(self.here.path(version)).st_ino

    @staticmethod
    def _as_published(top: Path) -> None:
        """On the disk, what a publish changes by promise: owners, and two bits of directories."""
        owner = top.lstat()
        for path in walk(str(top)):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o7000:
                os.chmod(path, status.st_mode & 0o777)

    # the life of the daemon

    def restart(self) -> None:
        """Unmount and mount again. A mount in use stays, so everything is closed first."""
        self.close_all()
        self.world.store.umount()
        self.world.store.mount()
        self.world.restarts += 1
        self._check_after_start()

    def kill(self) -> None:
        """kill -9, and mount again: open files are lost, what was written is there."""
        store = self.world.store
        store.kill()
        for slot, each in self.slots.items():
            if each.is_writable:
                answer = _answer(self.here.write, (slot, 0, b"after the end"))
                assert answer == "ENOTCONN", f"a write to a dead mount: {answer}"
        self._close_as_it_is()
        store.mount()
        self.world.kills += 1
        self._check_after_start()

    def _check_after_start(self) -> None:
        self.compare(read=True)
        self.world.check_packages()

    def abandon(self) -> None:
        """Close and remove what can be, in whatever state it is."""
        self._close_as_it_is()
        for side in (self.here, self.there):
            with suppress(OSError):
                _remove(str(side.root))

    def _close_as_it_is(self) -> None:
        for side in (self.here, self.there):
            for descriptor in side.files.values():
                with suppress(OSError):
                    os.close(descriptor)
            side.files.clear()
        self.slots.clear()

    # the end

    def discard(self, version: str) -> None:
        """Remove a version by `rm -r`."""
        for side in (self.here, self.there):
            _remove(side.path(version))

    def end(self) -> None:
        """Everything is closed and removed; then nothing of it is left in staging."""
        self.close_all()
        self.compare(read=True)
        for side in (self.here, self.there):
            _remove(str(side.root))
        store = self.world.store
        assert store.status()["staged_bytes"] == 0
        wait_until(lambda: not list((store.state / "staging/data").iterdir()), "no staged bytes are left")


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def _remove(path: str) -> None:
    """As `rm -r`: children first, never through a link."""
    for each in reversed(list(walk(path))):
        if stat.S_ISDIR(os.lstat(each).st_mode):
            os.rmdir(each)
        else:
            os.unlink(each)


def _answer(operation: Callable[..., object], arguments: tuple[Any, ...]) -> object:
    try:
        return operation(*arguments)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]


def data_of(seed: int, size: int) -> bytes:
    """Bytes that a few numbers stand for, so that a failure can be read."""
    return random.Random(seed).randbytes(size)
