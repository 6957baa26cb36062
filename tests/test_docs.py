"""The documents against the code: what they name exists, what they state of numbers is so. Not a test of behaviour."""

from __future__ import annotations

import ast
import errno
import gzip
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
import pytest
from pysqlite3 import dbapi2 as sqlite3

from castore import errors, events
from castore.catalog.connection import create_catalog, create_workspace
from castore.catalog.records import Kind
from castore.cli.init import template
from castore.cli.main import root
from castore.config_values import parse_duration, parse_size
from castore.digest import BlobHasher, BlobSummary, Digest
from castore.registry.manifest import ManifestEntry, ManifestHeader, read_manifest, write_manifest
from mount.errnos import errno_of

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SEMANTICS = ROOT / "docs/SEMANTICS.md"
BLUEPRINT = ROOT / "docs/ARCHITECTURE-BLUEPRINT.md"
FORMAT = ROOT / "docs/FORMAT.md"
LISTING = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--", "castore/*.py", "mount/*.py"]
SOURCES = [
    Path(path)
    for path in subprocess.run(LISTING, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    if path and (ROOT / path).exists()
]

# Public numbers of the code that bound nothing: fixed inodes, versions, exit codes, errno, and what only tests use.
NOT_BOUNDS = {
    *("FIRST_INODE", "FIRST_ALLOCATED", "INGEST_ROOT", "ROOT", "PACKAGES", "BY_DIGEST", "BY_DIGEST_ALGORITHM"),
    *("CONTROL", "STATUS_FILE", "HEALTH_FILE", "DIGEST_DIRECTORIES", "DIGEST_FILES"),
    *("SCHEMA_VERSION", "FORMAT_VERSION", "COULD_NOT_RUN", "FOUND_SOMETHING_BAD", "INTERRUPTED", "EIO", "ENOENT"),
    *("MANY", "PATIENCE_S", "LARGEST_INODE"),
}
# What the kernel or the staging disk answers by itself, without an error of castore's.
NOT_OURS = {"ENOTCONN", "EDQUOT", "EFBIG", "ENFILE", "ENOMEM"}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])


def without_blocks(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    """What stands between backticks in a line."""
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def named_tests(text: str) -> list[tuple[str, str]]:
    """(path, name) of every test named as `tests/...py::[Class::]test_...`."""
    return re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", text)


def defined_tests(path: Path) -> set[str]:
    """The tests of a file, those of classes as Class::name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name.startswith("test_"):
                found.add(prefix + member.name)
    return found


@each_document
def test_named_tests_exist(document: Path) -> None:
    named = named_tests(document.read_text())
    known = {path: defined_tests(ROOT / path) for path in {path for path, _ in named}}
    assert [f"{path}::{name}" for path, name in named if name not in known[path]] == []


def test_every_promise_names_its_proof() -> None:
    """Each item of a list, and each paragraph below the first heading, but for tables: what they say is tested, too."""
    _, _, text = SEMANTICS.read_text().partition("\n## ")
    parts = [part.strip() for part in re.split(r"\n(?=- |#)|\n\n", f"## {text}")]
    promises = [part for part in parts if part and not part.startswith(("#", "|"))]
    assert len(promises) > 100
    assert [promise for promise in promises if not named_tests(promise)] == []


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", without_blocks(document.read_text()))
    relative = [target for target in targets if not re.match(r"https?://", target)]
    assert [target for target in relative if not (document.parent / target.partition("#")[0]).exists()] == []


@each_document
def test_named_paths_exist(document: Path) -> None:
    words = [code.split()[0].removeprefix("./").partition("::")[0] for code in inline_code(document.read_text())]
    paths = [word for word in words if re.match(r"(castore|mount|tests|docs|scripts|\.ci)/", word)]
    assert [path for path in paths if not any(ROOT.glob(path.rstrip("/")))] == []


def error_classes(base: type[errors.CastoreError] = errors.CastoreError) -> Iterator[type[errors.CastoreError]]:
    """The exception tree, its root first."""
    yield base
    for kind in base.__subclasses__():
        yield from error_classes(kind)


def test_the_errno_table_is_the_codes() -> None:
    stated = dict(re.findall(r"^\| `(\w+)` \| `(E\w+)` \|", SEMANTICS.read_text(), flags=re.MULTILINE))
    answered = {kind.__name__: errno_of(kind("")) for kind in error_classes()}
    assert {name: getattr(errno, number) for name, number in stated.items()} == {
        name: number for name, number in answered.items() if number != errno.EIO
    }


def test_named_errnos_are_answered() -> None:
    answered = {errno_of(kind("")) for kind in error_classes()}
    for document in (SEMANTICS, ROOT / "README.md", BLUEPRINT):
        words = set(re.findall(r"\bE[A-Z0-9]{2,}\b", document.read_text())) - NOT_OURS
        numbers = {word: getattr(errno, word) for word in words if hasattr(errno, word)}
        assert {word for word, number in numbers.items() if number not in answered} == set(), document


def parse_command(words: list[str]) -> None:
    """Raise ClickException unless the words are a command with options that it has."""
    command: click.Command = root
    while isinstance(command, click.Group):
        context = click.Context(command, info_name=words[0])
        _, rest, _ = command.make_parser(context).parse_args(words[1:])
        if not rest:
            return
        found = command.get_command(context, rest[0])
        if found is None:
            raise click.UsageError(f"no such command: {rest[0]}")
        command, words = found, rest
    context = click.Context(command, info_name=words[0])
    command.make_parser(context).parse_args(words[1:])


@each_document
def test_commands_are_real(document: Path) -> None:
    text = document.read_text()
    lines = [line for block in blocks(text, "sh") for line in block.splitlines() if re.match(r"castore\b", line)]
    lines += [code for code in inline_code(text) if re.match(r"castore [a-z-]", code)]
    if document == ROOT / "README.md":
        assert len(lines) > 8
    for line in lines:
        parse_command(shlex.split(line, comments=True))


@pytest.mark.parametrize("line", ["castore frobnicate", "castore init --nonsense", "castore package eat x"])
def test_commands_that_are_not_real_are_found(line: str) -> None:
    with pytest.raises(click.ClickException):
        parse_command(shlex.split(line))


def summary_of(data: bytes) -> BlobSummary:
    hasher = BlobHasher()
    hasher.update(data)
    return hasher.finish()


def test_the_manifest_example_is_what_the_code_writes(tmp_path: Path) -> None:
    header = ManifestHeader(
        name="hello",
        version="1.0",
        producer="ci-7",
        retention_class="standard",
        publisher_uid=1000,
        published_at_ns=1_700_000_000_123_456_789,
        backend_ids=("local",),
        name_uid=1000,
        name_gid=1000,
        name_mode=0o755,
    )

    def entry(path: bytes, kind: Kind, mode: int, content: bytes | None = None, target: bytes = b"") -> ManifestEntry:
        return ManifestEntry(
            path=path,
            kind=kind,
            mode=mode,
            uid=1000,
            gid=1000,
            mtime_ns=1_600_000_000 * 10**9,
            blob=None if content is None else summary_of(content),
            target=target,
            attributes={} if path else {b"user.castore.producer": b"ci-7"},
        )

    entries = [
        entry(b"", Kind.DIRECTORY, 0o755),
        entry(b"bin", Kind.DIRECTORY, 0o755),
        entry(b"empty", Kind.FILE, 0o644, b""),
        entry(b"bin/hello", Kind.FILE, 0o755, b"#!/bin/sh\necho hello\n"),
        ManifestEntry(path=b"bin/hi", kind=Kind.FILE, link_to=b"bin/hello"),
        entry(b"bin/\xff", Kind.SYMLINK, 0o777, target=b"hello"),
    ]
    path = tmp_path / "manifest"
    summary = write_manifest(path, header, entries)
    written = path.read_bytes()
    text = FORMAT.read_text()
    assert blocks(text, "json") == [gzip.decompress(written).decode()]
    assert f"`{written[:10].hex(' ')}`" in text
    assert summary.digest == Digest.of(written, "manifest-sha256")
    assert str(Digest.of(b"abc")) in text
    assert f"`{summary_of(b'abc').checksums.hex()}`" in text
    read_header, read_entries = read_manifest(path)
    assert read_header == header
    assert list(read_entries) == entries


def tables(path: Path) -> set[str]:
    """Of a database, but for those that libraries keep for themselves."""
    with closing(sqlite3.connect(path)) as raw:
        rows = raw.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE '%sqlite_%'")
        return {name for (name,) in rows}


def test_the_tables_of_the_format_are_the_catalogs(tmp_path: Path) -> None:
    create_catalog(tmp_path / "catalog.db")
    create_workspace(tmp_path / "workspace.db")
    text = FORMAT.read_text().partition("## The catalog")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == tables(tmp_path / "catalog.db")
    (of_the_workspace,) = re.findall(r"^The workspace has (.*), explained", text, flags=re.MULTILINE)
    assert set(inline_code(of_the_workspace)) == tables(tmp_path / "workspace.db")


def public_numbers(path: Path) -> dict[str, float]:
    """NAME -> value of the public numeric constants of a module, which is not imported: not all may be here."""
    values: dict[str, object] = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.expr):
                try:
                    values[target.id] = eval(
                        compile(ast.Expression(value), str(path), "eval"), {"__builtins__": {}}, values
                    )
                except (NameError, AttributeError, TypeError):
                    continue  # made by a call or from an import: no plain number
    public = {name: value for name, value in values.items() if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)}
    return {name: value for name, value in public.items() if type(value) in (int, float)}  # type: ignore[misc]


def amount(text: str) -> float:
    """`64 KiB` in bytes, `5 s` in seconds, or a plain number."""
    for parse in (int, float, parse_size, parse_duration):
        try:
            return parse(text)
        except ValueError:
            continue
    raise AssertionError(f"not an amount: {text!r}")


def test_the_bounds_are_the_codes() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([^|]+) \| `([^`]+)` \|", BLUEPRINT.read_text(), flags=re.MULTILINE)
    units = {"_MS": 0.001, "_KIB": 1024.0}
    stated = {(name, path): amount(value.strip()) for name, value, path in rows}
    assert len(stated) == len(rows)
    in_code = {
        (name, str(path)): value * next((units[end] for end in units if name.endswith(end)), 1)
        for path in {*SOURCES, *(Path(path) for _, path in stated)}
        for name, value in public_numbers(path).items()
        if name not in NOT_BOUNDS
    }
    assert stated == in_code


def test_every_module_has_its_line() -> None:
    named = re.findall(r"^\| `((?:castore|mount)/\S+\.py)` \|", BLUEPRINT.read_text(), flags=re.MULTILINE)
    assert {path for path, count in Counter(named).items() if count > 1} == set()
    modules = {str(path) for path in SOURCES if path.name not in ("__init__.py", "__main__.py")}
    assert modules - set(named) == set()


def test_every_type_of_event_has_its_line_and_its_schema() -> None:
    found = re.findall(
        r"^\| \[`(v1\.[a-z_.]+)`\]\(events/(\S+)\) \|", (ROOT / "docs/EVENTS.md").read_text(), flags=re.MULTILINE
    )
    in_code = {value for value in vars(events).values() if isinstance(value, str) and value.startswith("v1.")}
    assert {name for name, _ in found} == in_code
    assert [(name, file) for name, file in found if file != f"{name}.schema.json"] == []
    assert {path.name for path in (ROOT / "docs/events").iterdir()} == {file for _, file in found}


def test_the_settings_are_those_that_init_writes() -> None:
    (shown,) = blocks((ROOT / "docs/CONFIGURATION.md").read_text(), "toml")
    assert shown == template(Path("/var/lib/castore"))


def test_the_index_leads_to_every_document() -> None:
    index = ROOT / "docs/README.md"
    targets = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", index.read_text())}
    documents = {*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/how-to").glob("*.md")}
    assert documents - targets == {index}


def test_decisions_have_their_own_numbers() -> None:
    numbers = Counter(path.name[:4] for path in (ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert [number for number, count in numbers.items() if count > 1] == []
