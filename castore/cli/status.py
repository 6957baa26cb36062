"""`castore status`: what the daemon says of itself, or what the catalog says when there is none. Changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from castore.api.control_client import ControlClient
from castore.cli.output import eta, format_bytes, print_columns, print_document, print_json, printable
from castore.cli.session import Session, common_options, json_option
from castore.errors import StateError
from castore.mountinfo import read_mounts

STATUS_SECONDS: Final = 5.0
"""The daemon answers from memory."""
FOUND_SOMETHING_BAD: Final = 1


@click.command("status")
@json_option
@common_options
@click.pass_obj
def command(session: Session, as_json: bool) -> int:
    """Show the queue, the cache, mounts and failed locations.

    Exits with 1 when a stored object is known to be missing or damaged.

    Example: castore status --json
    """
    store = session.config().store
    mounts = [
        {"mountpoint": str(mount.mountpoint), "read_only": mount.read_only}
        for mount in read_mounts()
        if mount.state_dir == store.state_dir
    ]
    document: dict[str, Any] = {"state_dir": str(store.state_dir), "mounts": mounts, "daemon": None, "catalog": None}
    try:
        document["daemon"] = ControlClient(store.control_path).call("status", within=STATUS_SECONDS)
        failed_count = int(document["daemon"].get("failed_location_count", 0))
    except StateError:
        document["catalog"] = _read_catalog(store.catalog_path)
        failed_count = sum(row["count"] for row in document["catalog"]["locations"] if row["status"] == "failed")
    if as_json:
        print_json(document)
    elif document["daemon"] is not None:
        print_document(_shown(document["daemon"]))
    else:
        _print_catalog(document)
    return FOUND_SOMETHING_BAD if failed_count else 0


def _shown(daemon: dict[str, Any]) -> dict[str, Any]:
    """The daemon's document with its queue in two lines."""
    if "queue" not in daemon or "rate" not in daemon:
        return daemon
    parts = [
        f"{state} {count['file_count']}" + (f" ({format_bytes(count['size_bytes'])})" if count["size_bytes"] else "")
        for state, count in daemon["queue"].items()
    ]
    rate = daemon["rate"]
    speed = f"{rate['files_per_s']:g} files/s, {format_bytes(int(rate['bytes_per_s']))}/s"
    left = daemon.get("eta_s")
    shown = {**daemon, "queue": ", ".join(parts), "rate": speed + (eta(left) if left else "")}
    del shown["eta_s"]
    return shown


def _read_catalog(path: Path) -> dict[str, Any]:
    from castore.catalog.reader import CatalogReader

    with CatalogReader.open(path) as reader:
        package_count, size_bytes = reader.totals()
        return {
            "package_count": package_count,
            "size_bytes": size_bytes,
            "locations": [
                {"backend_id": backend_id, "status": str(status), "count": count, "size_bytes": total_bytes}
                for backend_id, status, count, total_bytes in reader.location_counts()
            ],
        }


def _print_catalog(document: dict[str, Any]) -> None:
    catalog = document["catalog"]
    click.echo(f"no daemon is running for {printable(document['state_dir'])}")
    if not document["mounts"]:
        click.echo("nothing is mounted")
    for mount in document["mounts"]:
        click.echo(f"mounted at {printable(mount['mountpoint'])}{' (read-only)' if mount['read_only'] else ''}")
    click.echo(f"packages: {catalog['package_count']}, {format_bytes(catalog['size_bytes'])}")
    if catalog["locations"]:
        click.echo()
        rows = [
            (printable(row["backend_id"]), row["status"], str(row["count"]), format_bytes(row["size_bytes"]))
            for row in catalog["locations"]
        ]
        print_columns([("BACKEND", "STATUS", "OBJECTS", "SIZE"), *rows], right=(2, 3))
