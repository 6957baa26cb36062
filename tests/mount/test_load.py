"""Eight writers, two publishers and two readers for some seconds. `scripts/load-rounds` goes on for minutes."""

from __future__ import annotations

from tests.mount.load import Load
from tests.mount.store import MountedStore

SECONDS = 15.0


def test_nothing_is_lost_and_nothing_grows(store: MountedStore) -> None:
    report = Load(store, seconds=SECONDS, seed=1).run()
    assert report.reads > 0, report.said()
    assert report.rewrites > 0, report.said()
    assert len(report.packages) >= 8, report.said()
