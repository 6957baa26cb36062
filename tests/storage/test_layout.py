"""Digest <-> key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.digest import MANIFEST_ALGORITHM, PRIMARY_ALGORITHM, Digest
from castore.storage.layout import digest_of, key_of

HEX = "ab12" + "0" * 59 + "f"


def test_a_key_names_the_algorithm_and_the_digest() -> None:
    assert key_of(Digest.parse(f"sha256:{HEX}")) == f"sha256/ab/12/{HEX}"
    assert key_of(Digest.parse(f"manifest-sha256:{HEX}")) == f"manifest-sha256/ab/12/{HEX}"


@given(st.sampled_from([PRIMARY_ALGORITHM, MANIFEST_ALGORITHM]), st.binary(min_size=32, max_size=32))
def test_every_key_leads_back_to_its_digest(algorithm: str, raw: bytes) -> None:
    digest = Digest(algorithm, raw)
    assert digest_of(key_of(digest)) == digest


@pytest.mark.parametrize(
    "key",
    [
        "",
        HEX,
        f"sha256/{HEX}",
        f"sha256/ab/13/{HEX}",
        f"sha256/ac/12/{HEX}",
        f"sha256/ab/12/{HEX[:-1]}",
        f"sha256/ab/12/{HEX}0",
        f"sha256/ab/12/{HEX}\n",
        f"sha256/AB/12/{HEX.upper()}",
        f"md5/ab/12/{HEX}",
        f"/sha256/ab/12/{HEX}",
        f"x/sha256/ab/12/{HEX}",
        "sha256/ab/12/.castore-put-0123456789abcdef",
    ],
)
def test_strangers_are_no_objects(key: str) -> None:
    assert digest_of(key) is None
