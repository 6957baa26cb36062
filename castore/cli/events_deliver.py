"""`castore events --deliver`: what a writing mount does by itself, for hosts without one. Prints no events."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import click

from castore.cli.output import json_line, printable
from castore.errors import ConfigError, DeliveryError

if TYPE_CHECKING:
    import trio

    from castore.catalog.writer import CatalogWriter
    from castore.config import Config


def deliver(config: Config, *, follow: bool, as_json: bool) -> None:
    """Deliver what waits; with `follow`, what comes, too, until told to end.

    Raises ConfigError, StateError, StateLocked, and DeliveryError when a sink does not take all that waits.
    """
    import trio

    from castore.catalog.writer import CatalogWriter

    if not config.events.sinks:
        raise ConfigError(
            f"{config.source or 'built-in defaults'}: events: there is nobody to deliver to; "
            "set [events.file] or [events.webhook]"
        )
    writer = CatalogWriter(config.store.catalog_path)
    try:
        trio.run(_follow if follow else _deliver, config, writer, as_json)
    finally:
        writer.close()


async def _follow(config: Config, writer: CatalogWriter, _: bool) -> None:
    import trio

    from castore.api.deliveries import Deliveries

    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_signal, nursery.cancel_scope)
        try:
            await Deliveries(config, writer).run(on_wait=lambda why: click.echo(f"castore: {printable(why)}", err=True))
        except Exception as exc:
            # Raised outside, so that it is not part of a group.
            error = exc
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


async def _cancel_on_signal(scope: trio.CancelScope) -> None:
    import trio

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


async def _deliver(config: Config, writer: CatalogWriter, as_json: bool) -> None:
    from castore.api.deliveries import Deliveries

    done = await Deliveries(config, writer).deliver()
    for name, (count, error) in done.items():
        if as_json:
            click.echo(json_line({"sink": name, "delivered_count": count, "error": error or None}))
        else:
            click.echo(f"{name}: {count} events delivered{f'; {printable(error)}' if error else ''}")
    errors = [error for _, error in done.values() if error]
    if errors:
        raise DeliveryError("not all events are delivered: " + "; ".join(errors))
