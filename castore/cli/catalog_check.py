"""`castore catalog check`: proves the catalog, or a backup of it, and says what is wrong. Changes nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.output import print_json, printable
from castore.cli.session import Session, common_options, json_option
from castore.cli.steps import Steps

if TYPE_CHECKING:
    from castore.catalog.checking import CheckReader, CheckResult

FOUND_SOMETHING_BAD: Final = 1


@click.command("check")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@json_option
@common_options
@click.pass_obj
def check(session: Session, file: Path | None, as_json: bool) -> int:
    """Prove the catalog, or the backup FILE: SQLite's own checks, and every rule for its tables.

    It may run beside a daemon and sees one moment. Objects are not looked at: `castore storage verify` does that.
    Exits with 1 when something is wrong; each line says what, where, and how to mend it.

    Example: castore catalog check
    """
    from castore.catalog.checking import CheckReader

    path = file if file is not None else session.config().store.catalog_path
    with CheckReader(path) as reader, _stopping(reader), Steps("checking", quiet=as_json) as steps:
        try:
            results = list(reader.run(steps.begin))
        except InterruptedError as exc:
            raise click.Abort from exc
    bad = sum(result.count for result in results)
    if as_json:
        print_json(_document(path, results, bad))
    else:
        _print(path, results, bad)
    return FOUND_SOMETHING_BAD if bad else 0


@contextmanager
def _stopping(reader: CheckReader) -> Iterator[None]:
    """Ctrl-C ends the query that runs just now."""
    before = signal.signal(signal.SIGINT, lambda *_: reader.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _print(path: Path, results: list[CheckResult], bad: int) -> None:
    for result in results:
        for trouble in result.kept:
            click.echo(f"{result.name}: {printable(trouble.where)}: {printable(trouble.what)}")
        if result.count > len(result.kept):
            click.echo(f"{result.name}: and {result.count - len(result.kept)} more")
        if result.kept:
            click.echo(f"  mend: {result.kept[0].mend}")
    seconds = sum(result.seconds for result in results)
    verdict = f"{bad} things are wrong" if bad else "sound"
    click.echo(f"{printable(str(path))}: {verdict}; {len(results)} checks in {seconds:.1f} s")


def _document(path: Path, results: list[CheckResult], bad: int) -> dict[str, Any]:
    return {
        "path": str(path),
        "is_sound": not bad,
        "checks": [
            {"name": result.name, "title": result.title, "count": result.count, "duration_s": round(result.seconds, 3)}
            for result in results
        ],
        "findings": [asdict(trouble) for result in results for trouble in result.kept],
    }
