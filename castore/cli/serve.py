"""`castore serve`: the HTTP API without a mount. What it answers is made by `castore.api`."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import click

from castore.cli.output import json_line, printable
from castore.cli.session import Session, common_options, json_option
from castore.errors import ConfigError

if TYPE_CHECKING:
    from castore.config import Config, HttpSettings


@click.command("serve")
@click.option("--listen", metavar="HOST:PORT", help="Listen here instead of at http.listen; port 0: any that is free.")
@json_option
@common_options
@click.pass_obj
def command(session: Session, listen: str | None, as_json: bool) -> None:
    """Answer health checks and give out events over HTTP, without a mount, until told to end.

    The queue is that of the mount of the same store, when one runs.

    Example: castore serve
    """
    import trio

    from castore.catalog.reader import CatalogReader
    from castore.config import LISTEN_RULE, parse_listen

    config = session.config()
    try:
        http = config.http if listen is None else parse_listen(listen)
    except ValueError as exc:
        raise ConfigError(f"--listen {listen}: expected {LISTEN_RULE}") from exc
    CatalogReader.open(config.store.catalog_path).close()
    trio.run(_serve, config, http, as_json)


async def _serve(config: Config, http: HttpSettings, as_json: bool) -> None:
    import trio

    from castore.api.counts import CatalogCounts
    from castore.api.health import HealthDocument
    from castore.api.http_api import HttpApi
    from castore.api.http_server import open_listener, serve_http, url_of
    from castore.api.probes import BackendProbes
    from castore.api.queue_report import MountQueue
    from castore.api.sources import Sources
    from castore.storage.measured import CallStats
    from castore.storage.open import open_backend

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        listening = await trio.to_thread.run_sync(open_listener, http.host, http.port)
        calls = {backend_id: CallStats() for backend_id in config.backends}
        backends = {
            backend_id: open_backend(settings, calls[backend_id]) for backend_id, settings in config.backends.items()
        }
        probes = BackendProbes(backends)
        counts = CatalogCounts(config.store.catalog_path)
        mount = MountQueue(config.store.control_path)
        sources = Sources(
            catalog_path=config.store.catalog_path,
            health=HealthDocument(
                catalog_path=config.store.catalog_path, probes=probes, events=config.events, mount=mount
            ),
            probes=probes,
            counts=counts,
            backend_types={backend_id: settings.backend_type for backend_id, settings in config.backends.items()},
            calls=calls,
            mount=mount,
        )
        api = HttpApi(sources)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(probes.run)
                await nursery.start(counts.run)
                await nursery.start(serve_http, listening, api.respond)
                url = url_of(listening)
                click.echo(json_line({"url": url}) if as_json else f"serving {printable(url)}")
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                for backend in backends.values():
                    await backend.aclose()
