"""Another block with the same xxh3 checksum: what whoever controls a backend can make, and no accident does."""

from __future__ import annotations

import struct
from typing import Final

import xxhash

_SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
)
"""The beginning of the constant that XXH3 mixes in (xxHash's specification, "XXH3 default secret")."""
_STRIPE_BYTES: Final = 64
_LOW: Final = (1 << 32) - 1
_ALL: Final = (1 << 64) - 1


def forge(block: bytes) -> bytes:
    """Five words differ, the checksum does not. For blocks of at least 1 KiB.

    Of each stripe of 64 bytes the first word `x`, with the secret's word `k` of that stripe, adds x to one sum and the
    product of both halves of x ^ k to another (same source, "accumulate"). Nothing else is known of it before 16
    stripes are summed up. So other words with the same two sums, modulo 2**64, are found by arithmetic.
    """
    places = [_STRIPE_BYTES * number for number in range(5)]
    keys = struct.unpack("<5Q", _SECRET[:40])
    words = [struct.unpack_from("<Q", block, place)[0] for place in places]
    products = sum(((word ^ key) & _LOW) * ((word ^ key) >> 32) for word, key in zip(words, keys, strict=True)) & _ALL
    # The last three make the products: 1 * a + 2**31 * b + 2**31 * c.
    upper = products >> 31
    most = min(upper, _LOW)
    halves = [(1, products & (1 << 31) - 1), (1 << 31, most), (1 << 31, upper - most)]
    new = [key ^ (high << 32 | low) for (low, high), key in zip(halves, keys[2:], strict=True)]
    # The first two have a half that is 0, so their products are, and the other halves make the sum.
    rest = (sum(words) - sum(new)) & _ALL
    second_low = (rest - (keys[0] & _LOW)) & _LOW
    second = (keys[1] >> 32) << 32 | second_low
    first = (rest - second) & _ALL
    forged = bytearray(block)
    for place, word in zip(places, [first, second, *new], strict=True):
        struct.pack_into("<Q", forged, place, word)
    assert xxhash.xxh3_64_digest(forged) == xxhash.xxh3_64_digest(block)
    assert forged != block
    return bytes(forged)
