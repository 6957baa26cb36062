"""A litestream that does not get on: it is begun anew, and whoever reads waits for nothing meanwhile."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from castore.catalog.connection import create_catalog
from castore.catalog.reader import CatalogReader
from castore.catalog.writer import CatalogWriter
from castore.config import FollowSettings, StoreSettings
from castore.replica.follower import Follower
from castore.replica.litestream import find_program
from tests.mount.following import children_of
from tests.mount.store import run_tool


def litestream() -> int:
    """The process that keeps the copy."""
    children = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children_of(os.getpid())}
    [pid] = [pid for pid, command in children.items() if b"-follow-interval" in command]
    return pid


async def until(done: Callable[[], object]) -> None:
    """On this loop: what is true only while it is blocked is never seen."""
    with trio.fail_after(60):
        while not done():  # noqa: ASYNC110 another process is waited for
            await trio.sleep(0.01)


async def test_it_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is stopped, as one whose connection hangs: nothing comes, and it does not heed SIGTERM."""
    caplog.set_level(logging.CRITICAL)
    catalog, url = tmp_path / "catalog.db", f"file://{tmp_path}/replica"
    create_catalog(catalog)
    run_tool(find_program(), "replicate", "-once", catalog, url)
    store = StoreSettings(tmp_path / "state")
    store.state_dir.mkdir()
    follower = Follower(url, store, FollowSettings(), stalled_seconds=1, ask_every_seconds=0.25)
    follower.begin()
    before = follower.state().transaction
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.run, lambda: None)
            stopped = litestream()
            os.kill(stopped, signal.SIGSTOP)
            writer = CatalogWriter(catalog)
            await writer.run(lambda transaction: transaction.lease_inodes(1000))
            writer.close()
            await trio.to_thread.run_sync(run_tool, find_program(), "replicate", "-once", str(catalog), url)
            await until(lambda: "does not get on" in follower.state().error)
            # Its end, which takes seconds, is waited for meanwhile.
            assert Path(f"/proc/{stopped}/stat").read_text().split()[2] == "T"
            await until(lambda: follower.state().transaction != before and not follower.state().error)
            assert litestream() != stopped
            nursery.cancel_scope.cancel()
    finally:
        follower.close()
    with CatalogReader(catalog) as there, CatalogReader(store.catalog_path) as here:
        assert here.next_inode() == there.next_inode()
