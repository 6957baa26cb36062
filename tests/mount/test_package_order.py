"""The order in which the files of a package follow each other, against `os.walk` of the same tree. Fetches nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from castore.blobs.siblings import Order, Place
from castore.catalog.reader import CatalogReader
from mount.package_order import PackageOrder
from tests.mount.store import MountedStore

LARGEST = 20


@pytest.fixture(scope="module")
def package(shared_store: MountedStore) -> Path:
    """Made in an order that is not that of the names, with what is not listed in between."""
    box = shared_store.ingest("order/1")
    source = random.Random(4)
    folders = [box]
    for number in range(12):
        folders.append(source.choice(folders) / f"d{source.randrange(1000)}-{number}")
        folders[-1].mkdir()
    for number in range(300):
        size = source.choice([1, 7, LARGEST, LARGEST, LARGEST + 1, 0])
        (source.choice(folders) / f"f{source.randrange(1000)}-{number}").write_bytes(bytes([number % 256]) * size)
    for number in range(20):
        (source.choice(folders) / f"l{number}").symlink_to("anywhere")
    first = next(path for path in box.rglob("f*") if path.stat().st_size == 7)
    (box / "again").hardlink_to(first)
    other = shared_store.ingest("order/2")
    (other / "file").write_bytes(b"other")
    made = shared_store.publish("order/1")
    shared_store.publish("order/2")
    return made


@pytest.fixture
def order(shared_store: MountedStore) -> Iterator[PackageOrder]:
    with CatalogReader(shared_store.state / "catalog.db") as catalog:
        yield PackageOrder(catalog)


def walk(folder: Path, *, by_name: bool) -> list[Path]:
    """The files of 1 to LARGEST bytes, without further names of one, in the order that is asked for."""
    entries = list(os.scandir(folder))
    if by_name:
        entries.sort(key=lambda entry: os.fsencode(entry.name))
    files = [Path(entry) for entry in entries if entry.is_file(follow_symlinks=False)]
    files = [path for path in files if 1 <= path.stat().st_size <= LARGEST and path.name != "again"]
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            files += walk(Path(entry), by_name=by_name)
    return files


@pytest.mark.parametrize("by_name", [False, True], ids=["by number", "by name"])
@pytest.mark.parametrize("limit", [1, 8, 64])
def test_it_is_that_of_a_walk(package: Path, order: PackageOrder, by_name: bool, limit: int) -> None:
    expected = walk(package, by_name=by_name)
    by = Order.NAME if by_name else Order.NUMBER
    first = expected[0].stat()
    place = Place(expected[0].parent.stat().st_ino, first.st_ino, os.fsencode(expected[0].name))
    numbers = [place.number]
    while found := order.following(place, by, limit, LARGEST):
        numbers += [sibling.place.number for sibling in found]
        place = found[-1].place
        assert all(1 <= sibling.blob.summary.size_bytes <= LARGEST for sibling in found)
    assert numbers == [path.stat().st_ino for path in expected]


def test_a_name_that_is_nowhere_has_nothing_after_it(order: PackageOrder) -> None:
    assert order.following(Place(10**12, 10**12 + 1, b"name"), Order.NUMBER, 8, LARGEST) == []


def test_little_is_looked_at_for_one_answer(shared_store: MountedStore, order: PackageOrder) -> None:
    """Where nearly all is large, an answer may be empty, and is not waited for."""
    box = shared_store.ingest("large/1")
    (box / "first").write_bytes(b"x")
    for number in range(1100):
        (box / f"f{number}").write_bytes(b"x" * (LARGEST + 1))
    (box / "last").write_bytes(b"x")
    package = shared_store.publish("large/1")
    place = Place(package.stat().st_ino, (package / "first").stat().st_ino, b"first")
    assert order.following(place, Order.NUMBER, 8, LARGEST) == []
