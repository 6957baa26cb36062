"""Fixtures of the read path's tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.blobs.blob_world import MIB, World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Two backends, `first` and `second`."""
    world = await World(tmp_path, "first", "second").create()
    yield world
    world.close()


@pytest.fixture(scope="session")
def large() -> bytes:
    """64 MiB: 512 blocks, so that windows and gets reach their full size."""
    return os.urandom(64 * MIB)
