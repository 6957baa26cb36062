"""The shape of the repository: its top level and its lock file. Not a test of what any module does."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = {"pyproject.toml", "castore", "mount", "tests", "docs", "scripts", "README.md"}
ALLOWED = REQUIRED | {"requirements.lock", "LICENSE", "CHANGELOG.md"}


def locked() -> dict[str, list[tuple[Requirement, list[str]]]]:
    """The lock file: each section's pins with their digests."""
    sections: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for part in re.split(r"^# section: ", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]:
        name, body = part.split("\n", 1)
        pins = body.replace("\\\n", " ").strip().splitlines()
        sections[name] = [
            (Requirement(pin.split(" --hash=")[0]), re.findall(r"--hash=sha256:[0-9a-f]{64}(?= |$)", pin))
            for pin in pins
        ]
    return sections


def test_top_level() -> None:
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    top = {path.split("/")[0] for path in listing.stdout.split("\0") if path}
    assert top >= REQUIRED
    assert {name for name in top - ALLOWED if not name.startswith(".")} == set()


def test_lock_pins_everything_by_digest() -> None:
    for section, pins in locked().items():
        assert pins, section
        for requirement, digests in pins:
            assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
            assert digests, requirement


def test_lock_names_no_place() -> None:
    pins = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in pins if re.search(r"[/@]|--(?!hash=)", line)] == []


def test_lock_fits_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = {
        "core": project["project"]["dependencies"],
        **project["project"]["optional-dependencies"],
        **project["dependency-groups"],
    }
    sections = locked()
    assert sections.keys() == wanted.keys()
    core = [requirement for requirement, _ in sections["core"]]
    for section, requirements in wanted.items():
        pins = {canonicalize_name(pin.name): pin for pin in [*core, *(pin for pin, _ in sections[section])]}
        for requirement in map(Requirement, requirements):
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(str(pin.specifier).removeprefix("==")), (section, requirement, pin)


def test_installed_packages_fit_together() -> None:
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


def test_both_commands_are_the_same_program() -> None:
    commands = {script.name: script.value for script in entry_points(group="console_scripts", name="castore")}
    commands |= {script.name: script.value for script in entry_points(group="console_scripts", name="artifactstore")}
    assert commands == dict.fromkeys(("castore", "artifactstore"), "castore.cli.main:main")


def test_scripts_are_sound_shell() -> None:
    scripts = [*sorted((ROOT / "scripts").iterdir()), ROOT / ".ci" / "run"]
    for script in scripts:
        assert script.read_text().startswith("#!/usr/bin/env bash\n"), script
        assert script.stat().st_mode & 0o111 == 0o111, script
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    "words",
    [
        "run --nonsense",
        "run a b",
        "install --nonsense",
        "install --extra",
        "fresh-machine --nonsense",
        "fresh-machine --tests",
        "rgw",
        "rgw start",
        "bench-memory",
        "bench-requests",
        "bench-verify",
        "disaster-drill",
        "disaster-drill --packages",
    ],
)
def test_scripts_that_are_called_wrongly_say_how_to_in_one_line(words: str) -> None:
    name, *arguments = words.split()
    done = subprocess.run([ROOT / "scripts" / name, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"usage: scripts/{name} " in line
