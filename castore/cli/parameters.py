"""Values on the command line that are written as in the configuration: durations and sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click

from castore.config_values import DURATION_RULE, SIZE_RULE, parse_duration, parse_size


class _Quantity(click.ParamType[Any]):
    def __init__(self, name: str, parse: Callable[[str], float], rule: str) -> None:
        self.name = name
        self._parse = parse
        self._rule = rule

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError:
            self.fail(f"{value!r}: expected {self._rule}", param, ctx)


DURATION: Final = _Quantity("duration", parse_duration, DURATION_RULE)
"""Seconds, as a float."""
SIZE: Final = _Quantity("size", lambda text: int(text) if text.isdecimal() else parse_size(text), SIZE_RULE)
"""Bytes."""
