"""The alert rules and the dashboard of docs/monitoring/: sound, and about metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.api.exposition import METRICS, documented, promtool

FOLDER = METRICS.with_name("monitoring")
ALERTS, CASES, DASHBOARD = (FOLDER / name for name in ("alerts.yml", "alerts_test.yml", "grafana-dashboard.json"))
GIVEN = {"up", "job", "instance", "le"}
"""What Prometheus itself knows, and the labels that it adds."""


def panels() -> list[dict[str, Any]]:
    """Those with something in them."""
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    """What the dashboard asks for, its variables filled in."""
    for panel in panels():
        for target in panel["targets"]:
            filled = target["expr"].replace("$__rate_interval", "5m")
            yield re.sub(r"\$\w+", ".*", filled)


def unknown_names(text: str) -> set[str]:
    """Metrics and labels in selectors that docs/METRICS.md does not have."""
    known = {name: labels for name, (_, labels, _) in documented().items()}
    unknown = set()
    for name, selector in re.findall(r"\b((?:castore|process)_\w+)(?:\{(.*?)\})?", text):
        family = name if name in known else re.sub("_(bucket|count|sum)$", "", name)
        if family not in known:
            unknown.add(name)
            continue
        labels = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", selector))
        # A label's row may stand at a metric before it: `status` of `castore_location_bytes`.
        unknown |= {f"{name} {label}" for label in labels - known[family] - GIVEN}
    return unknown


def test_promtool_accepts_the_rules() -> None:
    checked = promtool("check", "rules", ALERTS)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(re.findall('- alert:', ALERTS.read_text()))} rules found" in checked.stdout


def test_the_rules_do_as_their_cases_say() -> None:
    tested = promtool("test", "rules", CASES)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize(
    ("right", "wrong"), [("35 * 86400", "70 * 86400"), ("0.05 * sum", "0.005 * sum"), ("for: 15m", "for: 3h")]
)
def test_the_cases_notice_what_is_wrong(tmp_path: Path, right: str, wrong: str) -> None:
    text = ALERTS.read_text()
    assert right in text
    (tmp_path / ALERTS.name).write_text(text.replace(right, wrong))
    shutil.copy(CASES, tmp_path)
    assert promtool("test", "rules", tmp_path / CASES.name).returncode != 0


def test_every_alert_has_its_cases() -> None:
    alerts = re.findall(r"- alert: (\w+)", ALERTS.read_text())
    cases = CASES.read_text()
    silent = re.findall(r"- \{eval_time: 2h, alertname: (\w+)\}", cases)
    firing = re.findall(r"alertname: (\w+)\n +exp_alerts:\n", cases)
    assert sorted(silent) == sorted(alerts)
    assert sorted(firing) == sorted(alerts)


def test_the_rules_ask_for_what_there_is() -> None:
    assert unknown_names(ALERTS.read_text()) == set()


def test_the_dashboard_asks_for_what_there_is(tmp_path: Path) -> None:
    asked = list(expressions())
    assert len(asked) > 25
    assert unknown_names("\n".join(asked)) == set()
    assert [name for name in documented() if name.startswith("castore_events_") and name not in "".join(asked)] == []
    # promtool reads expressions where they are rules.
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(asked)]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    checked = promtool("check", "rules", tmp_path / "panels.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dashboard_is_laid_out() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert (dashboard["uid"], dashboard["title"]) == ("castore", "castore")
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) - {"__rate_interval", "__all"}
    assert used == variables
    assert all(panel["title"] for panel in panels())


def test_names_that_there_are_not_are_found() -> None:
    assert unknown_names('castore_nonsense{a="b"} castore_reads_total{colour="red"} castore_locations{status="x"}') == {
        *("castore_nonsense", "castore_reads_total colour")
    }
