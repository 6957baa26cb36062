"""The tree .castore/: documents made when they are opened, for the mount's owner. What they say is made elsewhere."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pyfuse3

from castore.errors import NoAttribute
from mount.attributes import CHANGING_SECONDS, absent, make
from mount.handles import TextHandle
from mount.inodes import CONTROL, HEALTH_FILE, STATUS_FILE
from mount.recent import Child

Make = Callable[[], Awaitable[dict[str, Any]]]
"""Makes a document as of now."""


class ControlTree:
    """`.castore/status.json` and `.castore/health.json`. As in /proc their size is 0 and they are read to the end."""

    def __init__(self, *, status: Make, health: Make) -> None:
        self._documents = {STATUS_FILE: (b"status.json", status), HEALTH_FILE: (b"health.json", health)}

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Attributes of the directory or of a document."""
        mode = stat.S_IFDIR | 0o700 if inode == CONTROL else stat.S_IFREG | 0o400
        return make(inode, mode, uid=os.getuid(), gid=os.getgid(), mtime_ns=time.time_ns(), seconds=CHANGING_SECONDS)

    def lookup(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        """Attributes of a name, or the answer that it is absent."""
        if parent == CONTROL:
            for inode, (document, _) in self._documents.items():
                if name == document:
                    return self.attributes(inode)
        return absent(CHANGING_SECONDS)

    def parent(self, inode: int) -> int:
        """The directory above."""
        return 1 if inode == CONTROL else CONTROL

    def children(self, inode: int, after: int) -> Iterator[Child]:
        """The documents."""
        if inode == CONTROL:
            for number, (name, _) in self._documents.items():
                if number > after:
                    yield number, name, self.attributes(number)

    async def open(self, inode: int) -> TextHandle:
        """The document as of now; it may wait for what it tells of, so give it a deadline."""
        return TextHandle(json.dumps(await self._documents[inode][1](), indent=1).encode() + b"\n")

    def attribute(self, inode: int, name: bytes) -> bytes:
        """There are none."""
        raise NoAttribute("no such attribute")
