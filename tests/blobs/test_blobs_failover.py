"""Bad, missing and unreachable locations: healed from another one, reported once, and never a wrong byte."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing

from castore.blobs.fetch import REPORT_INTERVAL_S
from castore.blobs.open_blob import OpenBlob
from castore.blobs.reader import BlobReader
from castore.catalog.records import FailureReason, LocationStatus
from castore.errors import (
    BlockUnreadable,
    CatalogBusy,
    StorageDenied,
    StorageError,
    StorageRejected,
    StorageTimeout,
    StorageUnavailable,
)
from tests.blobs.blob_world import BLOCK, MIB, World

DATA = os.urandom(MIB)


@pytest.fixture
async def reader(world: World, nursery: trio.Nursery) -> BlobReader:
    reader = world.reader()
    await nursery.start(reader.run)
    return reader


async def test_a_flipped_bit_is_healed_from_the_second_location(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA)
    world["first"].flip(blob, 3 * BLOCK + 7)
    assert await reader.open(blob).read(0, MIB) == DATA
    assert world.reports == [(blob.summary.digest, "first", FailureReason.DIGEST_MISMATCH)]
    assert reader.stats.bad_blocks == 2


async def test_only_bad_blocks_are_fetched_again(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA)
    for index in (1, 2, 5):
        world["first"].flip(blob, index * BLOCK)
    assert await reader.open(blob).read(0, MIB) == DATA
    runs = [(1, 2), (5, 1)]
    assert [(get.offset // BLOCK, get.length // BLOCK) for get in world["first"].gets] == [(0, 8), *runs]
    assert [(get.offset // BLOCK, get.length // BLOCK) for get in world["second"].gets] == runs


async def test_a_bad_last_block_is_healed(world: World, reader: BlobReader) -> None:
    data = DATA + b"tail"
    blob = await world.add(data)
    world["first"].flip(blob, MIB + 3)
    assert await reader.open(blob).read(MIB - 1, 100) == data[MIB - 1 :]
    assert world["second"].gets[0].length == 4


async def test_what_comes_wrong_once_is_fetched_again_and_not_reported(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA)
    world["first"].flips = 1
    assert await reader.open(blob).read(0, MIB) == DATA
    assert world.reports == []
    assert world["second"].gets == []
    assert reader.stats.bad_blocks == 1


async def test_two_bad_copies_that_complete_each_other_suffice(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA)
    world["first"].flip(blob, 1)
    world["second"].flip(blob, 5 * BLOCK)
    assert await reader.open(blob).read(0, MIB) == DATA


async def test_no_good_copy_is_an_error_that_names_each_location(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA)
    world["first"].flip(blob, 2 * BLOCK)
    world["second"].flip(blob, 2 * BLOCK)
    with pytest.raises(BlockUnreadable) as raised:
        await reader.open(blob).read(0, MIB)
    assert str(raised.value) == (
        f"{blob.summary.digest}: no good copy of block 2: first: digest_mismatch; second: digest_mismatch"
    )
    assert [report[1] for report in world.reports] == ["first", "second"]


async def test_missing_and_truncated_objects_are_reported_as_such(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA)
    world["first"].remove(blob)
    world["second"].truncate(blob, MIB // 2)
    file = reader.open(blob)
    with pytest.raises(BlockUnreadable, match="block 7: first: missing; second: size_mismatch"):
        await file.read(MIB - 1, 1)
    assert [report[1:] for report in world.reports] == [
        ("first", FailureReason.MISSING),
        ("second", FailureReason.SIZE_MISMATCH),
    ]
    assert await file.read(0, MIB // 2) == DATA[: MIB // 2]


@pytest.mark.parametrize("error", [StorageTimeout("slow"), StorageUnavailable("down"), StorageDenied("no")])
async def test_a_backend_that_cannot_be_asked_is_passed_over_and_not_reported(
    world: World, reader: BlobReader, error: StorageError
) -> None:
    blob = await world.add(DATA)
    world["first"].error = error
    assert await reader.open(blob).read(0, MIB) == DATA
    assert len(world["first"].gets) == 1
    assert world.reports == []


async def test_with_all_backends_down_memory_still_serves(world: World, reader: BlobReader) -> None:
    blob = await world.add(2 * DATA)
    file = reader.open(blob)
    await file.read(0, MIB)
    for backend in world.backends.values():
        backend.error = StorageUnavailable("connection refused")
    assert await file.read(0, MIB) == DATA
    assert await reader.open(blob).read(5 * BLOCK, BLOCK) == DATA[5 * BLOCK : 6 * BLOCK]
    with pytest.raises(StorageUnavailable, match="connection refused"):
        await file.read(MIB, 1)
    assert world.reports == []


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (StorageTimeout("slow"), StorageTimeout),
        (StorageDenied("no"), StorageDenied),
        (StorageRejected("what?"), BlockUnreadable),
    ],
)
async def test_a_location_that_may_be_good_decides_the_error(
    world: World, reader: BlobReader, first: StorageError, expected: type[Exception]
) -> None:
    blob = await world.add(DATA)
    world["first"].error = first
    world["second"].remove(blob)
    with pytest.raises(expected):
        await reader.open(blob).read(0, 1)


async def test_a_temporary_error_comes_before_a_refusal(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA)
    world["first"].error = StorageDenied("no")
    world["second"].error = StorageUnavailable("down")
    with pytest.raises(StorageUnavailable):
        await reader.open(blob).read(0, 1)


async def test_good_locations_are_asked_before_failed_ones(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA)
    world.locate(blob.blob_id, "first", LocationStatus.FAILED)
    world.locate(blob.blob_id, "second", LocationStatus.VERIFIED)
    await reader.open(blob).read(0, 1)
    assert (len(world["first"].gets), len(world["second"].gets)) == (0, 1)


async def test_the_configuration_orders_good_locations(
    world: World, nursery: trio.Nursery, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = await World(tmp_path_factory.mktemp("other"), "zebra", "ant").create()
    reader = other.reader()
    await nursery.start(reader.run)
    blob = await other.add(DATA)
    other.locate(blob.blob_id, "ant", LocationStatus.VERIFIED)
    await reader.open(blob).read(0, 1)
    assert (len(other["zebra"].gets), len(other["ant"].gets)) == (1, 0)
    other.close()


async def test_a_failed_location_whose_bytes_are_good_serves(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA, "first")
    world.locate(blob.blob_id, "first", LocationStatus.FAILED)
    assert await reader.open(blob).read(0, MIB) == DATA
    assert world.reports == []


async def test_a_failed_location_that_is_still_bad_is_not_reported_again(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA, "first")
    world.locate(blob.blob_id, "first", LocationStatus.FAILED)
    world["first"].flip(blob, 0)
    with pytest.raises(BlockUnreadable):
        await reader.open(blob).read(0, 1)
    assert world.reports == []


async def test_a_location_that_is_being_deleted_is_never_asked(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA, "first")
    world.locate(blob.blob_id, "first", LocationStatus.DELETING)
    with pytest.raises(BlockUnreadable, match="no location"):
        await reader.open(blob).read(0, 1)
    assert world["first"].gets == []


async def test_a_backend_that_is_not_configured_is_named(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA, "first")
    world.locate(blob.blob_id, "tape", LocationStatus.STORED)
    assert await reader.open(blob).read(0, 1) == DATA[:1]
    world["first"].remove(blob)
    with pytest.raises(BlockUnreadable, match=r"tape: not configured; first: missing$"):
        await reader.open(blob).read(MIB - 1, 1)


async def test_the_catalog_is_asked_at_each_decision(world: World, reader: BlobReader) -> None:
    blob = await world.add(DATA)
    file = reader.open(blob)
    await file.read(0, 1)
    world.locate(blob.blob_id, "first", LocationStatus.FAILED)
    await file.read(4 * BLOCK, 1)
    assert (len(world["first"].gets), len(world["second"].gets)) == (1, 1)


async def test_locations_of_another_blob_with_the_same_number_are_not_asked(world: World, reader: BlobReader) -> None:
    old = await world.add(DATA, "first")
    file = reader.open(old)
    world.forget(old)
    assert (await world.add(b"new", "first")).blob_id == old.blob_id
    with pytest.raises(BlockUnreadable, match="no location"):
        await file.read(0, 1)
    assert world.reports == []


async def test_many_reads_of_a_bad_location_report_it_once_in_a_while(
    world: World, reader: BlobReader, mock_clock: trio.testing.MockClock
) -> None:
    blob = await world.add(DATA)
    world["first"].remove(blob)

    async def read(file: OpenBlob, index: int) -> None:
        assert await file.read(index * BLOCK, BLOCK) == DATA[index * BLOCK : (index + 1) * BLOCK]

    async with trio.open_nursery() as readers:
        for index in (7, 5, 3, 1):
            readers.start_soon(read, reader.open(blob), index)
    await read(reader.open(blob), 0)
    assert len(world.reports) == 1
    mock_clock.jump(REPORT_INTERVAL_S)
    await read(reader.open(blob), 2)
    assert len(world.reports) == 2


async def test_a_report_that_fails_fails_no_read_and_is_made_again(
    world: World, reader: BlobReader, caplog: pytest.LogCaptureFixture
) -> None:
    blob = await world.add(DATA)
    world["first"].remove(blob)
    world.report_error = CatalogBusy("locked")
    file = reader.open(blob)
    assert await file.read(0, 1) == DATA[:1]
    assert [record.getMessage() for record in caplog.records] == [
        f"{blob.summary.digest} at first is missing, which could not be recorded: locked"
    ]
    caplog.clear()
    world.report_error = None
    assert await file.read(4 * BLOCK, 1) == DATA[4 * BLOCK : 4 * BLOCK + 1]
    assert len(world.reports) == 2
    assert caplog.records == []
