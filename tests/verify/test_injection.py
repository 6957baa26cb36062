"""Damage injected into a store on S3, in short: scripts/scrub-rounds has the long form."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from castore.digest import Digest
from tests.places import Place
from tests.published import PublishedStore
from tests.verify.injection import DAMAGED, check, fill


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_all_damage_is_found_whatever_happens_to_the_runs_and_is_mended(tmp_path: Path, place: Place) -> None:
    store = PublishedStore(tmp_path, place, "first", "second")
    digests: list[Digest] = []

    async def prepare() -> None:
        await store.create()
        digests.extend(await fill(store, 250))
        for backend in store.backends.values():
            await backend.aclose()

    trio.run(prepare)
    said = list(check(store, digests, seed=7))
    assert said[0].startswith(f"{DAMAGED} of 250 objects damaged")
    assert len(said) == 4
