"""How values are written for people."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from castore.cli.output import (
    eta,
    format_bytes,
    format_seconds,
    format_time_ns,
    print_columns,
    print_document,
    printable,
)
from castore.config_values import parse_size


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (101_990, "99.6 KiB"),
        (102_400, "100 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**30, "1.0 GiB"),
        (5 * 2**40, "5.0 TiB"),
        (2**63, "8.0 EiB"),
        (2**74, "16384 EiB"),
    ],
)
def test_sizes(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@given(st.integers(0, 2**49))
def test_sizes_read_back(size_bytes: int) -> None:
    number, _, unit = format_bytes(size_bytes).partition(" ")
    assert float(number) < 1024
    # Half of the last digit shown.
    error = 0.0501 if "." in number else 0.501
    scale = parse_size(f"1{unit}")
    assert abs(float(number) * scale - size_bytes) <= error * scale


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (12_000, "3 h 20 min"),
        (172_799, "47 h 59 min"),
        (7 * 86_400, "7 d"),
        (10**6, "11 d 13 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
    assert eta(seconds) == f", about {text} left"
    assert eta(None) == ""


@given(st.integers(1, 4 * 10**18))
def test_times(time_ns: int) -> None:
    written = datetime.fromisoformat(format_time_ns(time_ns))
    assert written.timestamp() == time_ns // 10**9
    assert written.utcoffset() == datetime.fromtimestamp(time_ns // 10**9).astimezone().utcoffset()


def test_no_time() -> None:
    assert format_time_ns(0) == "-"


@given(st.text() | st.binary())
def test_nothing_reaches_the_terminal_as_a_command(text: str | bytes) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\xe9 \u4e2d", "caf\xe9 \u4e2d"),
        ("a\nb\t\x1b[0m\x7f\x9b", "a\\nb\\t\\x1b[0m\\x7f\\x9b"),
        ("back\\slash", "back\\\\slash"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        (b"caf\xc3\xa9 \xff", "caf\xe9 \\xff"),
        ("\udcff\ud800", "\\xff\\ud800"),
    ],
)
def test_printable(text: str | bytes, shown: str) -> None:
    assert printable(text) == shown


def test_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_columns([("NAME", "SIZE", "X"), ("a", "10 B", ""), ("longer", "1.5 KiB", "y")], right=(1,))
    assert capsys.readouterr().out == "NAME       SIZE  X\na          10 B\nlonger  1.5 KiB  y\n"
    print_columns([])
    assert capsys.readouterr().out == ""


def test_documents(capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time_ns()
    print_document(
        {
            "pid": 7,
            "started_ns": now,
            "reads": {"duration_ns": 1_500_000_000, "kept_bytes": 2048, "cold": False},
            "locations": [
                {"backend_id": "a", "size_bytes": 1024, "reason": None},
                {"backend_id": "bb", "size_bytes": 5, "reason": "x\ny"},
            ],
            "names": ["x", 1],
            "none": [],
        }
    )
    assert capsys.readouterr().out.splitlines() == [
        "pid                7",
        f"started_ns         {format_time_ns(now)}",
        "reads.duration_ns  1.500 s",
        "reads.kept_bytes   2.0 KiB",
        "reads.cold         no",
        "names[0]           x",
        "names[1]           1",
        "",
        "locations",
        "BACKEND_ID  SIZE_BYTES  REASON",
        "a           1.0 KiB     -",
        "bb          5 B         x\\ny",
    ]
