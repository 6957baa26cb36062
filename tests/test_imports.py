"""The import rules of docs/ARCHITECTURE-BLUEPRINT.md, enforced. Not a test of what any module does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path.relative_to(ROOT) for top in ("castore", "mount") for path in (ROOT / top).rglob("*.py"))

# Which paths may import a module at all; an empty tuple means none.
RESERVED: dict[str, tuple[str, ...]] = {
    "pyfuse3": ("mount/",),
    "sqlite3": ("castore/catalog/",),
    "pysqlite3": ("castore/catalog/",),
    "sqlite_utils": ("castore/catalog/",),
    "asyncio": ("castore/storage/asyncio_thread.py",),
    # A backend maps the operating system's errors at its seam; all other errno numbers are the mount's answer.
    "errno": ("mount/errnos.py", "castore/storage/backends/"),
}

# The vocabulary of one kind of store, which the rules and the HTTP interface never speak.
STORE_WORDS = {"s3", "bucket", "etag", "multipart", "uploadid", "sse"}


def imported(source: str) -> Iterator[str]:
    """Absolute names of all modules that a source imports, at any depth, by statement or by `import_module`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def words(text: str) -> set[str]:
    """The words of a text in lower case; identifiers of either style count by part and by pairs of parts."""
    found = set()
    for identifier in re.findall(r"[A-Za-z0-9_]+", text):
        parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_+", " ", identifier).lower().split()
        found |= {*parts, *map("".join, pairwise(parts))}
    return found


def test_layers() -> None:
    lint = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    run = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 broken" in run.stdout


def test_every_part_of_the_library_has_a_layer() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layered = set(re.findall(r"castore\.\w+", " ".join(config["contracts"][0]["layers"])))
    parts = {f"castore.{path.parts[1].removesuffix('.py')}" for path in SOURCES if path.parts[0] == "castore"}
    assert parts - {"castore.__init__", "castore.__main__"} <= layered


@pytest.mark.parametrize("module", RESERVED)
def test_reserved_module(module: str) -> None:
    used_by = [
        str(path)
        for path in SOURCES
        if any(name == module or name.startswith(f"{module}.") for name in imported((ROOT / path).read_text()))
    ]
    assert [path for path in used_by if not path.startswith(RESERVED[module])] == []


def test_only_the_s3_backend_needs_the_s3_extra() -> None:
    modules = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if path.stem != "__main__" and not str(path).startswith("castore/storage/backends/s3")
    ]
    # None in sys.modules makes an import fail like that of a module that is not installed.
    absent = dict.fromkeys(("aioboto3", "aiobotocore", "aiohttp", "boto3", "botocore"))
    load = f"import importlib, sys\nsys.modules |= {absent}\nfor name in {modules}:\n    importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", load], cwd=ROOT, check=True)


@pytest.mark.parametrize("part", ["castore/registry", "castore/api"])
def test_no_word_of_one_store(part: str) -> None:
    said = {str(path): words((ROOT / path).read_text()) & STORE_WORDS for path in SOURCES}
    assert {path: found for path, found in said.items() if found and path.startswith(f"{part}/")} == {}


def test_no_module_is_named_like_the_standard_library() -> None:
    assert [str(path) for path in SOURCES if path.stem in sys.stdlib_module_names] == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import pyfuse3", "pyfuse3"),
        ("def f():\n    from asyncio.events import x", "asyncio.events"),
        ("importlib.import_module('sqlite3')", "sqlite3"),
        ("__import__('errno')", "errno"),
    ],
)
def test_imports_are_found(source: str, module: str) -> None:
    assert list(imported(source)) == [module]


@pytest.mark.parametrize(
    "text", ["an S3 store", "class S3Backend", "ETag", "etag_of(x)", "uploadId", "self.upload_id", "multipart/mixed"]
)
def test_store_words_are_found(text: str) -> None:
    assert words(text) & STORE_WORDS


@pytest.mark.parametrize("text", ["essence", "buckets of time", "uploads the id", "assets3d", "it's 3"])
def test_other_words_are_not(text: str) -> None:
    assert not words(text) & STORE_WORDS
