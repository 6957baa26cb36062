"""Empty files made ahead, so that a file that is created takes a name alone. Their folder holds nothing of anybody.

Making a file takes ext4 30 to 200 microseconds of whoever waits for it, and a rename 10. A thread makes them while
files come; what a daemon leaves, the next one removes.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path
from typing import Final

import trio

log = logging.getLogger(__name__)

SPARES: Final = 256
"""Files made ahead, again when half of them are used: a tenth of a second of a fast copy."""
RETRY_SECONDS: Final = 5.0
"""Before they are made again when the disk did not let them be: meanwhile each file is made when it is created."""


class SpareFiles:
    """Those of one daemon."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ready: deque[str] = deque()
        self._count = 0
        self._wanted = trio.Event()

    def clear(self) -> None:
        """Remove what an earlier daemon left. After a power cut a name may be that of a file that is in use.

        What cannot be removed stays, with a line of log: it is in nobody's way but that of a file made ahead.
        """
        for item in os.scandir(self._folder):
            try:
                os.unlink(item.path)
            except OSError as exc:
                log.warning("%s: stays where files are made ahead; remove it yourself: %s", item.path, exc.strerror)

    def expect(self) -> None:
        """Files are about to be created."""
        if len(self._ready) <= SPARES // 2:
            self._wanted.set()

    def take(self, place: str) -> bool:
        """Move one to its place; False when none is there, or the disk refuses: the file is made in its place then.

        One that could not be moved is kept for later, behind all others.
        """
        self.expect()
        if not self._ready:
            return False
        name = self._ready.popleft()
        try:
            os.rename(f"{self._folder}/{name}", place)
        except FileNotFoundError:
            return False  # somebody tidied up
        except OSError as exc:
            log.debug("a file that was made ahead is not moved: %s", exc)
            self._ready.append(name)
            return False
        return True

    async def run(self) -> None:
        """Make them when they are wanted, until cancelled."""
        while True:
            await self._wanted.wait()
            names = [f"{self._count + number:x}" for number in range(SPARES - len(self._ready))]
            self._count += len(names)
            made = await trio.to_thread.run_sync(_make, self._folder, names)
            self._ready.extend(names[:made])
            self._wanted = trio.Event()
            if made < len(names):
                await trio.sleep(RETRY_SECONDS)


def _make(folder: Path, names: list[str]) -> int:
    """How many were made."""
    for made, name in enumerate(names):
        try:
            os.close(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as exc:
            log.debug("no files are made ahead: %s", exc)
            return made
    return len(names)
