"""What holds for every test: the events that it leaves behind are as docs/events/ says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.event_schemas import catalogs_below, check_catalog
from tests.places import PLACES, Place


@pytest.fixture(autouse=True)
def _events_follow_their_schemas(request: pytest.FixtureRequest) -> Iterator[None]:
    # Asked for here, so that this ends after whatever the test has mounted there.
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    for path in catalogs_below(folder) if folder is not None else ():
        check_catalog(path)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a test's objects lie: the same test on each type of backend, told apart by its configuration alone."""
    return PLACES[request.param](tmp_path)
