"""What holds for every test: the events that it leaves behind are as docs/events/ says. And where objects may lie.

After the tests a line names the S3 servers that they ran on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from tests.event_schemas import catalogs_below, check_catalog
from tests.places import LocalPlace, Place, S3Place
from tests.servers.every import EveryServer
from tests.servers.seaweedfs import SeaweedFS


@pytest.fixture(autouse=True)
def _events_follow_their_schemas(request: pytest.FixtureRequest) -> Iterator[None]:
    # Asked for here, so that this ends after whatever the test has mounted there.
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    for path in catalogs_below(folder) if folder is not None else ():
        check_catalog(path)


def pytest_configure() -> None:
    # A run in the background of a script ignores these, and so would every program that the tests start and signal.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _stays_where_it_is() -> Iterator[None]:
    """A test that leaves the process in another folder would break those after it, which start programs from here."""
    here = os.getcwd()
    yield
    there = os.getcwd()
    os.chdir(here)
    assert there == here


_SERVERS: Final = pytest.StashKey[EveryServer]()


@pytest.fixture(scope="session")
def every_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EveryServer]:
    """All real S3 servers by name, each started when a test first needs it."""
    with EveryServer(tmp_path_factory.mktemp) as servers:
        request.config.stash[_SERVERS] = servers
        yield servers


@pytest.fixture(scope="session")
def s3_server(every_server: EveryServer) -> SeaweedFS:
    """The server for the tests that need one, and not one of each kind."""
    return every_server.seaweedfs


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    servers = config.stash.get(_SERVERS, None)
    if servers is not None and servers.summary():
        terminalreporter.write_line(servers.summary())


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Where the objects of a test lie: `local`, unless it is run on several of PLACES or of EVERY_PLACE.

    The same test, told apart by the configuration alone: `@pytest.mark.parametrize("place", PLACES, indirect=True)`.
    """
    if getattr(request, "param", "local") == "local":
        yield LocalPlace(tmp_path)
        return
    with ExitStack() as relays:
        servers: EveryServer = request.getfixturevalue("every_server")
        yield S3Place(tmp_path, servers["seaweedfs" if request.param == "s3" else request.param], relays)
