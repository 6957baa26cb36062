"""Buffers: counted while anybody refers to them, true as long, used again after that."""

from __future__ import annotations

import mmap
import threading

import pytest

from castore.blobs.buffers import FREE_BYTES, SMALL_BYTES, Buffers

MIB = 1 << 20


def test_a_buffer_is_counted_as_long_as_a_slice_of_it_is_held() -> None:
    buffers = Buffers()
    buffer = buffers.take(MIB - 1)
    assert len(buffer) == MIB - 1
    held = buffer.toreadonly()[100:200]
    del buffer
    assert buffers.used_bytes() == MIB
    del held
    assert buffers.used_bytes() == 0


def test_a_buffer_is_used_again_but_never_while_it_is_held() -> None:
    buffers = Buffers()
    first = buffers.take(MIB)
    first[:] = b"a" * MIB
    held = first[10:20]
    second = buffers.take(MIB)
    second[:] = b"b" * MIB
    assert bytes(held) == b"a" * 10
    del first, held
    third = buffers.take(MIB)
    assert bytes(third) == b"a" * MIB, "the same memory"
    del second, third
    assert bytes(buffers.take(MIB // 2)) != bytes(MIB // 2), "half of it"
    assert bytes(buffers.take(MIB // 4)) == bytes(MIB // 4), "less: fresh memory"


def test_what_is_kept_for_the_next_use_is_bounded() -> None:
    buffers = Buffers()
    many = [buffers.take(2 * MIB) for _ in range(FREE_BYTES // MIB)]
    for buffer in many:
        buffer[0] = 1
    del many, buffer
    assert buffers.used_bytes() == 0
    again = [buffers.take(2 * MIB) for _ in range(FREE_BYTES // MIB)]
    assert [buffer[0] for buffer in again] == [1] * (FREE_BYTES // MIB // 2) + [0] * (FREE_BYTES // MIB // 2)
    del again
    buffers.free()
    assert buffers.take(2 * MIB)[0] == 0


def test_any_thread_may_let_go_of_a_buffer() -> None:
    buffers = Buffers()
    held = [buffers.take(mmap.PAGESIZE * 32) for _ in range(100)]
    threads = [threading.Thread(target=held.pop) for _ in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert buffers.used_bytes() == 0


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES - 1])
def test_small_buffers_are_not_counted(size: int) -> None:
    buffers = Buffers()
    assert len(buffers.take(size)) == size
    assert buffers.used_bytes() == 0
