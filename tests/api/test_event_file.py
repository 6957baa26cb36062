"""The file of events: whole lines whatever happened before, set aside when long, and every way in which it fails."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from castore.api.event_file import EventFile
from castore.config_events import EventFileSettings
from castore.errors import DeliveryError


def event(number: int) -> dict[str, Any]:
    return {"sequence": f"{number:020d}", "subject": "p/ü\n\u2028"}


LINE_BYTES = len(json.dumps(event(1), separators=(",", ":"))) + 1


def numbers(path: Path) -> list[int]:
    text = path.read_text()
    assert text.endswith("\n")
    return [int(json.loads(line)["sequence"]) for line in text.split("\n")[:-1]]


def sink(path: Path, **options: Any) -> EventFile:
    return EventFile(EventFileSettings(path=path, **options))


async def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = sink(path)
    await file.send([event(1), event(2)])
    await file.send([event(3)])
    assert numbers(path) == [1, 2, 3]
    assert path.stat().st_mode & 0o777 & ~0o640 == 0
    assert json.loads(path.read_text().splitlines()[0]) == event(1)
    path.rename(tmp_path / "taken away")
    await file.send([event(4)])
    assert numbers(path) == [4]


@pytest.mark.parametrize("half", [b"{", b'{"sequence":"', b"x" * 5000])
async def test_half_a_line_goes(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "events.jsonl"
    await sink(path).send([event(1)])
    path.write_bytes(path.read_bytes() + half)
    await sink(path).send([event(2)])
    assert numbers(path) == [1, 2]
    path.write_bytes(half)
    await sink(path).send([event(3)])
    assert numbers(path) == [3]


async def test_what_is_no_file_of_events_stays(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    data = b"x" * (2 << 20)
    path.write_bytes(data)
    with pytest.raises(DeliveryError, match="is no file of events"):
        await sink(path).send([event(1)])
    assert path.read_bytes() == data


async def test_it_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = sink(path, rotate_bytes=3 * LINE_BYTES, rotate_keep=2)
    await file.send([event(number) for number in range(1, 6)])
    assert (numbers(path), numbers(tmp_path / "events.jsonl.1")) == ([4, 5], [1, 2, 3])
    for number in range(6, 12):
        await file.send([event(number)])
    assert sorted(os.listdir(tmp_path)) == ["events.jsonl", "events.jsonl.1", "events.jsonl.2"]
    assert [numbers(tmp_path / name) for name in sorted(os.listdir(tmp_path))] == [[10, 11], [7, 8, 9], [4, 5, 6]]


async def test_a_gap_left_by_a_kill_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = sink(path, rotate_bytes=LINE_BYTES, rotate_keep=3)
    await file.send([event(number) for number in (1, 2, 3)])
    (tmp_path / "events.jsonl.1").rename(tmp_path / "events.jsonl.3")
    (tmp_path / "events.jsonl.2").rename(tmp_path / "events.jsonl.1")
    await file.send([event(4)])
    found = {name: numbers(tmp_path / name) for name in os.listdir(tmp_path)}
    assert found == {"events.jsonl": [4], "events.jsonl.1": [3], "events.jsonl.2": [1], "events.jsonl.3": [2]}


async def test_an_event_longer_than_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = sink(path, rotate_bytes=LINE_BYTES // 2)
    await file.send([event(1), event(2)])
    assert (numbers(path), numbers(tmp_path / "events.jsonl.1")) == ([2], [1])


@contextmanager
def longest_file(size_bytes: int) -> Iterator[None]:
    """What a full disk does, at a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_no_room_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = sink(path)
    await file.send([event(1)])
    with longest_file(2 * LINE_BYTES + 10), pytest.raises(DeliveryError, match="too large"):
        await file.send([event(number) for number in (2, 3, 4)])
    assert numbers(path) == [1]
    await file.send([event(number) for number in (2, 3, 4)])
    assert numbers(path) == [1, 2, 3, 4]


async def test_where_no_file_can_be(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    for path, said in (
        (tmp_path / "none/events", "No such file"),
        (tmp_path / "file/events", "Not a directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "fifo", "is not a plain file"),
        (Path("/dev/null"), "is not a plain file"),
    ):
        with pytest.raises(DeliveryError, match=said) as caught:
            await sink(path).send([event(1)])
        assert str(path) in str(caught.value)
