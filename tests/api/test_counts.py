"""Counts of a large catalog: who waits for them, and who is given those of before."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from castore.api.counts import COUNTS_SECONDS, COUNTS_SHARE, CatalogCounts, Counts
from castore.errors import StateError

TOOK = 5.0


class Catalog:
    """Is counted when a test says so, from a thread as the real one."""

    def __init__(self) -> None:
        self.answers: queue.SimpleQueue[int | StateError] = queue.SimpleQueue()
        self.began = 0

    def count(self, path: Path) -> Counts:
        self.began += 1
        answer = self.answers.get(timeout=60)
        if isinstance(answer, StateError):
            raise answer
        return Counts(0, answer, 0, [], [], [])


@pytest.fixture
def catalog() -> Catalog:
    return Catalog()


@pytest.fixture
async def counts(catalog: Catalog, nursery: trio.Nursery) -> CatalogCounts:
    counts = CatalogCounts(Path("catalog.db"), count=catalog.count)
    await nursery.start(counts.run)
    return counts


async def until_counting(catalog: Catalog, times: int) -> None:
    while catalog.began < times:
        await wait_all_tasks_blocked()


async def test_one_that_is_counted_slowly(catalog: Catalog, counts: CatalogCounts, mock_clock: MockClock) -> None:
    found: list[int] = []

    async def ask() -> None:
        found.append((await counts.latest()).package_count)

    async with trio.open_nursery() as nursery:  # the first time all wait, for one count
        nursery.start_soon(ask)
        nursery.start_soon(ask)
        await until_counting(catalog, 1)
        mock_clock.jump(TOOK)
        catalog.answers.put(1)
    assert found == [1, 1]
    mock_clock.jump(COUNTS_SHARE * TOOK - 1)
    assert (await counts.latest()).package_count == 1
    assert catalog.began == 1
    mock_clock.jump(2)
    assert (await counts.latest()).package_count == 1  # nobody waits again
    await until_counting(catalog, 2)
    assert (await counts.latest()).package_count == 1
    catalog.answers.put(2)
    while (await counts.latest()).package_count == 1:
        await wait_all_tasks_blocked()
    assert catalog.began == 2


async def test_the_first_counts_are_waited_for_within_a_bound(
    catalog: Catalog, counts: CatalogCounts, mock_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            assert await counts.soon() is None

        nursery.start_soon(ask)
        await until_counting(catalog, 1)
        mock_clock.jump(COUNTS_SECONDS)
    catalog.answers.put(7)
    assert (await counts.latest()).package_count == 7
    assert catalog.began == 1  # it went on


async def test_a_catalog_that_cannot_be_read(catalog: Catalog, counts: CatalogCounts) -> None:
    catalog.answers.put(StateError("gone"))
    with pytest.raises(StateError, match="gone"):
        await counts.latest()
    catalog.answers.put(StateError("gone"))
    assert await counts.soon() is None
    catalog.answers.put(3)
    assert (await counts.latest()).package_count == 3
