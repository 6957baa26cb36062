"""Several backends under one mount: where bytes go, when publish may return, and a backend that is not there."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from castore.digest import Digest
from tests.damage import remove
from tests.mount.several import FAR, NEAR, SeveralBackends
from tests.mount.store import MountedStore, fails, wait_until
from tests.places import PLACES, Place

everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)
RULES = """
[[routing.rules]]
retention_class = "release"
producer = "ci-*"
backend = "far"
copies = ["near"]
[[routing.rules]]
retention_class = "rel*"
backend = "far"
"""
TO_BOTH = '[[routing.rules]]\nbackend = "near"\ncopies = ["far"]\n'

MakeSeveral = Callable[..., SeveralBackends]


@pytest.fixture
def make_several(make_store: Callable[..., MountedStore], place: Place) -> MakeSeveral:
    """Makes a store with the backends `near` and `far`, mounted."""

    def make(routing: str = "") -> SeveralBackends:
        several = SeveralBackends(make_store, place, routing)
        several.store.mount()
        return several

    return make


def label(box: Path, retention_class: str = "", producer: str = "") -> None:
    for name, value in (("retention_class", retention_class), ("producer", producer)):
        if value:
            os.setxattr(box, f"user.castore.{name}", value.encode())


def new_contents(count: int = 3) -> list[bytes]:
    return [os.urandom(1000 + number) for number in range(count)]


def fill(several: SeveralBackends, ref: str, contents: list[bytes]) -> Path:
    """The files 0, 1, ... in ingest/."""
    box = several.store.ingest(ref)
    for number, data in enumerate(contents):
        (box / str(number)).write_bytes(data)
    return box


def read_all(several: SeveralBackends, ref: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(several.store.package(ref).iterdir())]


# rules


@everywhere
def test_rules_decide_where_bytes_lie(make_several: MakeSeveral) -> None:
    several = make_several(RULES)
    cases = {
        "ours/1": ("release", "ci-7", {NEAR, FAR}),
        "ours/2": ("release", "ann", {FAR}),
        "ours/3": ("relic", "ci-7", {FAR}),
        "ours/4": ("nightly", "ci-7", {NEAR}),
        "ours/5": ("", "", {NEAR}),
    }
    for ref, (retention_class, producer, expected) in cases.items():
        contents = new_contents()
        box = several.store.ingest(ref)
        label(box, retention_class, producer)
        fill(several, ref, contents)
        package = several.store.publish(ref)
        several.check_where(ref, contents, expected)
        assert set(os.getxattr(package / "0", "user.castore.backend").decode().split(",")) <= expected
        assert read_all(several, ref) == contents


@everywhere
def test_labels_that_change_after_bytes_were_put(make_several: MakeSeveral) -> None:
    several = make_several(RULES)
    contents = new_contents()
    box = fill(several, "late/1", contents)
    for number in range(len(contents)):
        several.store.wait_stored(box / str(number))
    assert {frozenset(several.locations(Digest.of(data))) for data in contents} == {frozenset({NEAR})}
    label(box, "release", "ann")
    several.store.publish("late/1")
    shown = json.loads(several.store.castore("package", "show", "late/1", "--json"))
    assert shown["backend_ids"] == [FAR]
    for digest in several.digests("late/1", contents):
        assert FAR in several.holders(digest)
        assert FAR in several.locations(digest)


@everywhere
def test_bytes_that_another_backend_has_are_put_all_the_same(make_several: MakeSeveral) -> None:
    """A put is skipped only where that same backend has the bytes."""
    several = make_several(RULES)
    contents = new_contents()
    fill(several, "dup/1", contents)
    several.store.publish("dup/1")
    box = fill(several, "dup/2", contents)
    label(box, "release", "ann")
    several.store.publish("dup/2")
    for data in contents:
        assert several.holders(Digest.of(data)) == several.locations(Digest.of(data)) == {NEAR, FAR}


# copies


@everywhere
def test_copies_are_there_when_publish_returns(make_several: MakeSeveral) -> None:
    """The daemon is killed at once: whatever it had left to do is never done."""
    several = make_several(TO_BOTH)
    for version in range(3):
        contents = new_contents(5)
        fill(several, f"both/{version}", contents)
        several.store.publish(f"both/{version}")
        several.store.kill()
        several.check_where(f"both/{version}", contents, {NEAR, FAR})
        several.store.mount()
        assert sorted(read_all(several, f"both/{version}")) == sorted(contents)
        for path in several.store.package(f"both/{version}").iterdir():
            assert os.getxattr(path, "user.castore.status") == b"stored,stored"
            assert set(os.getxattr(path, "user.castore.backend").decode().split(",")) == {NEAR, FAR}
    for backend_id, place in ((NEAR, several.near), (FAR, several.far)):
        several.store.umount()
        several.store.mount()
        with place.unreachable(backend_id):
            assert sorted(read_all(several, "both/2")) == sorted(contents), f"without {backend_id}"


@everywhere
def test_a_copy_that_cannot_be_put_makes_publish_busy(make_several: MakeSeveral) -> None:
    several = make_several(TO_BOTH)
    contents = new_contents()
    box = several.store.ingest("half/1")
    with several.far.unreachable(FAR):
        fill(several, "half/1", contents)
        check_busy(several, box)
    several.store.publish("half/1")
    several.check_where("half/1", contents, {NEAR, FAR})


@everywhere
def test_a_manifest_that_cannot_be_copied_makes_publish_busy(make_several: MakeSeveral) -> None:
    """All files are in both backends; one goes away before publish."""
    several = make_several(TO_BOTH)
    contents = new_contents()
    box = fill(several, "half/1", contents)
    for number in range(len(contents)):
        several.store.wait_stored(box / str(number))
    with several.far.unreachable(FAR):
        check_busy(several, box)
        assert "manifest" in os.getxattr(box, "user.castore.error").decode()
    several.store.publish("half/1")
    several.check_where("half/1", contents, {NEAR, FAR})
    # What the failed publishes had put of their manifests is gone at the next start at the latest.
    several.store.umount()
    several.store.mount()
    wait_until(lambda: len(several.manifests_in_near()) == 1, "one manifest is left")


def check_busy(several: SeveralBackends, box: Path) -> None:
    """Publish is refused for now, with the reason, and nothing of it remains."""
    with fails(errno.EBUSY):
        box.rename(several.store.package("half/1"))
    error = os.getxattr(box, "user.castore.error").decode()
    assert FAR in error or "objects-far" in error, error
    assert error.endswith("try again"), error
    assert not several.store.package("half/1").exists()
    assert several.sql("SELECT count(*) FROM packages") == [(0,)]
    assert several.sql("SELECT count(*) FROM events WHERE type = 'v1.package.published'") == [(0,)]
    assert len(list(box.iterdir())) == 3
    wait_until(lambda: several.manifests_in_near() == [], "no manifest is left of it")


# a function


SITE_RULES = """
def choose(retention_class, producer):
    if retention_class == "broken":
        raise RuntimeError("the site's table has no such class")
    return {"release": "far", "odd": "nowhere"}.get(retention_class, "near")
