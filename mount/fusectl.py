"""The kernel's control files of FUSE connections, whether or not anybody mounted them. It decides no value."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

_FOLDER: Final = Path("/sys/fs/fuse/connections")
"""Where a booted system has them mounted; containers and plain chroots do not."""

# The same on every architecture (the kernel's asm-generic/unistd.h); the C library has wrappers since 2.36 only.
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_CLOEXEC: Final = 1
"""FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC (fsopen(2), fsmount(2))."""
_CMD_CREATE: Final = 6
"""FSCONFIG_CMD_CREATE (fsconfig(2))."""


@contextmanager
def connection(minor: str) -> Iterator[int]:
    """A descriptor of the control folder of the connection whose device has that minor number.

    Where none is mounted, root gets a mount of its own, which appears nowhere and goes with the block.
    Raises OSError.
    """
    with ExitStack() as opened:

        def keep(descriptor: int) -> int:
            opened.callback(os.close, descriptor)
            return descriptor

        yield keep(os.open(minor, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=_connections(keep)))


def _connections(keep: Callable[[int], int]) -> int:
    """The folder of all connections. Raises OSError."""
    if any(_FOLDER.iterdir()):
        return keep(os.open(_FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    context = keep(_call(_SYS_FSOPEN, b"fusectl", _CLOEXEC))
    _call(_SYS_FSCONFIG, context, _CMD_CREATE, None, None, 0)
    return keep(_call(_SYS_FSMOUNT, context, _CLOEXEC, 0))


def _call(number: int, *arguments: int | bytes | None) -> int:
    """A system call that the C library may not have by name. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    result = int(library.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
