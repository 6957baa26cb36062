"""Where the bytes of a `get` go: the rules of the SPI about ranges and buffers. Moves no bytes."""

from __future__ import annotations


def receiving_view(offset: int, length: int, into: bytearray | memoryview | None) -> memoryview:
    """The first `length` bytes of `into`, or of a fresh buffer.

    Raises ValueError for a negative offset or length, and for a buffer that is too small or read-only.
    """
    if offset < 0 or length < 0:
        raise ValueError(f"offset {offset} and length {length} must not be negative")
    if into is None:
        return memoryview(bytearray(length))
    view = memoryview(into).cast("B")
    if view.readonly:
        raise ValueError("the buffer is read-only")
    if len(view) < length:
        raise ValueError(f"a buffer of {len(view)} bytes is too small for {length}")
    return view[:length]
