"""What comes of each fault: data that the tests hold to, and the table of docs/FAULTS.md made from it. No test.

python -m tests.storage.s3.fault_table      writes the table into docs/FAULTS.md
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from castore.blobs.fetch import PATIENCE_BYTES_PER_S, PATIENCE_SECONDS
from castore.errors import (
    BlockUnreadable,
    CastoreError,
    PublishBusy,
    StorageDenied,
    StorageTimeout,
    StorageUnavailable,
)
from castore.storage.deadline import BASE_S, READ_BASE_S
from castore.storage.retry import BASE_DELAY_S, LAST_TRY_S, RETRY_AFTER_MAX_S, TRIES
from mount.errnos import errno_of
from tests.servers.fault_proxy import Answer, Exchange, Fault

DOCUMENT: Final = Path(__file__).parents[3] / "docs/FAULTS.md"
BEGIN: Final = "<!-- made by tests/storage/s3/fault_table.py: begin -->\n"
END: Final = "<!-- end -->\n"

DATA: Final = bytes(range(256)) * 1200
"""The object that is read."""
ELSEWHERE: Final = "http://127.0.0.1:9/elsewhere"

_WAITS: Final = sum(BASE_DELAY_S * 2**failures for failures in range(TRIES - 1))
_MORE: Final = "and 1 s for each MiB"


class Known(Enum):
    """When the caller knows; the answers take their time beside that."""

    AT_ONCE = "at once"
    WAITS = f"at most {_WAITS:g} s of waits"
    ASKED = f"the time that the server asked for, up to {RETRY_AFTER_MAX_S:g} s for each wait"
    READ = f"{LAST_TRY_S:g} s; at most {LAST_TRY_S + READ_BASE_S:g} s, {_MORE}"
    WRITE = f"{BASE_S:g} s, {_MORE}"
    PATIENCE = f"{PATIENCE_SECONDS:g} s, and 1 s for each {PATIENCE_BYTES_PER_S >> 20} MiB"


@dataclass(frozen=True, slots=True)
class Row:
    """One fault that one operation meets.

    `error` is None when the operation succeeds, with the right bytes. `tries` are the requests that met the fault,
    each of which the server saw once; of those that `times` allows.
    """

    operation: str
    fault: str
    error: type[CastoreError] | None
    tries: int
    known: Known
    times: int = 1 << 30

    def __str__(self) -> str:
        return f"{self.operation}: {self.fault}"


# the faults


def _half(answer: Answer) -> bytes:
    return answer.head + answer.body[: len(answer.body) // 2]


def _reset(exchange: Exchange) -> None:
    exchange.reset()


def _reset_inside(exchange: Exchange) -> None:
    exchange.send(_half(exchange.ask()))
    exchange.reset()


def _lose_the_answer(exchange: Exchange) -> None:
    exchange.ask()
    exchange.reset()


def _stall(exchange: Exchange) -> None:
    exchange.hang()


def _stall_inside(exchange: Exchange) -> None:
    exchange.send(_half(exchange.ask()))
    exchange.hang()


def _drip(exchange: Exchange) -> None:
    answer = exchange.ask()
    exchange.drip(answer.head + answer.body, 0.02)


def _end_early(exchange: Exchange) -> None:
    exchange.send(_half(exchange.ask()))


def _shorten(exchange: Exchange) -> bool:
    answer = exchange.ask()
    half = answer.body[: len(answer.body) // 2]
    exchange.answer(answer.but(body=half, content_length=str(len(half))))
    return True


def _lengthen(exchange: Exchange) -> bool:
    answer = exchange.ask()
    exchange.answer(answer.but(body=answer.body + b"more", content_length=str(len(answer.body) + 4)))
    return True


def _send_more(exchange: Exchange) -> None:
    answer = exchange.ask()
    exchange.send(answer.head + answer.body + b"more")


def _flip(exchange: Exchange) -> bool:
    answer = exchange.ask()
    exchange.answer(answer.but(body=bytes([answer.body[0] ^ 1]) + answer.body[1:]))
    return True


def _name_another_range(exchange: Exchange) -> bool:
    answer = exchange.ask()
    exchange.answer(answer.but(content_range=f"bytes 0-{len(answer.body) - 1}/{len(DATA)}"))
    return True


def _give_all(exchange: Exchange) -> bool:
    answer = exchange.ask()
    exchange.answer(answer.but(status=200, body=DATA, content_range="", content_length=str(len(DATA))))
    return True


def _error(status: int, code: str, **headers: str) -> Fault:
    def fault(exchange: Exchange) -> bool:
        body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        fields = {"content-type": "application/xml", **{name.replace("_", "-"): text for name, text in headers.items()}}
        sent = b"" if exchange.request.method == "HEAD" else body
        exchange.answer(Answer(status, fields | {"content-length": str(len(body))}, sent))
        return True

    return fault


REFUSED: Final = "connection refused"
FAULTS: Final[dict[str, Fault]] = {
    "connection reset before the answer": _reset,
    "connection reset inside the body": _reset_inside,
    "connection reset after the server did it": _lose_the_answer,
    "silence before the first byte": _stall,
    "silence inside the body": _stall_inside,
    "one byte at a time": _drip,
    "connection ends inside the body": _end_early,
    "half the body, called whole": _shorten,
    "body longer than the range": _lengthen,
    "bytes behind the answer": _send_more,
    "a flipped bit": _flip,
    "another `Content-Range`": _name_another_range,
    "200 and all of the object": _give_all,
    "500": _error(500, "InternalError"),
    "503 SlowDown": _error(503, "SlowDown"),
    "503 SlowDown, `Retry-After: 1`": _error(503, "SlowDown", retry_after="1"),
    "403": _error(403, "AccessDenied"),
    "307 to another host": _error(307, "TemporaryRedirect", location=ELSEWHERE),
    "part 3 of 4: 500": _error(500, "InternalError"),
    "part 3 of 4: connection reset": _reset,
    "Complete: 200 with an error in its body": _error(200, "InternalError"),
}


# what comes of them


def _everywhere(operation: str, stalled: Known, stalled_tries: int) -> tuple[Row, ...]:
    """What every operation meets alike."""
    return (
        Row(operation, REFUSED, StorageUnavailable, 0, Known.WAITS),
        Row(operation, "connection reset before the answer", StorageUnavailable, TRIES, Known.WAITS),
        Row(operation, "silence before the first byte", StorageTimeout, stalled_tries, stalled),
        Row(operation, "500", StorageUnavailable, TRIES, Known.WAITS),
        Row(operation, "503 SlowDown", StorageUnavailable, TRIES, Known.WAITS),
        Row(operation, "403", StorageDenied, 1, Known.AT_ONCE),
        Row(operation, "307 to another host", StorageUnavailable, TRIES, Known.WAITS),
    )


READ_TRIES: Final = round(LAST_TRY_S / READ_BASE_S)
"""Tries of a read that gets no answer: each takes its deadline."""
ONE: Final = "read, one location"
TWO: Final = "read, two locations"

ROWS: Final = (
    *_everywhere("get", Known.READ, READ_TRIES),
    Row("get", "500", None, 2, Known.WAITS, times=2),
    Row("get", "503 SlowDown, `Retry-After: 1`", None, 2, Known.ASKED, times=2),
    Row("get", "connection reset inside the body", StorageUnavailable, TRIES, Known.WAITS),
    Row("get", "connection ends inside the body", StorageUnavailable, TRIES, Known.WAITS),
    Row("get", "silence inside the body", StorageTimeout, READ_TRIES, Known.READ),
    Row("get", "one byte at a time", StorageTimeout, READ_TRIES, Known.READ),
    Row("get", "half the body, called whole", StorageUnavailable, TRIES, Known.WAITS),
    Row("get", "body longer than the range", StorageUnavailable, TRIES, Known.WAITS),
    Row("get", "another `Content-Range`", StorageUnavailable, TRIES, Known.WAITS),
    Row("get", "bytes behind the answer", None, 1, Known.AT_ONCE),
    Row("get", "200 and all of the object", None, 1, Known.AT_ONCE),
    *_everywhere("head", Known.READ, READ_TRIES),
    *_everywhere("put", Known.WRITE, 1),
    Row("put", "500", None, 3, Known.WAITS, times=3),
    Row("put", "connection reset after the server did it", StorageUnavailable, TRIES, Known.WAITS),
    Row("put in parts", "part 3 of 4: 500", StorageUnavailable, TRIES, Known.WAITS),
    Row("put in parts", "part 3 of 4: 500", None, 1, Known.WAITS, times=1),
    Row("put in parts", "part 3 of 4: connection reset", StorageUnavailable, TRIES, Known.WAITS),
    Row("put in parts", "Complete: 200 with an error in its body", StorageUnavailable, TRIES, Known.WAITS),
    Row("put in parts", "Complete: 200 with an error in its body", None, 1, Known.WAITS, times=1),
    *_everywhere("list", Known.WRITE, 1),
    Row("list", "connection reset inside the body", StorageUnavailable, TRIES, Known.WAITS),
    Row("list", "half the body, called whole", StorageUnavailable, TRIES, Known.WAITS),
    *_everywhere("delete", Known.WRITE, 1),
    Row("delete", "connection reset after the server did it", StorageUnavailable, TRIES, Known.WAITS),
    Row(ONE, "a flipped bit", None, 1, Known.AT_ONCE, times=1),
    Row(ONE, "a flipped bit", BlockUnreadable, 2, Known.AT_ONCE),
    Row(TWO, "a flipped bit", None, 2, Known.AT_ONCE),
    Row(TWO, REFUSED, None, 0, Known.WAITS),
    Row(TWO, "500", None, TRIES, Known.WAITS),
    Row(TWO, "403", None, 1, Known.AT_ONCE),
    Row(TWO, "silence before the first byte", None, 1, Known.PATIENCE),
    Row(TWO, "silence inside the body", None, 1, Known.PATIENCE),
)


# the document


def _errno(row: Row) -> str:
    if row.error is None or row.operation in ("head", "list", "delete"):
        return ""
    is_waiting = row.operation.startswith("put") and row.error.temporary
    return f"`{errno.errorcode[errno_of((PublishBusy if is_waiting else row.error)(''))]}`"


def _line(row: Row) -> str:
    how_often = {1: ", once", 2: ", twice"}.get(row.times, f", {row.times} times" if row.times < 1 << 30 else "")
    gives = "succeeds" if row.error is None else f"`{row.error.__name__}`"
    cells = (row.operation, row.fault + how_often, gives, _errno(row), str(row.tries), row.known.value)
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    """The table in Markdown."""
    head = "| operation | fault | the caller gets | at a mount | requests that met it | known after |\n"
    return head + "|---|---|---|---|---|---|\n" + "".join(map(_line, ROWS))


def with_table(text: str) -> str:
    """The document with the table of now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
