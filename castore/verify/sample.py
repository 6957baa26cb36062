"""A random part of all digests, drawn anew each time, so that a few runs a day say how a store is. Not a shard."""

from __future__ import annotations

import re
import secrets
from fractions import Fraction
from typing import Final

from castore.catalog.scrub import ALL_DIGESTS, DigestRange

SAMPLE_RULE: Final = 'a part such as "1%" or "0.05%", above 0% and up to 100%'

_PERCENT: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?) ?%", re.ASCII)
_SPACE: Final = 1 << 64
"""It is drawn by 8 bytes of a digest."""


def parse_part(text: str) -> Fraction:
    """The part written as `1%`. Raises ValueError for anything that does not follow SAMPLE_RULE."""
    match = _PERCENT.fullmatch(text)
    part = Fraction(match[1]) / 100 if match else Fraction(0)
    if not 0 < part <= 1:
        raise ValueError("not a part")
    return part


def draw(part: Fraction, begin: int | None = None) -> tuple[DigestRange, ...]:
    """Ranges that hold about that part of all digests: one that begins anywhere, and its rest after the last digest.

    A digest's bytes are as good as random, so neighbours have nothing in common.
    """
    if part == 1:
        return (ALL_DIGESTS,)
    low = secrets.randbelow(_SPACE) if begin is None else begin
    high = low + max(1, int(part * _SPACE))
    if high < _SPACE:
        return (DigestRange(low.to_bytes(8), high.to_bytes(8)),)
    return (DigestRange(low.to_bytes(8), ALL_DIGESTS.high), DigestRange(b"", (high - _SPACE).to_bytes(8)))
