"""Counters of the read path. Plain integers; publishing them is left to whoever asks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ReadStats:
    """What the read path did since it was made. Only ever counts up."""

    reads: int = 0
    """Reads of open blobs, those that failed among them."""
    read_bytes: int = 0
    """Bytes that they gave."""
    read_errors: int = 0
    """Reads that failed."""
    gets: int = 0
    """Gets sent to backends, those that failed among them."""
    fetched_bytes: int = 0
    """Bytes that backends gave."""
    cache_hits: int = 0
    """Blocks that were in memory when a read asked for them."""
    cache_misses: int = 0
    """Blocks that a read waited for; those that a prefetch had already sent for among them."""
    prefetched: int = 0
    """Blocks sent for before any read asked for them."""
    prefetched_read: int = 0
    """Of these, blocks that were read since."""
    prefetched_unread: int = 0
    """Of these, blocks that were given up unread: evicted, failed, or left behind by their handle."""
    bad_blocks: int = 0
    """Blocks that a backend gave and whose checksum differed, each time that one came."""
    memory_bad: int = 0
    """Blocks in memory whose bytes had changed since they were checked."""
    disk_hits: int = 0
    """Blocks that memory lacked and the disk cache had."""
    disk_misses: int = 0
    """Blocks that both lacked."""
    disk_bad: int = 0
    """Of these, blocks that the disk cache had with wrong bytes."""
    disk_written_bytes: int = 0
    """Bytes of blocks written to the disk cache."""
    disk_dropped: int = 0
    """Blocks that were not written to it: no room, a disk that is too slow, or one that fails."""
