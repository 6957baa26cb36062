"""The differential test of reads, for some seconds, and that it would notice. `scripts/differential` runs it longer."""

from __future__ import annotations

import random
from pathlib import Path

from tests.mount.differential import Pair, Reader, run
from tests.mount.store import MountedStore

SECONDS = 20.0
TRIES = 200


def test_no_wrong_byte_while_caches_and_a_backend_are_damaged(tmp_path: Path) -> None:
    """By two processes of eight threads. Every kind of harm was done, and met by reads."""
    report = run(tmp_path, "1", seconds=SECONDS)
    assert report.wrong == [], str(report)
    assert len(report.reads) == 9, str(report)
    assert len(report.harms) == 8, str(report)
    found = ("bad_blocks", "disk_bad", "disk_hits", "evicted_files")
    assert min(report.daemon[name] for name in found) > 0, str(report)


def test_it_notices_every_wrong_byte(store: MountedStore, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(400_000)
    (store.ingest("diff/1") / "a").write_bytes(data)
    package = store.publish("diff/1")
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / "a").write_bytes(bytes(byte ^ 1 for byte in data))
    pair = Pair("a", package, copies)
    reader = Reader([pair], random.Random(0))
    for kind in reader.kinds:
        reader.found.wrong.clear()
        for _ in range(TRIES):  # some are beyond the end
            kind(pair)
        assert len(reader.found.wrong) > TRIES / 2, kind
        assert "the first wrong one at 0" in reader.found.wrong[0]
    pair.close()
