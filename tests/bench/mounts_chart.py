"""The table and the chart of `mounts`, from the figures that docs/benchmarks/mounts.json has. Times nothing.

python -m tests.bench.mounts_chart
    writes docs/benchmarks/mounts.svg, and the table in docs/BENCHMARKS.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

from tests.bench.mounts import WORKS, medians_of, ratio_of

_DOCS: Final = Path(__file__).parents[2] / "docs"
DOCUMENT: Final = _DOCS / "BENCHMARKS.md"
FIGURES: Final = _DOCS / "benchmarks/mounts.json"
CHART: Final = _DOCS / "benchmarks/mounts.svg"

BEGIN: Final = "<!-- made by tests/bench/mounts_chart.py: begin -->\n"
END: Final = "<!-- end -->\n"

_WIDTH: Final = 760
_LABEL: Final = 84
_BAR: Final = 14
_STEP: Final = 18
_GROUP: Final = 34
_ROOM: Final = 96
"""Behind the longest bar, for its figure."""
_STYLE: Final = """<style>
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.other { fill: #9aa5b1 }
.castore { fill: #1a7f5a }
.direct { fill: #5b6b7c }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .other { fill: #59636e }
  .castore { fill: #3fb984 }
  .direct { fill: #8b98a5 }
}
</style>"""


def figures() -> dict[str, Any]:
    """As a run wrote them."""
    read: dict[str, Any] = json.loads(FIGURES.read_text())
    return read


def _setting(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{results['cpus']} cores, {results['memory_bytes'] / 2**30:.0f} GiB of memory, Linux {results['kernel']}, "
        f"Python {results['python']}, {results['server']}; {versions}. A large file of {results['large_mib']} MiB, "
        f"{results['small_files']} files of 4 KiB, medians of {results['rounds']} rounds; the load of the host was "
        f"{results['load']}.\n"
    )


def table(results: dict[str, Any]) -> str:
    """Seconds by contender, and castore's ratio, in Markdown."""
    names = list(results["versions"])
    lines = [f"| work | {' | '.join(names)} | castore is | target |", "|---" * (len(names) + 3) + "|"]
    for work, about in WORKS.items():
        medians = medians_of(results["seconds"][work])
        cells = [f"{medians[name]:.3f}" if name in medians else "-" for name in names]
        ratio = ratio_of(work, medians)
        against = "direct" if about.against == "direct" else "the best peer"
        said = "-" if ratio is None else f"{ratio:.2f} x {against}"
        lines.append(f"| {about.title} | {' | '.join(cells)} | {said} | {about.target:g} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, results: dict[str, Any]) -> str:
    """The document with the table of these figures."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_setting(results)}\n{table(results)}\n{END}{after}"


def chart(results: dict[str, Any]) -> str:
    """Bars of seconds, in a group for each piece of work, the longest of each as wide as all others'. SVG."""
    parts: list[str] = []
    y = 0
    for work, about in WORKS.items():
        medians = medians_of(results["seconds"][work])
        longest = max(medians.values())
        y += _GROUP
        parts.append(f'<text class="title" x="0" y="{y - 8}">{escape(about.title.replace("`", ""))}, seconds</text>')
        for name, median in medians.items():
            width = max(1.0, (_WIDTH - _LABEL - _ROOM) * median / longest)
            kind = name if name in ("castore", "direct") else "other"
            parts.append(
                f'<text x="0" y="{y + _BAR - 3}">{escape(name)}</text>'
                f'<rect class="{kind}" x="{_LABEL}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"/>'
                f'<text x="{_LABEL + width + 6:.1f}" y="{y + _BAR - 3}">{median:.2f}</text>'
            )
            y += _STEP
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 8}" width="{_WIDTH}" role="img">\n'
        "<title>Seconds that each mount takes for each piece of work; less is better</title>\n"
        f"{_STYLE}\n{body}\n</svg>\n"
    )


def main() -> None:
    results = figures()
    CHART.write_text(chart(results))
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(), results))


if __name__ == "__main__":
    main()
