"""The tree .castore/: documents made when they are opened, for the mount's owner. What they say is made elsewhere."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyfuse3

from castore.errors import NoAttribute
from mount.attributes import CHANGING_SECONDS, absent, make
from mount.handles import TextHandle
from mount.inodes import CONTROL, STATUS_FILE
from mount.packages import Child

_NAME = b"status.json"


class ControlTree:
    """`.castore/status.json`. As in /proc its size is 0 and it is read to the end."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Attributes of the directory or the document."""
        mode = stat.S_IFDIR | 0o700 if inode == CONTROL else stat.S_IFREG | 0o400
        return make(
            inode, mode, uid=os.getuid(), gid=os.getgid(), mtime_ns=time.time_ns(), seconds=CHANGING_SECONDS
        )

    def lookup(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        """Attributes of a name, or the answer that it is absent."""
        if parent == CONTROL and name == _NAME:
            return self.attributes(STATUS_FILE)
        return absent(CHANGING_SECONDS)

    def parent(self, inode: int) -> int:
        """The directory above."""
        return 1 if inode == CONTROL else CONTROL

    def children(self, inode: int, after: int) -> Iterator[Child]:
        """The documents."""
        if inode == CONTROL and after < 1:
            yield 1, _NAME, self.attributes(STATUS_FILE)

    def open(self, inode: int) -> TextHandle:
        """The document as of now."""
        return TextHandle(json.dumps(self._status(), indent=1).encode() + b"\n")

    def attribute(self, inode: int, name: bytes) -> bytes:
        """There are none."""
        raise NoAttribute("no such attribute")
