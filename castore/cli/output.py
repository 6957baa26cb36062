"""How results are written: plain aligned columns for people, one JSON document for programs. Holds no progress."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import click

from castore.readable import format_bytes as format_bytes
from castore.readable import format_seconds as format_seconds
from castore.readable import printable as printable

_NS: Final = 10**9
_FIRST_TIME_NS: Final = 10**17
"""March 1973, or three years: a larger number of nanoseconds is a time, a smaller one a duration."""


def print_json(document: Mapping[str, Any]) -> None:
    """One document, indented, in ASCII, so that any name survives any pipe."""
    click.echo(json.dumps(document, indent=2))


def json_line(document: Mapping[str, Any]) -> str:
    """One of many documents: a line of its own, in ASCII."""
    return json.dumps(document, separators=(",", ":"))


def print_columns(rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Rows as columns two spaces apart; those with an index in `right` end at the same place, for numbers."""
    lines = [list(row) for row in rows]
    if not lines:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def print_document(document: Mapping[str, Any]) -> None:
    """A nested document: its values as `dotted.key  value` lines, then its lists of alike objects as tables.

    What ends in `_bytes` or `_ns` gets units.
    """
    tables = {key: value for key, value in document.items() if _is_table(value)}
    print_columns(_flat("", {key: value for key, value in document.items() if key not in tables}))
    for name, items in tables.items():
        readable = [[_readable(key, value) for key, value in item.items()] for item in items]
        click.echo(f"\n{printable(name)}")
        print_columns(
            [[key.upper() for key, _ in readable[0]], *([value for _, value in row] for row in readable)],
        )


def _is_table(value: Any) -> bool:
    """Whether a value is a list of objects with the same keys and without objects in them."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and item.keys() == value[0].keys() for item in value)
        and not any(isinstance(cell, Mapping | list) for item in value for cell in item.values())
    )


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _flat(f"{prefix}[{index}]", item)
    else:
        yield _readable(prefix, value)


def _readable(key: str, value: Any) -> tuple[str, str]:
    """A value for a person. Keys stay as they are: so they can be found in the JSON document."""
    if isinstance(value, bool):
        shown = "yes" if value else "no"
    elif value is None or value == "":
        shown = "-"
    elif isinstance(value, int | float) and key.endswith("_bytes"):
        shown = format_bytes(int(value))
    elif isinstance(value, int | float) and key.endswith("_ns"):
        shown = format_time_ns(int(value)) if value >= _FIRST_TIME_NS else f"{value / _NS:.3f} s"
    else:
        shown = printable(str(value))
    return printable(key), shown


def eta(seconds: float | None) -> str:
    """What a line of progress adds when it is known how long the rest takes."""
    return "" if seconds is None else f", about {format_seconds(seconds)} left"


def format_time_ns(time_ns: int) -> str:
    """A time as ISO 8601 in the local zone, to the second; `-` for 0, which means never."""
    if time_ns == 0:
        return "-"
    return datetime.fromtimestamp(time_ns // _NS).astimezone().isoformat(sep=" ")


def text_fields(key: str, value: bytes) -> dict[str, str]:
    """The text, and its exact bytes in base64 where they are not UTF-8."""
    try:
        return {key: value.decode()}
    except UnicodeDecodeError:
        return {key: value.decode(errors="replace"), f"{key}_base64": base64.b64encode(value).decode()}
