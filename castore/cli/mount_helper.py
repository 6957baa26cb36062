"""`mount.castore`: what mount(8) runs for the type `castore`, as for a line of fstab. It starts a daemon, and is none.

    mount -t castore /etc/castore/castore.toml /mnt/artifacts -o ro,_netdev

The source is the file of settings, or `none` for the one that `castore` finds by itself. It returns when the mount is
there, and the daemon lives on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from castore.cli.main import main as castore

USAGE: Final = "usage: mount.castore FILE|none MNT [-sfnv] [-o OPTS]"

_WRONG_USE: Final = 1
_FAILED: Final = 32
"""mount(8), "EXIT STATUS"."""

_OF_OTHERS: Final = frozenset(
    {"auto", "noauto", "user", "nouser", "users", "owner", "group", "defaults", "nofail", "_netdev"}
    | {"async", "atime", "noatime", "relatime", "norelatime", "diratime", "nodiratime", "lazytime", "nolazytime"}
)
"""Meant for mount(8), init or the kernel's times, of which there is nothing to set here."""
_OF_OTHERS_BEGIN: Final = ("x-", "X-", "comment=", "user=", "uhelper=", "helper=")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as mount(8) runs its helpers: `mount.TYPE SOURCE MNT [-sfnv] [-N NAMESPACE] [-o OPTS] [-t TYPE]`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    places: list[str] = []
    options: list[str] = []
    is_fake = False
    while words:
        word = words.pop(0)
        if word in ("-o", "-t", "-N"):
            if not words:
                return _misused(f"{word} needs a value")
            value = words.pop(0)
            if word == "-o":
                options += [option for option in value.split(",") if option and not _is_of_others(option)]
            elif word == "-N":
                return _misused("another namespace of mounts is not supported: run it there, by nsenter(1)")
        elif word.startswith("-") and len(word) > 1:
            if set(word[1:]) - set("sfnv"):
                return _misused(f"{word}: unknown option")
            is_fake |= "f" in word
        else:
            places.append(word)
    if len(places) != 2:
        return _misused("a source and a mountpoint are needed")
    if is_fake:
        return 0
    source, mountpoint = places
    command = ["mount", "--background", mountpoint]
    if source != "none":
        command += ["--config", source]
    if options:
        command += ["-o", ",".join(options)]
    return _FAILED if castore(command) else 0


def _is_of_others(option: str) -> bool:
    return option in _OF_OTHERS or option.startswith(_OF_OTHERS_BEGIN)


def _misused(reason: str) -> int:
    print(f"mount.castore: {reason}; {USAGE}", file=sys.stderr)
    return _WRONG_USE
