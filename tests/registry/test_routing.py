"""Which backends a package goes to: rules, patterns, copies, the default, and a function."""

from __future__ import annotations

from pathlib import Path

import pytest

from castore.config import RoutingRule, RoutingSettings
from castore.errors import ConfigError
from castore.registry.routing import Router

BACKENDS = frozenset({"local", "remote", "archive"})
RULES = (
    RoutingRule("release", "ci-*", "remote", ("archive",)),
    RoutingRule("release", "*", "archive", ()),
    RoutingRule("night[ly]y", "*", "remote", ()),
)


@pytest.mark.parametrize(
    ("retention_class", "producer", "expected"),
    [
        ("release", "ci-7", ("remote", "archive")),
        ("release", "ann", ("archive",)),
        ("Release", "ci-7", ("local",)),
        ("nightly", "ann", ("remote",)),
        ("standard", "ci-7", ("local",)),
    ],
)
def test_the_first_rule_that_matches_wins(retention_class: str, producer: str, expected: tuple[str, ...]) -> None:
    router = Router(RoutingSettings("local", None, RULES), BACKENDS)
    assert router.route(retention_class, producer).backend_ids == expected


def test_a_function_is_asked_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site_rules_for_test.py").write_text(
        "def choose(retention_class, producer):\n"
        "    return 'archive' if (retention_class, producer) == ('a', 'b') else 'nowhere'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    router = Router(RoutingSettings("local", "site_rules_for_test:choose", RULES), BACKENDS)
    assert router.route("a", "b").backend_ids == ("archive",)
    with pytest.raises(ConfigError, match=r"routing\.function.*'nowhere'"):
        router.route("release", "ci-7")


@pytest.mark.parametrize("function", ["no_such_module_here:choose", "json:no_such_name", "json", "json:__name__"])
def test_a_function_that_is_none(function: str) -> None:
    with pytest.raises(ConfigError, match=r"routing\.function"):
        Router(RoutingSettings("local", function, ()), BACKENDS)
