"""Blocks of the disk cache that go past the page cache, and those that cannot."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
from pathlib import Path
from typing import Final

import pytest

from castore.blobs.cache_files import DIRECT_BYTES, CacheFiles, CacheWriter
from castore.digest import BlobHasher, BlobSummary

TAIL: Final = 777
SIZE: Final = 2 * DIRECT_BYTES + TAIL


def summary_of(data: memoryview) -> BlobSummary:
    hasher = BlobHasher()
    hasher.update(data)
    return hasher.finish()


@pytest.fixture
def buffer() -> memoryview:
    """As reads have them: a mapping of its own, so that it begins with a page."""
    mapping = mmap.mmap(-1, SIZE + mmap.PAGESIZE)
    mapping.write(os.urandom(SIZE + mmap.PAGESIZE))
    return memoryview(mapping)


def files_in(folder: Path) -> CacheFiles:
    files = CacheFiles(folder)
    files.prepare()
    return files


def kept(files: CacheFiles, summary: BlobSummary) -> bytes:
    target = bytearray(summary.size_bytes)
    assert files.read(summary, 0, memoryview(target)).missing == []
    return bytes(target)


def in_page_cache(path: Path) -> int:
    """Pages of a file that are in memory, by fincore(1)."""
    said = subprocess.run(["fincore", "-n", "-b", "-o", "PAGES", path], capture_output=True, text=True, check=True)
    return int(said.stdout)


def write(files: CacheFiles, summary: BlobSummary, data: memoryview, *, past_page_cache: bool = True) -> CacheWriter:
    writer = CacheWriter(files)
    writer.write(summary, 0, data, past_page_cache=past_page_cache)
    writer.close()
    return writer


def test_all_but_the_tail(tmp_path: Path, buffer: memoryview) -> None:
    files, data = files_in(tmp_path), buffer[:SIZE]
    summary = summary_of(data)
    assert write(files, summary, data).direct_bytes == 2 * DIRECT_BYTES
    [path] = (path for path in (tmp_path / "blocks").rglob("*.0"))
    assert in_page_cache(path) <= 1
    assert kept(files, summary) == data


def test_not_unless_told(tmp_path: Path, buffer: memoryview) -> None:
    files, data = files_in(tmp_path), buffer[:SIZE]
    assert write(files, summary_of(data), data, past_page_cache=False).direct_bytes == 0
    assert kept(files, summary_of(data)) == data


def test_a_small_piece_stays_in_memory(tmp_path: Path, buffer: memoryview) -> None:
    files, data = files_in(tmp_path), buffer[: DIRECT_BYTES - 1]
    assert write(files, summary_of(data), data).direct_bytes == 0
    assert kept(files, summary_of(data)) == data


def test_a_buffer_at_an_odd_place(tmp_path: Path, buffer: memoryview) -> None:
    """It is not tried again, and nothing is lost."""
    files, data = files_in(tmp_path), buffer[1 : SIZE + 1]
    writer = CacheWriter(files)
    writer.write(summary_of(data), 0, data, past_page_cache=True)
    assert writer.direct_bytes == 0
    other = buffer[:SIZE]
    writer.write(summary_of(other), 0, other, past_page_cache=True)
    writer.close()
    assert writer.direct_bytes == 0
    assert kept(files, summary_of(data)) == data
    assert kept(files, summary_of(other)) == other


def test_an_error_is_that_of_the_disk(tmp_path: Path, buffer: memoryview) -> None:
    """A file that may not grow: the error comes up, and writes past the page cache go on afterwards."""
    files, data = files_in(tmp_path), buffer[:SIZE]
    writer = CacheWriter(files)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.write(summary_of(data), 0, data, past_page_cache=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write(summary_of(data), 0, data, past_page_cache=True)
    writer.close()
    assert writer.direct_bytes == 2 * DIRECT_BYTES
    assert kept(files, summary_of(data)) == data
