"""Sources: what `FileSource` gives, what it notices, and how `read_exactly` reads any source."""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from castore.digest import BLOCK_SIZE_BYTES, SHA256_BLOCKS, XXH3, BlobHasher, BlobSummary, Digest
from castore.errors import SourceChanged
from castore.storage.conformance_sources import ScriptedSource
from castore.storage.source import CHUNK_BYTES, BytesSource, FileSource, read_exactly
from castore.storage.spi import Source

DIGEST = Digest.of(b"")


def staged(path: Path, data: bytes, *, block_size_bytes: int = BLOCK_SIZE_BYTES, checksum: str = XXH3) -> FileSource:
    hasher = BlobHasher(block_size_bytes=block_size_bytes, checksum_algorithm=checksum)
    hasher.update(data)
    path.write_bytes(data)
    return FileSource(path, hasher.finish())


def test_both_kinds_are_sources(tmp_path: Path) -> None:
    assert isinstance(BytesSource(b""), Source)
    assert isinstance(staged(tmp_path / "file", b""), Source)


@pytest.mark.parametrize("checksum", [XXH3, SHA256_BLOCKS])
@pytest.mark.parametrize(
    "size", [0, 1, BLOCK_SIZE_BYTES - 1, BLOCK_SIZE_BYTES, BLOCK_SIZE_BYTES + 1, 5 * BLOCK_SIZE_BYTES + 9]
)
def test_a_staged_file_is_given_whole_at_any_read_size(tmp_path: Path, size: int, checksum: str) -> None:
    data = Random(size).randbytes(size)
    source = staged(tmp_path / "file", data, checksum=checksum)
    assert source.size_bytes == size
    for read_size in (-1, 1000, BLOCK_SIZE_BYTES - 1, BLOCK_SIZE_BYTES, 2 * BLOCK_SIZE_BYTES + 5, 1 << 20):
        with source.open() as reader:
            parts = list(iter(lambda: reader.read(read_size), b""))  # noqa: B023
            assert b"".join(parts) == data
            assert all(len(part) == read_size for part in parts[:-1])
    assert b"".join(read_exactly(DIGEST, source)) == data
    assert b"".join(read_exactly(DIGEST, BytesSource(data))) == data


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(0, 200),
    steps=st.lists(st.tuples(st.sampled_from(["set", "cur", "end", "read", "readinto"]), st.integers(0, 90))),
)
def test_readers_behave_like_a_file(tmp_path: Path, size: int, steps: list[tuple[str, int]]) -> None:
    data = Random(size).randbytes(size)
    source = staged(tmp_path / "file", data, block_size_bytes=16)
    with source.open() as ours, io.BufferedReader(io.FileIO(tmp_path / "file")) as theirs:
        assert isinstance(ours, io.BufferedReader)
        for action, number in steps:
            if action == "read":
                assert ours.read(number) == theirs.read(number)
            elif action == "readinto":
                mine, other = bytearray(number), bytearray(number)
                assert ours.readinto(mine) == theirs.readinto(other)
                assert mine == other
            else:
                whence = {"set": os.SEEK_SET, "cur": os.SEEK_CUR, "end": os.SEEK_END}[action]
                assert ours.seek(number, whence) == theirs.seek(number, whence)
            assert ours.tell() == theirs.tell()


def test_readers_of_one_source_are_independent(tmp_path: Path) -> None:
    data = Random(0).randbytes(3 * BLOCK_SIZE_BYTES)
    source = staged(tmp_path / "file", data)
    with source.open() as first, source.open() as second:
        assert first.read(10) == data[:10]
        assert second.read(10) == data[:10]
        second.seek(BLOCK_SIZE_BYTES)
        assert first.read(10) == data[10:20]
    with pytest.raises(ValueError, match="closed"):
        first.read(1)


