"""`castore storage retire`: asks whether a backend can be forgotten, and has it forgotten. Deletes no object."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from castore.cli.completing import BACKEND
from castore.cli.output import print_json, printable
from castore.cli.session import Session, common_options, json_option
from castore.cli.storage_verify import FOUND_SOMETHING_BAD
from castore.errors import ConfigError

if TYPE_CHECKING:
    from castore.config import Config
    from castore.registry.retirement import Need


@click.command("retire")
@click.option("--backend", "backend_id", metavar="ID", type=BACKEND, required=True, help="The backend to forget.")
@click.option("--yes", "is_sure", is_flag=True, help="Do not ask.")
@json_option
@common_options
@click.pass_obj
def retire(session: Session, backend_id: str, is_sure: bool, as_json: bool) -> int:
    """Forget a backend that is no longer configured, once nothing needs it.

    Its objects stay where they are. Exits with 1, and changes nothing, when a package would lose its last good copy of
    something.

    Example: castore storage retire --backend old --yes
    """
    from castore.registry.retirement import forget_backend, needs_of

    config = session.config()
    path = config.store.catalog_path
    count = _locations(config, backend_id)
    kept = tuple(config.backends)
    need = needs_of(path, backend_id, kept)
    if need is None and not (is_sure or _agrees(backend_id, count)):
        return FOUND_SOMETHING_BAD
    forgotten = 0
    if need is None:
        forgotten = forget_backend(path, backend_id, kept)
        # Something may have come to be needed since, or been put there by a daemon that knows the backend still.
        need = needs_of(path, backend_id, kept)
    left = _location_count(config, backend_id)
    if as_json:
        print_json(_document(backend_id, forgotten, left, need))
    elif not left:
        click.echo(f"forgot backend {backend_id}: {forgotten} locations; its objects are where they were")
    if need is not None:
        _refuse(backend_id, need)
    elif left:
        print(
            f"castore: error: backend {backend_id} got {left} new locations meanwhile: start anew the mount that knows "
            "it still, then run this again",
            file=sys.stderr,
        )
    return FOUND_SOMETHING_BAD if left or need is not None else 0


def _locations(config: Config, backend_id: str) -> int:
    """How many locations there are to forget. Raises ConfigError when the backend is configured, or never was."""
    from castore.catalog.retiring import RetireReader
    from castore.registry.retirement import configured_keys

    keys = configured_keys(config, backend_id)
    if keys:
        where = config.source or "built-in defaults"
        raise ConfigError(f"{where}: {', '.join(keys)}: backend {backend_id} is still configured; take it out first")
    with RetireReader(config.store.catalog_path) as reader:
        known = reader.known_backends()
        if backend_id not in known:
            there_are = ", ".join(sorted(known)) or "none"
            raise ConfigError(
                f"--backend {printable(backend_id)}: the catalog knows nothing of it; it knows of: {there_are}"
            )
        return reader.location_count(backend_id)


def _location_count(config: Config, backend_id: str) -> int:
    from castore.catalog.retiring import RetireReader

    with RetireReader(config.store.catalog_path) as reader:
        return reader.location_count(backend_id)


def _agrees(backend_id: str, count: int) -> bool:
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask at: give --yes")
    return click.confirm(f"Forget backend {backend_id} and its {count} locations?", err=True)


def _refuse(backend_id: str, need: Need) -> None:
    least = "at least " if need.is_cut else ""
    print(
        f"castore: error: backend {backend_id} is still needed: {_some(need.blob_count, 'blob')} of {least}"
        f"{_some(need.package_count, 'package')} without another good copy in a configured backend, for example of "
        f"{', '.join(need.packages)}",
        file=sys.stderr,
    )
    if need.bad_count < need.blob_count:
        print(
            f"castore: to copy them, configure it again and run `castore storage replicate --from {backend_id} --to "
            "ANOTHER`",
            file=sys.stderr,
        )
    if need.bad_count:
        print(
            f"castore: {need.bad_count} of them without a good copy in {backend_id} either: publish those bytes again",
            file=sys.stderr,
        )


def _some(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _document(backend_id: str, forgotten: int, left: int, need: Need | None) -> dict[str, Any]:
    return {
        "backend_id": backend_id,
        "is_retired": not left and need is None,
        "forgotten_location_count": forgotten,
        "location_count": left,
        "needed_blob_count": need.blob_count if need else 0,
        "needed_bad_count": need.bad_count if need else 0,
        "needed_by_package_count": need.package_count if need else 0,
        "needed_by_packages": list(need.packages) if need else [],
    }
