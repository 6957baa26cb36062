"""The catalog of a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.catalog.catalogs import Catalog, made


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    """An empty catalog and an empty workspace."""
    with made(tmp_path) as catalog:
        yield catalog