@pytest.mark.parametrize("checksum", [XXH3, SHA256_BLOCKS])
@pytest.mark.parametrize("read_size", [1, BLOCK_SIZE_BYTES, CHUNK_BYTES, 1 << 20])
@pytest.mark.parametrize("changed_at", [0, BLOCK_SIZE_BYTES - 1, 2 * BLOCK_SIZE_BYTES, 2 * BLOCK_SIZE_BYTES + 8])
def test_a_changed_byte_is_noticed_before_its_block_is_given(
    tmp_path: Path, changed_at: int, read_size: int, checksum: str
) -> None:
    data = bytearray(Random(0).randbytes(2 * BLOCK_SIZE_BYTES + 9))
    source = staged(tmp_path / "file", bytes(data), checksum=checksum)
    data[changed_at] ^= 0x10
    (tmp_path / "file").write_bytes(data)
    block = changed_at // BLOCK_SIZE_BYTES
    with source.open() as reader:
        reader.seek(block * BLOCK_SIZE_BYTES)
        with pytest.raises(SourceChanged, match=f"file: block {block} is not what was written"):
            reader.read(read_size)
    with pytest.raises(SourceChanged), closing(read_exactly(DIGEST, source)) as chunks:
        assert all(chunks)


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_another_size_is_noticed_on_open(tmp_path: Path, size: int) -> None:
    source = staged(tmp_path / "file", bytes(1000))
    (tmp_path / "file").write_bytes(bytes(size))
    with pytest.raises(SourceChanged, match=f"file: {size} bytes on disk, 1000 expected"):
        source.open()


def test_a_file_that_is_cut_off_under_way_is_noticed(tmp_path: Path) -> None:
    source = staged(tmp_path / "file", bytes(4 * BLOCK_SIZE_BYTES))
    with source.open() as reader:
        reader.read(BLOCK_SIZE_BYTES)
        os.truncate(tmp_path / "file", 2 * BLOCK_SIZE_BYTES + 1)
        with pytest.raises(SourceChanged, match=f"ends at byte {2 * BLOCK_SIZE_BYTES + 1}"):
            reader.read()


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    source = staged(tmp_path / "file", b"x")
    (tmp_path / "file").unlink()
    with pytest.raises(FileNotFoundError):
        source.open()
    with pytest.raises(SourceChanged, match=rf"source of {DIGEST} cannot be read"):
        list(read_exactly(DIGEST, source))


def test_positions_below_zero_are_refused(tmp_path: Path) -> None:
    with staged(tmp_path / "file", b"abc").open() as reader, pytest.raises(ValueError, match="negative"):
        reader.seek(-4, os.SEEK_END)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_a_source_must_hold_exactly_what_it_promises(size: int) -> None:
    data = Random(size).randbytes(size + 1)
    with pytest.raises(SourceChanged, match=f"more than the {size} bytes promised"):
        list(read_exactly(DIGEST, ScriptedSource(size, lambda: io.BytesIO(data))))
    with pytest.raises(SourceChanged, match=f"ends 1 bytes before the {size + 2} promised"):
        list(read_exactly(DIGEST, ScriptedSource(size + 2, lambda: io.BytesIO(data))))


def test_chunks_are_bounded_and_the_reader_is_closed() -> None:
    opened: list[io.BytesIO] = []

    def opener() -> io.BytesIO:
        opened.append(io.BytesIO(bytes(10 * CHUNK_BYTES)))
        return opened[-1]

    source = ScriptedSource(10 * CHUNK_BYTES, opener)
    assert {len(chunk) for chunk in read_exactly(DIGEST, source)} == {CHUNK_BYTES}
    with closing(read_exactly(DIGEST, source)) as chunks:
        next(chunks)
    assert [reader.closed for reader in opened] == [True, True]


def test_the_blocks_are_those_of_the_summary(tmp_path: Path) -> None:
    data = Random(1).randbytes(40)
    source = staged(tmp_path / "file", data, block_size_bytes=16)
    wrong = BlobSummary(source.summary.digest, 40, 16, XXH3, bytes(len(source.summary.checksums)))
    with FileSource(source.path, wrong).open() as reader, pytest.raises(SourceChanged):
        reader.read()
    assert hashlib.sha256(b"".join(read_exactly(DIGEST, source))).digest() == source.summary.digest.raw
