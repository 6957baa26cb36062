"""Warnings of one kind: the first at once, then one a minute, with how many were left out."""

from __future__ import annotations

import logging

import pytest

from castore.seldom import PAUSE_SECONDS, SeldomLog


def test_one_a_minute_of_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    told = SeldomLog(logging.getLogger("seldom"), clock=lambda: now)
    for number in range(1000):
        told.warning("a", f"a {number}")
        told.warning("b", f"b {number}")
        now += PAUSE_SECONDS / 960
    now += PAUSE_SECONDS
    told.warning("a", "a, later")
    assert caplog.messages == [
        "a 0",
        "b 0",
        "a 960 (959 more of this kind since the last one told)",
        "b 960 (959 more of this kind since the last one told)",
        "a, later (39 more of this kind since the last one told)",
    ]
