"""What comes of each fault that a read through a mount meets: data that tests hold to, and a table of docs/FAULTS.md.

python -m tests.mount.read_fault_table      writes the table into docs/FAULTS.md
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DOCUMENT: Final = Path(__file__).parents[2] / "docs/FAULTS.md"
BEGIN: Final = "<!-- made by tests/mount/read_fault_table.py: begin -->\n"
END: Final = "<!-- end -->\n"

FLIPPED: Final = "a flipped bit in the backend"
FLIPPED_ON_THE_WAY: Final = "a bit that flips on the way, once"
FLIPPED_IN_CACHE: Final = "a flipped bit in the disk cache"
FLIPPED_IN_BOTH: Final = "a flipped bit in the disk cache and in the backend"
FLIPPED_EVERYWHERE: Final = "a flipped bit in the disk cache and in every backend"
TRUNCATED: Final = "a truncated object"
MISSING: Final = "a missing object"
DOWN: Final = "the backend is down"
DOWN_CACHED: Final = "the backend is down, the block is in the disk cache"
SLOW: Final = "the backend answers after a second"
HANGS: Final = "the backend hangs"


@dataclass(frozen=True, slots=True)
class Row:
    """One read of one block through a mount, whose blob has one location or two, and a fault of the first one.

    `number` is the errno, 0 where the read gives the right bytes. `reason` is that of the first location, which is
    failed then, with an event; it is empty where the location stays `stored`, and there is none. `gets` are those that
    reached the server, for each location.
    """

    fault: str
    number: int
    reason: str
    gets: tuple[int, ...]

    @property
    def locations(self) -> int:
        return len(self.gets)

    def __str__(self) -> str:
        return f"{self.fault}, {'one location' if self.locations == 1 else 'two locations'}"


ROWS: Final = (
    Row(FLIPPED, errno.EIO, "digest_mismatch", (2,)),
    Row(FLIPPED, 0, "digest_mismatch", (2, 1)),
    Row(FLIPPED_ON_THE_WAY, 0, "", (2,)),
    Row(FLIPPED_ON_THE_WAY, 0, "", (2, 0)),
    Row(FLIPPED_IN_CACHE, 0, "", (1,)),
    Row(FLIPPED_IN_CACHE, 0, "", (1, 0)),
    Row(FLIPPED_IN_BOTH, errno.EIO, "digest_mismatch", (2,)),
    Row(FLIPPED_IN_BOTH, 0, "digest_mismatch", (2, 1)),
    Row(FLIPPED_EVERYWHERE, errno.EIO, "digest_mismatch", (2, 2)),
    Row(TRUNCATED, errno.EIO, "size_mismatch", (1,)),
    Row(TRUNCATED, 0, "size_mismatch", (1, 1)),
    Row(MISSING, errno.EIO, "missing", (1,)),
    Row(MISSING, 0, "missing", (1, 1)),
    Row(DOWN, errno.EIO, "", (0,)),
    Row(DOWN, 0, "", (0, 1)),
    Row(DOWN_CACHED, 0, "", (0,)),
    Row(DOWN_CACHED, 0, "", (0, 0)),
    Row(SLOW, 0, "", (1,)),
    Row(SLOW, 0, "", (1, 0)),
    # Last: what hangs is not asked first for a while.
    Row(HANGS, errno.ETIMEDOUT, "", (4,)),
    Row(HANGS, 0, "", (1, 1)),
)


def _line(row: Row) -> str:
    after = f"`failed`, `{row.reason}`" if row.reason else "`stored`"
    gives = f"`{errno.errorcode[row.number]}`" if row.number else "the right bytes"
    cells = (row.fault, str(row.locations), gives, after, "yes" if row.reason else "no", ", ".join(map(str, row.gets)))
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    """The table in Markdown."""
    head = (
        "| fault | locations | the read gives | the location afterwards | event | gets that reached each location |\n"
    )
    return head + "|---|---|---|---|---|---|\n" + "".join(map(_line, ROWS))


def with_table(text: str) -> str:
    """The document with the table of now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
