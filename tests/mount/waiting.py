"""A publish that waits for as long as a test likes: one file of its version was closed once and is still open."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor

from tests.mount.store import MountedStore, fails, wait_until


class WaitingPublish:
    """One by rename, in a thread of the pool. It ends when the file is released, or with `ingest.publish_wait`."""

    def __init__(self, store: MountedStore, ref: str, pool: ThreadPoolExecutor) -> None:
        box = store.ingest(ref)
        self._folder = os.open(box, os.O_RDONLY | os.O_DIRECTORY)
        self._file = os.open(box / "file", os.O_WRONLY | os.O_CREAT)
        os.write(self._file, b"closed once")
        with fails(errno.EBUSY):  # at once: it is being written
            box.rename(store.package(ref))
        os.close(os.dup(self._file))
        self.began = time.monotonic()
        self.publish = pool.submit(box.rename, store.package(ref))
        # A try forgets why the last one failed. Names can not be looked up now, but what is open answers.
        wait_until(lambda: not self.error(), "the publish waits")

    def error(self) -> str:
        """`user.castore.error` of the version."""
        try:
            return os.getxattr(self._folder, "user.castore.error").decode()
        except OSError as exc:
            if exc.errno != errno.ENODATA:
                raise
            return ""

    def fail(self) -> None:
        """Write to the file again: who waits is answered EBUSY."""
        os.pwrite(self._file, b"c", 0)

    def release(self) -> None:
        """Close the file."""
        os.close(self._file)

    def close(self) -> None:
        """Close the rest."""
        os.close(self._folder)
