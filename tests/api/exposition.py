"""Prometheus' text format, read back: by its client library, and by promtool, which knows its rules."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

METRICS = Path(__file__).resolve().parents[2] / "docs/METRICS.md"


def samples(text: str) -> dict[str, float]:
    """`name{label="value"}` -> value, of all but the buckets of histograms."""
    return {
        sample.name + _labels(sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def _labels(labels: dict[str, str]) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}" if labels else ""


def served(text: str) -> dict[str, tuple[str, str]]:
    """Name -> (type, meaning) of each family, as the text declares it."""
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE))
    return {name: (types[name], help) for name, help in re.findall(r"^# HELP (\S+) (.*)$", text, flags=re.MULTILINE)}


def documented() -> dict[str, tuple[str, set[str], bool]]:
    """Name -> (type, labels, whether a mount alone has it) of each row of docs/METRICS.md."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|[^|]+\|$", METRICS.read_text(), flags=re.MULTILINE)
    text = METRICS.read_text()
    of_mount = text.index("## Of a mount")
    return {
        name: (kind, set(re.findall(r"`(\w+)`", labels)), text.index(f"| `{name}` |") > of_mount)
        for name, kind, labels in rows
    }


def promtool(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run it; what it says is in `stderr` and `stdout`."""
    return subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, check=False, timeout=60)
