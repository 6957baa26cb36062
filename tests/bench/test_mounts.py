"""The benchmark of mounts in its short form, and that the documents show what a run wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.mounts import WORKS, make_files, make_new, medians_of, ratio_of
from tests.bench.mounts_chart import CHART, DOCUMENT, chart, figures, with_table

ROOT = Path(__file__).parents[2]


def test_a_run(tmp_path: Path) -> None:
    """castore beside the contenders that the tests install: each piece of work is done, and timed."""
    out = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "tests.bench.mounts",
        str(tmp_path),
        "--only",
        "direct,weed,castore",
        "--rounds",
        "1",
    ]
    done = subprocess.run(
        [*command, "--large-mib", "8", "--small", "60", "--json", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert set(results["versions"]) == {"direct", "weed", "castore"}
    for work in WORKS:
        timed = results["seconds"][work]
        assert {"weed", "castore"} <= timed.keys()
        assert all(second > 0 for each in timed.values() for second in each)
        assert ratio_of(work, medians_of(timed)) is not None
        assert f"\n{work} " in f"\n{done.stdout}"


@pytest.mark.parametrize("option", [("--only", "nobody"), ("--works", "nothing")])
def test_what_is_unknown(tmp_path: Path, option: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "tests.bench.mounts", str(tmp_path), *option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"unknown: {option[1]}" in done.stderr


def test_what_is_put_is_new_each_time(tmp_path: Path) -> None:
    source = make_files(tmp_path, large_mib=1, small=3)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    before = [path.read_bytes() for path in files]
    make_new(source)
    after = [path.read_bytes() for path in files]
    assert len(files) == 4
    assert [len(each) for each in after] == [len(each) for each in before]
    assert not set(before) & set(after)


def test_ratios() -> None:
    medians = {"direct": 2.0, "weed": 3.0, "rclone": 4.0, "castore": 1.5}
    assert ratio_of("cold-seq", medians) == 0.75
    assert ratio_of("cold-small", medians) == 0.5
    assert ratio_of("cold-small", {"direct": 2.0, "castore": 1.0}) is None


def test_the_documents_show_the_figures() -> None:
    """Else: python -m tests.bench.mounts_chart"""
    text = DOCUMENT.read_text()
    assert with_table(text, figures()) == text
    assert CHART.read_text() == chart(figures())
