"""HTML put together from values: whatever is not markup already is escaped, so that no name can become any.

Characters that would act, or hide, are shown as escapes, as on a terminal.
"""

from __future__ import annotations

from html import escape
from typing import Final

from castore.readable import printable

TEXT_MAX: Final = 240
"""Characters of a name or a message: a path may have thousands. What is left out is in the middle."""

_VOID: Final = frozenset({"meta", "link"})


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


Child = str | bytes | int | None
"""What an element may hold: Markup as it is, anything else as text, None for nothing."""


def text(value: str | bytes) -> Markup:
    """The value as text of a page: escaped, readable, and of TEXT_MAX characters at most, escapes counted as one."""
    shown = value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
    if len(shown) > TEXT_MAX:
        tail = TEXT_MAX // 3
        shown = f"{shown[: TEXT_MAX - tail - 1]}…{shown[-tail:]}"
    return Markup(escape(printable(shown)))


def join(*children: Child) -> Markup:
    """All of them, one after the other."""
    return Markup("".join(_markup(child) for child in children))


def tag(name: str, /, *children: Child, **attributes: str | int | None) -> Markup:
    """An element. An attribute that is None is left out; `class_` loses its underscore, others become dashes."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{said}>")
    return Markup(f"<{name}{said}>{join(*children)}</{name}>")


def _markup(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    return escape(f"{child:,}") if isinstance(child, int) else text(child)
