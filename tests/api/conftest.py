"""Fixtures of the HTTP API's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.places import Place
from tests.published import PublishedStore


@pytest.fixture
async def store(tmp_path: Path, place: Place) -> AsyncIterator[PublishedStore]:
    """A catalog with two backends, `first` and `second`."""
    store = await PublishedStore(tmp_path, place, "first", "second").create()
    yield store
    await store.aclose()
