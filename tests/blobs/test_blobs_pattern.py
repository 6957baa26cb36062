"""What counts as sequential, and how the window grows."""

from __future__ import annotations

import random

import pytest

from castore.blobs.pattern import WINDOW_MAX_BYTES, WINDOW_MIN_BYTES, ReadPattern

KIB = 1024


def test_the_third_read_in_a_row_opens_the_window() -> None:
    pattern = ReadPattern()
    assert [pattern.observe(start, start + 4096) for start in (0, 4096, 8192)] == [0, 0, WINDOW_MIN_BYTES]


def test_the_window_is_what_was_read_within_its_bounds() -> None:
    pattern = ReadPattern()
    step = 256 * KIB
    windows = [pattern.observe(start, start + step) for start in range(0, 2 * WINDOW_MAX_BYTES, step)]
    assert windows[2] == 768 * KIB
    assert windows[7] == 2048 * KIB
    assert windows[-1] == WINDOW_MAX_BYTES
    assert windows == sorted(windows)


@pytest.mark.parametrize("order", [(1, 0), (0, 2, 1), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_overtaken_reads_are_sequential(order: tuple[int, ...]) -> None:
    # The kernel sends a few readahead requests at once, and they arrive in any order.
    pattern = ReadPattern()
    steps = [base + step for base in range(0, 8 * len(order), len(order)) for step in order]
    for step in steps:
        pattern.observe(step * 128 * KIB, (step + 1) * 128 * KIB)
        assert pattern.sequential or step < 3 * len(order)
    end = max(steps) + 1
    assert pattern.observe(end * 128 * KIB, (end + 1) * 128 * KIB) >= len(steps) * 64 * KIB


def test_two_readers_of_one_handle_are_sequential() -> None:
    pattern = ReadPattern()
    far = 1 << 30
    windows = [pattern.observe(base + at, base + at + 4096) for at in range(0, 40960, 4096) for base in (0, far)]
    assert all(windows[4:])


def test_random_reads_open_no_window() -> None:
    pattern, source = ReadPattern(), random.Random(1)
    starts = [source.randrange(64 * 1024 * KIB // 4096) * 4096 for _ in range(10_000)]
    assert not any(pattern.observe(start, start + 4096) for start in starts)


def test_reading_the_same_again_opens_no_window() -> None:
    pattern = ReadPattern()
    assert not any(pattern.observe(8192, 12288) for _ in range(10))


def test_a_stray_read_opens_nothing_and_ends_nothing() -> None:
    pattern = ReadPattern()
    windows = [pattern.observe(start, start + 4096) for start in (0, 4096, 8192, 12288, 1 << 30, 16384)]
    assert windows[-2:] == [0, WINDOW_MIN_BYTES]


def test_two_jumps_close_the_window() -> None:
    pattern = ReadPattern()
    for start in (*range(0, 40960, 4096), 1 << 30, 1 << 20):
        pattern.observe(start, start + 4096)
    assert not pattern.sequential
    assert pattern.observe(40960, 45056) == WINDOW_MIN_BYTES


def test_reset_closes_the_window() -> None:
    pattern = ReadPattern()
    for start in (0, 4096, 8192):
        pattern.observe(start, start + 4096)
    pattern.reset()
    assert pattern.observe(12288, 16384) == 0
