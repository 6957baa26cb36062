"""Sizes and durations as people write them, and what is none. The settings that have them are in `test_config`."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from castore.config_values import MAX_SIZE_BYTES, parse_duration, parse_size

UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@given(st.integers(0, MAX_SIZE_BYTES // 2**40), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_sizes(number: int, unit: str, space: str) -> None:
    assert parse_size(f"{number}{space}{unit}") == number * UNITS[unit]


@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from(sorted(set(UNITS) - {"B"})))
def test_sizes_with_a_point(whole: int, thousandths: int, unit: str) -> None:
    exact = Fraction(whole * 1000 + thousandths, 1000) * UNITS[unit]
    text = f"{whole}.{thousandths:03d}{unit}"
    if exact.denominator == 1:
        assert parse_size(text) == exact
    else:
        with pytest.raises(ValueError, match="whole number"):
            parse_size(text)


@given(st.integers(0, 10**6), st.sampled_from([("ms", 1), ("s", 10**3), ("min", 60_000), ("h", 3_600_000)]))
def test_durations(number: int, unit: tuple[str, int]) -> None:
    assert round(parse_duration(f"{number}{unit[0]}") * 1000) == number * unit[1]


@given(st.text(max_size=12).filter(lambda text: re.fullmatch(r"[0-9.]+ ?[A-Za-z]+", text) is None))
@example("1GiB\n")
@example(" 1GiB")
@example("1  GiB")
@example("-1GiB")
@example("\u0661GiB")
def test_other_texts_are_no_sizes_or_durations(text: str) -> None:
    for parse in (parse_size, parse_duration):
        with pytest.raises(ValueError, match=r"^not a "):
            parse(text)
