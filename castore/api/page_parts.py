"""The parts that the sections of the status page are made of: headings, tables, times, bars. Knows no fact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

from castore.api.markup import Child, Markup, join, tag

_NS: Final = 10**9


def section(key: str, title: str, *children: Child) -> Markup:
    """A section that the script may replace as a whole."""
    return tag("section", tag("h2", title, id=f"{key}-title"), *children, id=key, aria_labelledby=f"{key}-title")


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Child]], *, right: Sequence[int] = ()) -> Markup:
    """A table whose first column names its rows; columns in `right` hold numbers.

    On a narrow screen each row becomes a block, so each cell knows its column's name.
    """
    columns = [
        tag("th", name, scope="col", role="columnheader", class_="number" if number in right else None)
        for number, name in enumerate(head)
    ]
    body = [
        tag(
            "tr",
            *(
                _cell(number, name, cell, number in right)
                for number, (name, cell) in enumerate(zip(head, row, strict=True))
            ),
            role="row",
        )
        for row in rows
    ]
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *columns, role="row"), role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        role="table",
    )


def _cell(number: int, name: str, cell: Child, is_number: bool) -> Markup:
    # The roles are those that the elements have; some browsers forget them where a style makes blocks of them.
    kind = "number" if is_number else None
    content = tag("span", cell)
    if number == 0:
        return tag("th", content, scope="row", role="rowheader")
    return tag("td", content, role="cell", class_=kind, data_label=name)


def figures(items: Iterable[tuple[str, str, str]]) -> Markup:
    """Numbers that are read at a glance: (name, value, note) each."""
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", tag("b", value), " ", tag("span", note)))
            for name, value, note in items
        ),
        class_="figures",
    )


def empty(said: str) -> Markup:
    """What stands where there is nothing to list."""
    return tag("p", said, class_="empty")


def more(count: int, where: Child) -> Markup | None:
    """`and N more`, and where they are; None when there are none."""
    return tag("p", f"and {count:,} more: ", where, class_="more") if count > 0 else None


def command(line: str) -> Markup:
    """A command to type."""
    return tag("code", line)


def instant(time_ns: int) -> Markup:
    """A time in UTC, to the second; a dash for 0, which means never."""
    if not time_ns:
        return Markup("-")
    moment = datetime.fromtimestamp(time_ns // _NS, UTC)
    return tag("time", f"{moment:%Y-%m-%d %H:%M:%S}", datetime=f"{moment:%Y-%m-%dT%H:%M:%SZ}")


def bar(label: str, parts: Sequence[tuple[str, int]]) -> Markup:
    """Parts of a whole side by side, (class, count) each: a picture beside the numbers that say the same."""
    whole = sum(count for _, count in parts) or 1
    rects, left = [], 0
    for kind, count in parts:
        if count:
            start, width = 1000 * left // whole, max(1, 1000 * count // whole)
            rects.append(tag("rect", x=start, y=0, width=width, height=10, class_=kind))
        left += count
    return tag(
        "svg", *rects, role="img", aria_label=label, viewBox="0 0 1000 10", preserveAspectRatio="none", class_="bar"
    )


def ref_and_path(ref: str, path: bytes) -> Markup:
    """A file of a package; the manifest when the path is empty."""
    if not path:
        return join(tag("span", ref, class_="ref"), " ", tag("span", "its manifest", class_="quiet"))
    return join(tag("span", ref, class_="ref"), tag("span", "/", class_="quiet"), tag("span", path, class_="path"))
