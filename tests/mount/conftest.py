"""Fixtures of the mount's tests: a mounted store, one for all tests of a file, and a factory for other settings."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.event_schemas import catalogs_below, check_catalog
from tests.mount.store import MountedStore
from tests.places import Place


def _clear(stores: list[MountedStore]) -> None:
    for store in stores:
        store.close()
        for folder in (store.objects, store.state / "staging"):
            # pytest keeps the folders of three runs: logs and catalogs may help, gigabytes of bytes do not.
            shutil.rmtree(folder, ignore_errors=True)
    for store in stores:
        assert "Traceback" not in store.log(), store.log()
        for catalog in catalogs_below(store.state):
            check_catalog(catalog)


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., MountedStore]]:
    """Makes stores, each in a folder of its own; all are cleared away at the end.

    `ingest` is put in that section of the configuration, `place` and `port` are MountedStore's. Other users can reach
    the mountpoint of a `reachable` store; pytest's own folders are private. A traceback in a daemon's log fails the
    test: something unforeseen was met.
    """
    stores: list[MountedStore] = []
    outside: list[Path] = []

    def make(ingest: str = "", *, reachable: bool = False, place: Place | None = None, port: int = 0) -> MountedStore:
        root = Path(tempfile.mkdtemp(dir=None if reachable else tmp_path, prefix="castore-" if reachable else "s"))
        if reachable:
            outside.append(root)
            root.chmod(0o755)
        store = MountedStore(root, ingest, place=place, port=port)
        stores.append(store)
        return store

    yield make
    try:
        _clear(stores)
    finally:
        for root in outside:
            shutil.rmtree(root)


@pytest.fixture
def store(make_store: Callable[..., MountedStore]) -> MountedStore:
    """A store that is mounted, for one test alone."""
    made = make_store()
    made.mount()
    return made


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mounted store for all tests of a file, each with a NAME of its own; nobody unmounts it."""
    made = MountedStore(tmp_path_factory.mktemp("shared"))
    made.mount()
    yield made
    _clear([made])
