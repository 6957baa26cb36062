"""ingest/ against a plain directory, by random operations with publishes, kills and restarts in between."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.mount.model import SENTENCES, World
from tests.mount.model_machine import PUBLISH_WAIT, run_examples
from tests.mount.store import MountedStore

EXAMPLES = 24
SEED = 1


def test_a_mount_is_a_disk_but_for_what_is_written_down(
    make_store: Callable[..., MountedStore], tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    store = make_store(PUBLISH_WAIT)
    store.mount()
    world = World(store, tmp_path / "disk")
    run_examples(world, count=EXAMPLES, number=SEED)
    world.check_packages()
    assert "Traceback" not in store.log()
    # A run in which little happens would prove little.
    assert min(world.kills, world.restarts, len(world.packages)) > 0, world.said()
    assert world.steps > 10 * EXAMPLES, world.said()


def test_every_difference_is_written_down() -> None:
    semantics = (Path(__file__).parents[2] / "docs/SEMANTICS.md").read_text()
    text = re.sub(r"\s+", " ", semantics)
    assert [sentence for sentence in SENTENCES if sentence not in text] == []
