"""Sweeping again and again, on real backends. What one sweep removes is tested beside each backend."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from castore.config import LocalSettings
from castore.storage.open import create_backend
from mount.sweeping import sweep_always
from tests.mount.store import wait_until


def leave(path: Path) -> Path:
    """What a put leaves that was killed long ago."""
    folder = path / "sha256/ab/cd"
    folder.mkdir(parents=True, exist_ok=True)
    leftover = folder / f".castore-put-{'0' * 16}"
    leftover.write_bytes(b"half")
    os.utime(leftover, (0, 0))
    return leftover


def is_gone(path: Path) -> bool:
    return not path.exists()


async def until(done: Callable[[], bool], what: str) -> None:
    await trio.to_thread.run_sync(wait_until, done, what)


async def test_it_goes_on_and_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What comes later is removed, too, and a backend that was away for a while is swept when it is back."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "objects"
    settings = LocalSettings("main", path)
    await create_backend(settings)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(sweep_always, settings, first_s=0, every_s=0.01))
        for _ in range(2):
            await until(partial(is_gone, leave(path)), "it is swept")
        path.rename(tmp_path / "away")
        await until(lambda: "backend main is not swept: " in caplog.text, "the failure is logged")
        (tmp_path / "away").rename(path)
        await until(partial(is_gone, leave(path)), "it is swept again")
        nursery.cancel_scope.cancel()
    assert caplog.text.count("backend main: 1 leftovers of broken puts removed") >= 2