"""


@everywhere
def test_a_function_of_the_site(make_several: MakeSeveral, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site_rules.py").write_text(SITE_RULES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    several = make_several('function = "site_rules:choose"\n')
    for ref, retention_class, expected in (("f/1", "release", {FAR}), ("f/2", "", {NEAR})):
        contents = new_contents()
        label(several.store.ingest(ref), retention_class)
        fill(several, ref, contents)
        several.store.publish(ref)
        several.check_where(ref, contents, expected)
    for ref, retention_class, said in (
        ("f/3", "broken", "'broken', 'ann') raised RuntimeError: the site's table has no such class"),
        ("f/4", "odd", "'odd', 'ann') returned 'nowhere'; expected one of the configured backends (far, near)"),
    ):
        box = several.store.ingest(ref)
        label(box, retention_class, "ann")
        (box / "0").write_bytes(b"a")
        with fails(errno.EIO):
            box.rename(several.store.package(ref))
        line = f"{several.store.config}: routing.function = 'site_rules:choose'({said}"
        assert os.getxattr(box, "user.castore.error").decode() == line
        assert several.store.run("package", "publish", ref).stderr.splitlines()[-1] == f"castore: error: {line}"
        label(box, "standard")
        several.store.publish(ref)
        several.check_where(ref, [b"a"], {NEAR})


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_such_rules:choose", "cannot be imported: ModuleNotFoundError: No module named 'no_such_rules'"),
        ("json:loud", "cannot be imported: AttributeError: module 'json' has no attribute 'loud'"),
    ],
)
def test_a_function_that_is_not_there(
    make_store: Callable[..., MountedStore], place: Place, function: str, said: str
) -> None:
    several = SeveralBackends(make_store, place, f'function = "{function}"\n')
    done = several.store.run("mount", str(several.store.mnt), "--background")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"castore: error: {several.store.config}: routing.function = '{function}' {said}")
    assert not os.path.ismount(several.store.mnt)
    assert "Traceback" not in several.store.log()


def test_a_rule_for_an_unknown_backend(make_store: Callable[..., MountedStore], place: Place) -> None:
    several = SeveralBackends(make_store, place)
    several.configure(NEAR, FAR, routing='[[routing.rules]]\nbackend = "near"\ncopies = ["fat"]\n')
    done = several.store.run("mount", str(several.store.mnt))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        f"castore: error: {several.store.config}: routing.rules[0].copies = ['fat']: expected configured backends "
        '(near, far); did you mean "far"?'
    )


# a backend that is not configured any more


@everywhere
def test_a_backend_that_is_not_configured_any_more(make_several: MakeSeveral) -> None:
    several = make_several(RULES)
    both, alone = new_contents(), new_contents(10)
    label(several.store.ingest("two/1"), "release", "ci-7")
    fill(several, "two/1", both)
    label(several.store.ingest("one/1"), "release", "ann")
    fill(several, "one/1", alone)
    for ref in ("two/1", "one/1"):
        several.store.publish(ref)
    several.store.umount()
    several.configure(NEAR)
    several.store.mount()
    line = "the catalog has locations in backend far, which is not configured"
    assert several.store.log().count(line) == 1

    # The other locations are read.
    assert read_all(several, "two/1") == both
    # Without another one, every read fails at once, and none adds to the log.
    length = len(several.store.log())
    for _ in range(3):
        for path in several.store.package("one/1").iterdir():
            started = time.monotonic()
            with fails(errno.EIO):
                path.read_bytes()
            assert time.monotonic() - started < 10
    assert several.store.log()[length:] == ""
    health = json.loads((several.store.mnt / ".castore/health.json").read_text())
    assert health["status"] == "fail"
    (check,) = [one for one in health["checks"]["backend:responseTime"] if one.get("componentId") == FAR]
    assert check["status"] == "fail"
    assert check["output"] == "the catalog has locations there, but the configuration has no such backend"
    for path in several.store.package("one/1").iterdir():
        assert os.getxattr(path, "user.castore.status") == b"stored", "it may be configured again"


@everywhere
def test_moving_to_another_backend(make_several: MakeSeveral) -> None:
    """Replicated beside reading and publishing, taken out of the configuration, forgotten; at last nothing is amiss."""
    several = make_several('default = "far"\n')
    store = several.store
    contents = [*new_contents(8), os.urandom(3_000_000)]
    fill(several, "old/1", contents)
    store.publish("old/1")
    refused = store.run("storage", "retire", "--backend", FAR, "--yes")
    assert refused.returncode == 2
    assert f"{store.config}: backends.far, routing.default: backend far is still configured" in refused.stderr

    # From now on, what is published goes to `near`; the rest is copied while both are used.
    store.umount()
    several.configure(NEAR, FAR)
    store.mount()
    store.castore("storage", "replicate", "--from", FAR, "--to", NEAR)
    fill(several, "new/1", new_contents())
    store.publish("new/1")
    several.check_where("old/1", contents, {NEAR, FAR})
    assert store.status()

    store.umount()
    several.configure(NEAR)
    store.mount()
    assert sorted(map(len, read_all(several, "old/1"))) == sorted(map(len, contents))
    health = store.mnt / ".castore/health.json"
    assert json.loads(health.read_text())["status"] == "fail"
    # Beside the daemon.
    assert "forgot backend far: 10 locations" in store.castore("storage", "retire", "--backend", FAR, "--yes")
    wait_until(lambda: json.loads(health.read_text())["status"] == "pass", "the health is good")
    several_digests = several.digests("old/1", contents)
    assert {frozenset(several.locations(digest)) for digest in several_digests} == {frozenset({NEAR})}
    assert {frozenset(several.holders(digest)) for digest in several_digests} == {frozenset({NEAR, FAR})}
    assert sorted(read_all(several, "old/1")) == sorted(contents)
    store.umount()
    store.mount()
    assert "not configured" not in store.log()[store.log().rindex("mounted") :]


def test_what_was_lost_in_one_backend_is_copied_from_the_other(make_several: MakeSeveral) -> None:
    """A read finds the damage and goes on; replicate mends it."""
    several = make_several(TO_BOTH)
    contents = new_contents()
    fill(several, "heal/1", contents)
    several.store.publish("heal/1")
    victim = Digest.of(contents[0])
    remove(several.settings[NEAR], victim)
    several.store.umount()
    several.store.mount()
    assert read_all(several, "heal/1") == contents
    assert several.locations(victim) == {FAR}
    said = several.store.castore("storage", "replicate", "--from", FAR, "--to", NEAR)
    assert said.startswith("copied 1 of 1 objects to near")
    several.check_where("heal/1", contents, {NEAR, FAR})
