"""`castore package sums` and `package diff`: what is in packages by digest. Both read the catalog alone, no object."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.completing import REF
from castore.cli.output import print_json, printable, text_fields
from castore.cli.session import Session, common_options, json_option
from castore.errors import NotFound
from castore.registry.names import parse_ref

if TYPE_CHECKING:
    from castore.catalog.package_tree import TreeReader
    from castore.catalog.records import Entry, Package

_DIFFERENT: Final = 1


@click.command("sums")
@click.argument("ref", type=REF)
@json_option
@common_options
@click.pass_obj
def sums(session: Session, ref: str, as_json: bool) -> None:
    """Print the SHA-256 of every file of the package REF, as `sha256sum` does and `sha256sum --check` reads.

    Example: castore package sums zlib/1.3 | (cd /srv/zlib-1.3 && sha256sum --check --quiet)
    """
    from castore.catalog.package_tree import TreeReader
    from castore.catalog.records import Kind

    with TreeReader(session.config().store.catalog_path) as reader:
        package = _package(reader, ref)
        files = ((path, _hex(reader, entry)) for path, entry in reader.walk(package.root_id) if entry.kind is Kind.FILE)
        if as_json:
            print_json(
                {"ref": package.ref, "files": [text_fields("path", path) | {"sha256": hex} for path, hex in files]}
            )
            return
        for path, digest in files:
            sys.stdout.buffer.write(sums_line(path, digest))
        sys.stdout.buffer.flush()


def sums_line(path: bytes, digest: str) -> bytes:
    """A line as coreutils writes it: a name with a backslash or a line break is escaped, and the line says so."""
    escaped = path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    return (b"\\" if escaped != path else b"") + digest.encode() + b"  " + escaped + b"\n"


@click.command("diff")
@click.argument("old", type=REF)
@click.argument("new", type=REF)
@click.option("--exit-code", "tells", is_flag=True, help="Exit with 1 when they differ.")
@json_option
@common_options
@click.pass_obj
def diff(session: Session, old: str, new: str, tells: bool, as_json: bool) -> int:
    """Show what differs between the packages OLD and NEW: `+` added, `-` removed, `M` other bytes, target or kind,
    `m` another mode.

    Times and owners are not compared.

    Example: castore package diff zlib/1.2 zlib/latest
    """
    from castore.catalog.package_tree import TreeReader

    with TreeReader(session.config().store.catalog_path) as reader:
        first, second = _package(reader, old), _package(reader, new)
        before = {path: _facts(entry) for path, entry in reader.walk(first.root_id)}
        changes = list(_changes(before, reader, second))
    if as_json:
        print_json(
            {
                "old": first.ref,
                "new": second.ref,
                "changes": [{"change": _WORDS[sign]} | text_fields("path", path) for path, sign in changes],
            }
        )
    else:
        for path, sign in changes:
            click.echo(f"{sign} {printable(path)}")
    return _DIFFERENT if tells and changes else 0


_WORDS: Final = {"+": "added", "-": "removed", "M": "changed", "m": "mode"}


def _changes(before: dict[bytes, tuple[Any, int]], reader: TreeReader, second: Package) -> Iterator[tuple[bytes, str]]:
    found: list[tuple[bytes, str]] = []
    for path, entry in reader.walk(second.root_id):
        content, mode = _facts(entry)
        known = before.pop(path, None)
        if known is None:
            found.append((path, "+"))
        elif known[0] != content:
            found.append((path, "M"))
        elif known[1] != mode:
            found.append((path, "m"))
    found += [(path, "-") for path in before]
    return iter(sorted(found))


def _facts(entry: Entry) -> tuple[Any, int]:
    """What makes an entry another one, and its mode. One blob has one number."""
    return (entry.kind, entry.blob_id, entry.target), entry.mode


def _package(reader: TreeReader, ref: str) -> Package:
    package = reader.package(*parse_ref(ref, allow_latest=True))
    if package is None:
        raise NotFound(f"{ref}: no such package is published")
    return package


def _hex(reader: TreeReader, entry: Entry) -> str:
    known = reader.blob_digest(entry.blob_id)
    if known is None:
        raise NotFound("the package was deleted meanwhile")
    return known[0].hex
