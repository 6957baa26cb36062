"""A file of 5 GiB, on a real mount: beyond what 32 bits count, and beyond what is kept in memory."""

from __future__ import annotations

import hashlib
import os
import random

from tests.mount.store import MountedStore, wait_until

CHUNK_BYTES = 8 << 20
SIZE_BYTES = (5 << 30) + 12_345
MEMORY_BYTES = 1 << 30
"""Far more than the daemon needs (it keeps some hundred MiB of blocks at most), far less than the file."""

_PATTERN = random.Random(5).randbytes(CHUNK_BYTES)


def _chunk(number: int) -> bytes:
    """Chunk `number` of the file: its number, then bytes that no other chunk has at the same places."""
    turn = number * 7919 % CHUNK_BYTES
    whole = number.to_bytes(16) + _PATTERN[turn:] + _PATTERN[:turn]
    return whole[: min(CHUNK_BYTES, SIZE_BYTES - number * CHUNK_BYTES)]


def test_5_gib(store: MountedStore) -> None:
    path = store.ingest("large/1") / "file"
    count = -(-SIZE_BYTES // CHUNK_BYTES)
    expected = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    for number in range(count):
        data = _chunk(number)
        assert os.pwrite(descriptor, data, number * CHUNK_BYTES) == len(data)
        expected.update(data)
    os.close(descriptor)
    assert path.stat().st_size == SIZE_BYTES
    wait_until(lambda: store.state_of(path) == "stored", "5 GiB are stored", 240.0)
    package = store.publish("large/1")
    published = package / "file"
    assert published.stat().st_size == SIZE_BYTES
    assert published.stat().st_blocks * 512 >= SIZE_BYTES
    assert os.getxattr(published, "user.hash.sha256").decode() == expected.hexdigest()
    descriptor = os.open(published, os.O_RDONLY)
    numbers = random.Random(6)
    for offset in [
        0,
        (4 << 30) - 3,
        (4 << 30) + 7,
        SIZE_BYTES - 10,
        *(numbers.randrange(SIZE_BYTES) for _ in range(60)),
    ]:
        wanted = min(5000, SIZE_BYTES - offset)
        assert os.pread(descriptor, 5000, offset) == _bytes_at(offset, wanted), offset
    assert os.pread(descriptor, 10, SIZE_BYTES) == b""
    for number in range(count):
        assert os.pread(descriptor, CHUNK_BYTES, number * CHUNK_BYTES) == _chunk(number), number
    os.close(descriptor)
    assert _peak_memory_bytes(store.pid) < MEMORY_BYTES


def _bytes_at(offset: int, length: int) -> bytes:
    first, last = offset // CHUNK_BYTES, (offset + length - 1) // CHUNK_BYTES
    joined = b"".join(_chunk(number) for number in range(first, last + 1))
    return joined[offset - first * CHUNK_BYTES :][:length]


def _peak_memory_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
