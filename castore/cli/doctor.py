"""`castore doctor`: what is wrong with this host, this store and its backends, and how to mend it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from castore.cli.output import print_json, printable
from castore.cli.session import Session, common_options, json_option
from castore.errors import ConfigError

if TYPE_CHECKING:
    from castore.cli.examination import Sight
    from castore.config import Config
    from castore.storage.spi import BackendHealth

_FOUND_SOMETHING_BAD: Final = 1


@click.command("doctor")
@json_option
@common_options
@click.pass_obj
def command(session: Session, as_json: bool) -> int:
    """Look for what is wrong: device, libraries, rights, catalog, secrets, mounts, disks, each backend.

    Changes nothing. Exits with 1 when something does not work.

    Example: castore doctor
    """
    import trio

    from castore.cli.examination import of_backends, of_config, of_this_host, of_this_store

    seen = list(of_this_host())
    try:
        config = session.config()
    except ConfigError as exc:
        seen.append(of_config(exc))
    else:
        seen += of_this_store(config)
        seen += of_backends(trio.run(_ask_all, config))
    if as_json:
        print_json({"seen": [asdict(sight) for sight in seen]})
    else:
        _print(seen)
    return _FOUND_SOMETHING_BAD if any(sight.status == "fail" for sight in seen) else 0


async def _ask_all(config: Config) -> dict[str, BackendHealth]:
    import trio

    from castore.errors import StorageError
    from castore.storage.open import open_backend
    from castore.storage.spi import BackendHealth

    found: dict[str, BackendHealth] = {}

    async def ask(backend_id: str) -> None:
        try:
            backend = open_backend(config.backends[backend_id])
        except ConfigError as exc:
            found[backend_id] = BackendHealth("fail", str(exc))
            return
        try:
            found[backend_id] = await backend.health()
        except (ConfigError, StorageError) as exc:
            found[backend_id] = BackendHealth("fail", str(exc))
        finally:
            with trio.CancelScope(shield=True):
                await backend.aclose()

    async with trio.open_nursery() as nursery:
        for backend_id in config.backends:
            nursery.start_soon(ask, backend_id)
    return {backend_id: found[backend_id] for backend_id in config.backends}


def _print(seen: list[Sight]) -> None:
    for sight in seen:
        click.echo(f"{sight.status:5} {printable(sight.name)}: {printable(sight.text)}")
        if sight.mend:
            click.echo(f"      to mend it: {printable(sight.mend)}")
