"""`castore retention apply`: which packages the rules let go, and that nothing else goes."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import trio

from castore.catalog.connection import open_writer
from castore.catalog.records import Package
from castore.config import RetentionRule
from castore.digest import Digest
from castore.registry.retention import expired_of_name
from castore.registry.tags import tag_package
from tests.cli.conftest import Cli
from tests.places import Place
from tests.published import PublishedStore

DAY_NS = 86400 * 10**9
NOW_NS = 1000 * DAY_NS


def rule(
    retention_class: str = "*", *, name: str = "*", keep_for: float | None = None, keep_last: int | None = None
) -> RetentionRule:
    return RetentionRule(retention_class, name, "*", None if keep_for is None else keep_for * 86400, keep_last)


def package(age: float, *, retention_class: str = "nightly", name: str = "demo") -> Package:
    number = int(age * 10)
    published_ns = NOW_NS - int(age * DAY_NS)
    manifest = Digest("manifest-sha256", bytes(32))
    return Package(
        number, name, f"v{number}", number, "ci", retention_class, 0, published_ns, 1, 1, manifest, ("local",)
    )


@pytest.mark.parametrize(
    ("rules", "gone"),
    [
        ((), []),
        ((rule("nightly"),), []),
        ((rule("nightly", keep_for=90),), ["v1000", "v2000"]),
        ((rule("nightly", keep_last=2),), ["v100", "v1000", "v2000"]),
        ((rule("nightly", keep_for=50, keep_last=4),), ["v2000"]),
        ((rule("nightly", keep_for=0),), ["v10", "v20", "v100", "v1000", "v2000"]),
        ((rule("release", keep_for=0),), ["v30", "v3000"]),
        # The first one decides, and counts what it decides about alone.
        ((rule("release"), rule(keep_last=1)), ["v20", "v100", "v1000", "v2000"]),
        ((rule(name="other", keep_for=0), rule("night*", keep_for=150)), ["v2000"]),
    ],
)
def test_rules(rules: tuple[RetentionRule, ...], gone: list[str]) -> None:
    packages = [package(age) for age in (100, 1, 10, 2, 200)]
    packages += [package(age, retention_class="release") for age in (3, 300)]
    expired = expired_of_name(packages, {"v5"}, rules, NOW_NS)
    assert [one.package.version for one in expired] == gone
    assert expired_of_name(packages, {one.version for one in packages}, rules, NOW_NS) == []


def test_apply(tmp_path: Path, place: Place, cli: Cli) -> None:
    store = PublishedStore(tmp_path, place, "one")
    cli.environ["CASTORE_CONFIG"] = str(store.config_path)

    async def fill() -> None:
        await store.create()
        for number in range(1, 6):
            await store.publish(f"demo/{number}", {b"file": b"%d" % number})
        await store.publish("other/1", {b"file": b"other"})
        await store.aclose()

    trio.run(fill)
    assert "all packages are kept" in cli("retention", "apply", "--delete").stdout
    rules = '[[retention.rules]]\nretention_class = "standard"\nname = "demo"\nkeep_for = "90d"\nkeep_last = 2\n'
    store.config_path.write_text(store.config_path.read_text() + rules)
    database = open_writer(store.catalog_path).conn
    old = time.time_ns() - 100 * DAY_NS
    database.execute("UPDATE packages SET published_at_ns = ? + CAST(version AS INTEGER)", (old,))
    database.close()
    store.write(partial(tag_package, name="demo", tag="stable", version="2", uid=0))

    found = json.loads(cli("retention", "apply", "--json").stdout)
    assert [one["ref"] for one in found["packages"]] == ["demo/3", "demo/1"]
    assert "nothing is deleted" in cli("retention", "apply").stdout
    refs = [one["ref"] for one in json.loads(cli("package", "list", "--json").stdout)["packages"]]
    assert refs == [f"demo/{number}" for number in range(1, 6)] + ["other/1"]
    assert "deleted 2 packages" in cli("retention", "apply", "--delete").stdout
    refs = [one["ref"] for one in json.loads(cli("package", "list", "--json").stdout)["packages"]]
    assert refs == ["demo/2", "demo/4", "demo/5", "other/1"]
    assert json.loads(cli("retention", "apply", "--delete", "--json").stdout)["packages"] == []
    cli("package", "restore", "demo/1")
    events = cli("events", "--json", "--type", "v1.package.deleted").stdout.splitlines()
    assert [json.loads(line)["data"]["reason"] for line in events] == ["retention", "retention"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('retention_class = "a"\n', "retention.rules[0].keep_for"),
        ('keep = "forever"\nkeep_last = 1\n', "not both"),
        ('keep = "always"\n', 'one of "forever"'),
        ("keep_last = 0\n", "retention.rules[0].keep_last"),
        ('keep_for = "soon"\n', "a duration such as"),
        ('keep_until = "90d"\n', "unknown key"),
    ],
)
def test_bad_rules(cli: Cli, tmp_path: Path, text: str, said: str) -> None:
    cli("init", "--state-dir", tmp_path / "state")
    path = tmp_path / "bad.toml"
    path.write_text(f'[backends.local]\ntype = "local"\npath = "{tmp_path}/state/objects"\n[[retention.rules]]\n{text}')
    assert said in cli.error("--config", path, "retention", "apply")
