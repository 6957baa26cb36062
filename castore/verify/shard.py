"""One of several equal parts of all digests, so that several hosts can share a scrub. Knows nothing of locations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from castore.catalog.scrub import ALL_DIGESTS, DigestRange

SHARDS_MAX: Final = 65536
"""More than any scheduler starts; a shard of 10 million locations then has 150."""
SHARD_RULE: Final = f"I/N, with N from 1 to {SHARDS_MAX} and I from 1 to N"

_SHARD: Final = re.compile(r"([0-9]{1,5})/([0-9]{1,5})", re.ASCII)
_SPACE: Final = 1 << 64
"""Shards are cut by the first 8 bytes of a digest."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `number` of `count`, the first being 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard written as `3/16`. Raises ValueError for anything that does not follow SHARD_RULE."""
        match = _SHARD.fullmatch(text)
        if match is None:
            raise ValueError("not a shard")
        shard = cls(int(match[1]), int(match[2]))
        if not 1 <= shard.number <= shard.count <= SHARDS_MAX:
            raise ValueError("no such shard")
        return shard

    @property
    def digests(self) -> DigestRange:
        """What belongs to it. Shards of one count are disjoint, and together they are all digests."""
        low = ((self.number - 1) * _SPACE // self.count).to_bytes(8) if self.number > 1 else ALL_DIGESTS.low
        high = (self.number * _SPACE // self.count).to_bytes(8) if self.number < self.count else ALL_DIGESTS.high
        return DigestRange(low, high)
