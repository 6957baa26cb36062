"""A daemon is killed while its S3 server is away: some rounds of each kind. `scripts/crash-rounds` has more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.cut_round import CutRounds, Trouble, cut_place
from tests.mount.parts_place import InParts
from tests.mount.store import MountedStore
from tests.servers.every import EveryServer
from tests.servers.s3_server import LocalServer

CUTS = (("seaweedfs", "killed"), ("seaweedfs", "503"), ("rgw", "killed"), ("rgw", "stopped"))


@pytest.fixture
def cut(every_server: EveryServer, name: str, tmp_path: Path) -> Iterator[tuple[InParts, Trouble]]:
    server = every_server[name]
    assert isinstance(server, LocalServer)
    with cut_place(tmp_path, server, seed=1) as both:
        yield both


@pytest.mark.parametrize(("name", "what"), CUTS, scope="session")
def test_a_daemon_and_its_server_are_cut(
    make_store: Callable[..., MountedStore], cut: tuple[InParts, Trouble], what: str
) -> None:
    place, trouble = cut
    store = make_store(place=place)
    store.mount()
    rounds = CutRounds(store, 1, place=place, trouble=trouble, troubles=(what,))
    rounds.run()
    rounds.check_all()
