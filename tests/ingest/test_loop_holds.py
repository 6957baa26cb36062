"""What large trees take of the daemon's loop at a time, in processor time: others are answered in between."""

from __future__ import annotations

import time
from pathlib import Path

import trio
from trio.abc import Instrument

from castore.ingest.tree import INGEST_ROOT
from tests.ingest.running import running_ingest

OWNER = {"mode": 0o755, "uid": 0, "gid": 0}
FILES = 2000
HOLD_MAX_SECONDS = 0.03


class LongestStep(Instrument):
    """The longest that any task had the loop, in seconds of the processor: a busy host makes no step longer."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0
        self._began = time.thread_time()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._began = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.seconds = max(self.seconds, time.thread_time() - self._began)
        self.count += 1


async def test_forgetting_a_published_version_leaves_the_loop_to_others(tmp_path: Path) -> None:
    async with running_ingest(tmp_path) as (ingest, backend, _):
        backend.go_on.set()
        name = ingest.tree.mkdir(INGEST_ROOT, b"n", **OWNER)
        version = ingest.tree.mkdir(name.inode, b"1", **OWNER)
        for number in range(FILES):
            file = ingest.files.create(ingest.tree.create(version.inode, b"%d" % number, **OWNER))
            await ingest.files.release(file, writable=True)
        with trio.fail_after(60):
            await ingest.publisher.wait_stored(version.inode)
        longest = LongestStep()
        trio.lowlevel.add_instrument(longest)
        await ingest.publisher.forget(version.inode, b"")
        trio.lowlevel.remove_instrument(longest)
        assert ingest.store.node(version.inode) is None
        assert not ingest.files.staged_bytes
    assert 0 < longest.seconds < HOLD_MAX_SECONDS, longest.count
