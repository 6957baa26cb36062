"""The daemon's memory while 64 readers stream 64 files, on both types of backend. With larger ones: a script."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.stream_memory import LIMIT_BYTES, READERS, measure
from tests.places import PLACES, Place

MIB_EACH = 8
"""Enough for every window to be full: together eight times what the daemon keeps in memory."""


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_64_readers_of_64_files(tmp_path: Path, place: Place) -> None:
    root = tmp_path / "store"
    root.mkdir()
    figures = measure(root, place, readers=READERS, mib=MIB_EACH)
    assert figures.wrong == 0
    assert figures.idle_bytes + (32 << 20) < figures.peak_bytes < LIMIT_BYTES, figures
