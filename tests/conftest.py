"""What holds for every test: the events that it leaves behind are as docs/events/ says. And where objects may lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.event_schemas import catalogs_below, check_catalog
from tests.places import BUCKET, LocalPlace, Place, S3Place
from tests.servers.seaweedfs import SeaweedFS


@pytest.fixture(autouse=True)
def _events_follow_their_schemas(request: pytest.FixtureRequest) -> Iterator[None]:
    # Asked for here, so that this ends after whatever the test has mounted there.
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    for path in catalogs_below(folder) if folder is not None else ():
        check_catalog(path)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A real S3 server for all tests whose objects lie there."""
    with SeaweedFS(tmp_path_factory.mktemp("places")) as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Where the objects of a test lie: `local`, unless it is run on several of PLACES.

    The same test, told apart by the configuration alone: `@pytest.mark.parametrize("place", PLACES, indirect=True)`.
    """
    if getattr(request, "param", "local") == "local":
        yield LocalPlace(tmp_path)
        return
    with ExitStack() as relays:
        yield S3Place(tmp_path, request.getfixturevalue("s3_server"), relays)
