"""Probes of backends as the catalog keeps them, and what they mean. Asks no backend by itself."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Literal

from castore.catalog.records import StoredProbe
from castore.storage.spi import ProbeReport


def stored_probe(backend_id: str, report: ProbeReport) -> StoredProbe:
    """What is to be kept of a probe that has just ended."""
    findings = tuple({**asdict(finding), "severity": finding.severity} for finding in report.findings)
    return StoredProbe(backend_id, time.time_ns(), report.server, findings)


def not_given(probe: StoredProbe, severity: Literal["fail", "unknown"]) -> list[dict[str, str]]:
    """What castore relies on and the backend does not give, or what could not be found out."""
    return [finding for finding in probe.findings if finding["severity"] == severity]


def consequences(probe: StoredProbe) -> list[str]:
    """A line for each thing that castore relies on and that is not given: what it is, what follows, the mend."""
    return [
        f"{finding['name']}: {finding['question']}: {finding['answer']}: {finding['consequence']}"
        for finding in not_given(probe, "fail")
    ] + [
        f"{finding['name']}: {finding['question']}: could not be asked: {finding['answer']}"
        for finding in not_given(probe, "unknown")
    ]
