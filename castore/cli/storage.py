"""`castore storage`: what is kept in the backends. The group, its choice of backends, and `backends`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.output import format_bytes, format_time_ns, print_columns, print_json, printable
from castore.cli.session import Session, common_options, json_option
from castore.cli.storage_gc import gc
from castore.cli.storage_probe import probe
from castore.cli.storage_repair import repair
from castore.cli.storage_replicate import replicate
from castore.cli.storage_retire import retire
from castore.cli.storage_verify import verify
from castore.errors import ConfigError

if TYPE_CHECKING:
    from castore.catalog.records import LocationStatus
    from castore.config import BackendSettings
    from castore.storage.spi import BackendHealth

FOUND_SOMETHING_BAD: Final = 1


@click.group("storage")
@common_options
def command() -> None:
    """Look after the backends and what is stored there."""


command.add_command(verify)
command.add_command(repair)
command.add_command(probe)
command.add_command(replicate)
command.add_command(retire)
command.add_command(gc)


@command.command("backends")
@json_option
@common_options
@click.pass_obj
def backends(session: Session, as_json: bool) -> int:
    """List the backends: type, health, what the catalog says is stored there, and when each was last probed.

    Exits with 1 when one of them fails its probe.

    Example: castore storage backends
    """
    import trio

    from castore.catalog.reader import CatalogReader

    config = session.config()
    with CatalogReader.open(config.store.catalog_path) as reader:
        counts = reader.location_counts()
        probed = {backend_id: probe.probed_at_ns for backend_id, probe in reader.probes().items()}
    health = trio.run(_probe_all, config.backends)
    rows = [
        _row(backend_id, settings.backend_type, health[backend_id], counts)
        for backend_id, settings in config.backends.items()
    ]
    for backend_id in sorted({count[0] for count in counts} - health.keys()):
        rows.append(_row(backend_id, "", None, counts))
    for row in rows:
        row["probed_at_ns"] = probed.get(row["backend_id"], 0)
    if as_json:
        print_json({"backends": rows})
    else:
        _print(rows)
    return FOUND_SOMETHING_BAD if any(row["health"] == "fail" for row in rows) else 0


async def _probe_all(settings: Mapping[str, BackendSettings]) -> dict[str, BackendHealth]:
    import trio

    from castore.storage.open import open_backend
    from castore.storage.spi import BackendHealth

    found: dict[str, BackendHealth] = {}

    async def probe(backend_id: str) -> None:
        try:
            backend = open_backend(settings[backend_id])
        except ConfigError as exc:
            found[backend_id] = BackendHealth("fail", str(exc))
            return
        try:
            found[backend_id] = await backend.health()
        finally:
            await backend.aclose()

    async with trio.open_nursery() as nursery:
        for backend_id in settings:
            nursery.start_soon(probe, backend_id)
    return found


def _row(
    backend_id: str,
    backend_type: str,
    health: BackendHealth | None,
    counts: list[tuple[str, LocationStatus, int, int]],
) -> dict[str, Any]:
    here = {str(status): (count, size_bytes) for other, status, count, size_bytes in counts if other == backend_id}
    return {
        "backend_id": backend_id,
        "type": backend_type,
        "health": health.status if health else "fail",
        "detail": health.detail if health else "not in the configuration",
        "free_bytes": health.free_bytes if health else None,
        "object_count": sum(count for count, _ in here.values()),
        "size_bytes": sum(size_bytes for _, size_bytes in here.values()),
        "by_status": {status: count for status, (count, _) in here.items()},
    }


def _print(rows: list[dict[str, Any]]) -> None:
    header = ("BACKEND", "TYPE", "HEALTH", "OBJECTS", "FAILED", "SIZE", "PROBED", "DETAIL")
    lines = [
        (
            printable(row["backend_id"]),
            row["type"] or "-",
            row["health"],
            str(row["object_count"]),
            str(row["by_status"].get("failed", 0)),
            format_bytes(row["size_bytes"]),
            format_time_ns(row["probed_at_ns"]),
            printable(row["detail"]),
        )
        for row in rows
    ]
    print_columns([header, *lines], right=(3, 4, 5))
