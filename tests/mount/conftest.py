"""Fixtures of the mount's tests: a mounted store, and a factory for stores with other settings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.store import MountedStore


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., MountedStore]]:
    """Makes stores, each in a folder of its own; all are cleared away at the end."""
    stores: list[MountedStore] = []

    def make(ingest: str = "") -> MountedStore:
        # A short path: other users have to reach it, and pytest's own folders are private.
        root = Path(tempfile.mkdtemp(dir=tmp_path, prefix="s"))
        store = MountedStore(root, ingest)
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(make_store: Callable[..., MountedStore]) -> MountedStore:
    """A store that is mounted; a traceback in its daemon's log fails the test."""
    made = make_store()
    made.mount()
    return made


@pytest.fixture(autouse=True)
def _no_unforeseen(make_store: Callable[..., MountedStore], request: pytest.FixtureRequest) -> Iterator[None]:
    """No daemon may have met something unforeseen."""
    yield
    for path in request.getfixturevalue("tmp_path").glob("s*/state/log/mount.log"):
        assert "Traceback" not in path.read_text(), path.read_text()
