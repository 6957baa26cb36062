"""Mounts of their own for a command, on a host and in a chroot alike. Knows no castore."""

from __future__ import annotations

from typing import Final

# In a chroot `/` is no mount, and unshare(1) could not change how its mounts spread; they are private already there.
PRIVATE: Final = "mount --make-rprivate / 2>/dev/null || :\n"
"""The first line of a script that changes mounts, in UNSHARE."""
UNSHARE: Final = ("unshare", "--mount", "--propagation", "unchanged")


def with_mounts_of_its_own(script: str, *arguments: str) -> list[str]:
    """What runs a script of sh(1), whose mounts nobody else sees; the arguments are its `$@`."""
    return [*UNSHARE, "sh", "-euc", PRIVATE + script, "sh", *arguments]
