"""The rate of puts and what it says of the rest, by a clock that the test turns."""

from __future__ import annotations

from trio.testing import MockClock

from castore.ingest.rate import WINDOW_SECONDS, Rate, RateWindow


async def test_it_counts_the_last_seconds(mock_clock: MockClock) -> None:
    window = RateWindow()
    assert window.rate() == Rate(0, 0)
    for _ in range(4):
        window.add(10, 4000)
        mock_clock.jump(1)
    assert window.rate() == Rate(10, 4000)
    for _ in range(1000):
        window.add(1, 100)
        mock_clock.jump(1)
    assert 0.9 <= window.rate().files_per_s <= 1
    assert 90 <= window.rate().bytes_per_s <= 100
    assert len(window._seconds) <= WINDOW_SECONDS + 1
    mock_clock.jump(WINDOW_SECONDS + 1)
    assert window.rate() == Rate(0, 0)
    window.add(5, 0)
    assert window.rate() == Rate(5, 0)


def test_what_is_left() -> None:
    assert Rate(0, 0).seconds_for(0, 0) == 0
    assert Rate(0, 0).seconds_for(1, 1) is None
    assert Rate(10, 1000).seconds_for(20, 1000) == 2
    assert Rate(10, 1000).seconds_for(20, 5000) == 5
    assert Rate(10, 0).seconds_for(20, 0) == 2
