"""What people install: the source archive, the wheel made from it, and the first minute with that wheel alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WAIT_SECONDS = 120.0
BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2])
"""
ARCHIVED = {"castore", "mount", "docs", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "tests"}
"""At the top of the source archive, beside what setuptools adds for itself."""


@dataclass(frozen=True)
class Distribution:
    """The two archives, and the files that are tracked."""

    sdist: Path
    wheel: Path
    tracked: set[str]


def build(kind: str, source: Path, target: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", BUILD, kind, target], cwd=source, check=True, capture_output=True, timeout=WAIT_SECONDS
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """Built as for an index: the source archive from a clean checkout, the wheel from the source archive."""
    top = tmp_path_factory.mktemp("built")
    listing = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    tracked = {name for name in names if name and (ROOT / name).exists()}
    for name in tracked:
        path = top / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
    build("sdist", top / "checkout", top)
    (sdist,) = top.glob("*.tar.gz")
    (top / "unpacked").mkdir()
    subprocess.run(["tar", "-xf", sdist, "-C", top / "unpacked"], check=True)
    (source,) = (top / "unpacked").iterdir()
    build("wheel", source, top)
    (wheel,) = top.glob("*.whl")
    return Distribution(sdist, wheel, tracked)


def code(tracked: set[str]) -> set[str]:
    return {name for name in tracked if name.startswith(("castore/", "mount/"))}


def test_the_source_archive_holds_what_a_build_needs(built: Distribution) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in names if name.startswith("castore.egg-info/") or name in ("PKG-INFO", "setup.cfg")}
    assert names - made <= built.tracked
    assert {name.split("/")[0] for name in names} == ARCHIVED | {"castore.egg-info", "setup.cfg"}
    assert code(built.tracked) <= names


def test_the_wheel_holds_the_code_and_what_goes_beside_it(built: Distribution) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    (version,) = re.findall(r"^castore-(.+)-py3-none-any\.whl$", built.wheel.name)
    info, data = f"castore-{version}.dist-info/", f"castore-{version}.data/data/"
    packed = {name for name in names if not name.startswith((info, data))}
    assert packed == code(built.tracked)
    assert {"castore/py.typed", "castore/api/page_files/style.css"} <= packed
    beside = {
        f"share/castore/{name.removeprefix('docs/')}"
        for name in built.tracked
        if name.startswith(("docs/autofs/", "docs/jobs/", "docs/replication/", "docs/systemd/"))
    }
    beside.add("share/man/man1/castore.1")
    assert {name.removeprefix(data) for name in names if name.startswith(data)} == beside
    assert f"{info}licenses/LICENSE" in names


def test_the_first_minute(built: Distribution, tmp_path: Path) -> None:
    """A fresh home, an environment with the wheel and what it depends on, no configuration: it mounts and publishes."""
    home, venv = tmp_path / "home", tmp_path / "venv"
    home.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=WAIT_SECONDS)
    python = venv / "bin/python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    subprocess.run([*pip, "-q", "--no-deps", "--no-index", str(built.wheel)], check=True, timeout=WAIT_SECONDS)
    # The dependencies are installed here already. Files of that folder that make imports of their own are not read.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    environ = {key: value for key, value in os.environ.items() if not key.startswith(("CASTORE_", "XDG_", "PYTHON"))}
    environ |= {"HOME": str(home), "PATH": f"{venv}/bin:{os.environ['PATH']}"}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            line, shell=True, cwd=home, env=environ, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done

    where = run("python -c 'import castore, mount; print(castore.__file__, mount.__file__)'").stdout.split()
    assert [Path(path).parents[1] for path in where] == [site, site]
    done = run("castore mount ~/store --background")
    try:
        made = f"made a new store in {home}/.local/share/castore; `castore init` writes settings to change\n"
        assert (done.stderr, done.stdout.partition(" (")[0]) == (made, f"mounted {home}/store")
        run("mkdir -p store/ingest/hello/1.0 && echo hello >store/ingest/hello/1.0/file && sync store/ingest/hello/1.0")
        run("mv store/ingest/hello/1.0 store/packages/hello/")
        assert run("cat store/packages/hello/latest/file").stdout == "hello\n"
    finally:
        run("castore umount ~/store")
    # The second time there is nothing to make, nor to say.
    assert run("castore mount ~/store --background").stderr == ""
    run("castore umount ~/store")
