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


SITE_RULES = """
import sys

def choose(retention_class, producer):
    return {"a": "archive", "none": None, "list": ["archive"], "number": 7}.get(retention_class, "nowhere")

def divide(retention_class, producer):
    return 1 / 0

def leave(retention_class, producer):
    sys.exit("good bye")

def many(retention_class, producer):
    raise ValueError("a line\\nand another")
"""


@pytest.fixture
def site_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the site that can be imported."""
    path = tmp_path / "site_rules_for_test.py"
    path.write_text(SITE_RULES)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def by_function(name: str) -> Router:
    function = f"site_rules_for_test:{name}"
    return Router(RoutingSettings("local", function, ()), BACKENDS, source=Path("/etc/castore.toml"))


@pytest.mark.usefixtures("site_rules")
def test_a_function_is_asked_instead() -> None:
    assert by_function("choose").route("a", "b").backend_ids == ("archive",)


@pytest.mark.usefixtures("site_rules")
@pytest.mark.parametrize(
    ("name", "retention_class", "said"),
    [
        (
            "choose",
            "release",
            "('release', 'b') returned 'nowhere'; expected one of the configured backends (archive, ",
        ),
        ("choose", "none", "('none', 'b') returned None; expected one of"),
        ("choose", "list", "('list', 'b') returned a value of type list; expected one of"),
        ("choose", "number", "('number', 'b') returned a value of type int; expected one of"),
        ("divide", "a", "('a', 'b') raised ZeroDivisionError: division by zero"),
        ("leave", "a", "('a', 'b') raised SystemExit: good bye"),
        ("many", "a", "('a', 'b') raised ValueError: a line and another"),
    ],
)
def test_a_function_that_fails(name: str, retention_class: str, said: str) -> None:
    router = by_function(name)
    with pytest.raises(ConfigError) as caught:
        router.route(retention_class, "b")
    line = str(caught.value)
    assert line.startswith(f"/etc/castore.toml: routing.function = 'site_rules_for_test:{name}'{said}")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            "no_such_module_here:choose",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_here'",
        ),
        ("json:no_such_name", "cannot be imported: AttributeError: module 'json' has no attribute 'no_such_name'"),
        ("json:__name__", "is of type str; expected a function that is not async"),
        ("asyncio:sleep", "is of type function; expected a function that is not async"),
    ],
)
def test_a_function_that_is_none(function: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Router(RoutingSettings("local", function, ()), BACKENDS)
    assert str(caught.value).startswith(f"routing.function = {function!r} {said}")


@pytest.mark.parametrize("text", ["1 / 0", "raise SystemExit", "def choose(:"])
def test_a_module_that_fails_when_it_is_imported(site_rules: Path, text: str) -> None:
    site_rules.with_name("broken_rules_for_test.py").write_text(text)
    with pytest.raises(ConfigError, match=r"^routing\.function = 'broken_rules_for_test:choose' cannot be imported: "):
        Router(RoutingSettings("local", "broken_rules_for_test:choose", ()), BACKENDS)
