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
    assert window.rate() == Rate(1, 100), "as it was in the last seconds, not since the first"
    assert len(window._seconds) == WINDOW_SECONDS - 1, "memory is bounded; the second that runs has none yet"
    mock_clock.jump(0.5)
    assert window.rate() == Rate(round((WINDOW_SECONDS - 1) / 9.5, 3), round((WINDOW_SECONDS - 1) * 100 / 9.5, 3))
    mock_clock.jump(WINDOW_SECONDS + 1)
    assert window.rate() == Rate(0, 0)
    window.add(5, 0)
    assert window.rate() == Rate(5, 0)


async def test_what_comes_within_a_second_is_one_entry_of_the_window(mock_clock: MockClock) -> None:
    window = RateWindow()
    for _ in range(4 * WINDOW_SECONDS * 4):
        window.add(1, 10)
        mock_clock.jump(0.25)
    assert len(window._seconds) == WINDOW_SECONDS
    assert window.rate() == Rate(4, 40)


async def test_a_pause_as_long_as_the_window_does_not_count(mock_clock: MockClock) -> None:
    """A shorter one does: the rate sinks while nothing becomes stored."""
    window = RateWindow()
    window.add(18, 180)
    mock_clock.jump(WINDOW_SECONDS - 1)
    assert window.rate() == Rate(2, 20)
    mock_clock.jump(1)
    assert window.rate() == Rate(0, 0), "the second in which it came is older than the window"
    window.add(8, 80)
    mock_clock.jump(2)
    window.add(2, 20)
    assert window.rate() == Rate(5, 50)


def test_what_is_left() -> None:
    assert Rate(0, 0).seconds_for(0, 0) == 0
    assert Rate(0, 0).seconds_for(1, 1) is None
    assert Rate(10, 1000).seconds_for(20, 1000) == 2
    assert Rate(10, 1000).seconds_for(20, 5000) == 5
    assert Rate(10, 0).seconds_for(20, 0) == 2
