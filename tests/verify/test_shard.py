"""Shards are disjoint and cover every digest; how they are written."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.catalog.scrub import ALL_DIGESTS
from castore.verify.shard import SHARDS_MAX, Shard


@given(st.binary(min_size=32, max_size=32), st.integers(1, SHARDS_MAX))
def test_a_digest_is_in_exactly_one(raw: bytes, count: int) -> None:
    guess = int.from_bytes(raw[:8]) * count // 2**64 + 1
    near = [number for number in range(guess - 2, guess + 3) if 1 <= number <= count]
    ranges = [Shard(number, count).digests for number in near]
    assert [within.low <= raw < within.high for within in ranges].count(True) == 1


@given(st.integers(1, 2000))
def test_they_follow_each_other(count: int) -> None:
    ranges = [Shard(number, count).digests for number in range(1, count + 1)]
    assert ranges[0].low == ALL_DIGESTS.low
    assert ranges[-1].high == ALL_DIGESTS.high
    assert all(left.high == right.low for left, right in pairwise(ranges))


@given(st.integers(1, 50).flatmap(lambda count: st.tuples(st.integers(1, count), st.just(count))))
def test_slices_follow_each_other(shard: tuple[int, int]) -> None:
    within = Shard(*shard).digests
    slices = list(within.slices())
    assert (slices[0].low, slices[-1].high) == (within.low, within.high)
    assert all(left.high == right.low for left, right in pairwise(slices))
    assert all(part.low <= part.high for part in slices)


@pytest.mark.parametrize("text", ["", "3", "0/3", "4/3", "1/0", "-1/3", "1/65537", "1 / 3", "1/3 ", "a/b", "1/3/5"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ValueError, match="shard"):
        Shard.parse(text)


def test_what_is_one() -> None:
    assert Shard.parse("3/16") == Shard(3, 16)
    assert Shard.parse("1/1").digests == ALL_DIGESTS
