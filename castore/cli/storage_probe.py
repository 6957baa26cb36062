"""`castore storage probe`: has backends asked what they do and enforce, shows it, and keeps it. Asks nothing itself."""

from __future__ import annotations

import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.output import print_columns, print_json, printable
from castore.cli.session import Session, common_options, json_option
from castore.cli.storage_choice import backend_option, choose_backends

if TYPE_CHECKING:
    from castore.catalog.records import StoredProbe
    from castore.catalog.writer import CatalogWriter, Transaction
    from castore.config import BackendSettings

FOUND_SOMETHING_BAD: Final = 1
COULD_NOT_RUN: Final = 2
_INTERRUPTED: Final = 128 + 2

_RESULTS: Final = {"pass": "good", "fail": "FAIL", "unknown": "unknown", "info": "-"}


@click.command("probe")
@backend_option
@json_option
@common_options
@click.pass_obj
def probe(session: Session, names: tuple[str, ...], as_json: bool) -> int:
    """Ask backends what they do and enforce, with deliberately bad values, and keep the answers for health.

    Works in a place of its own beside the objects, touches none of them, and leaves nothing. Exits with 1 when
    something that castore relies on is not given, and with 2 when that could not be found out.

    Example: castore storage probe --backend rgw
    """
    import trio

    from castore.catalog.writer import CatalogWriter
    from castore.registry.probing import consequences, not_given

    config = session.config()
    chosen = choose_backends(config, names)
    writer = CatalogWriter(config.store.catalog_path)
    try:
        probes, errors, interrupted = trio.run(_until_interrupted, chosen, writer)
    finally:
        writer.close()
    if as_json:
        print_json({"backends": [_document(probes[name]) for name in chosen if name in probes], "errors": errors})
    else:
        for index, backend_id in enumerate(name for name in chosen if name in probes):
            if index:
                click.echo()
            _print(probes[backend_id], consequences(probes[backend_id]))
    for error in errors.values():
        print(f"castore: error: {printable(error)}", file=sys.stderr)
    if interrupted:
        print("castore: interrupted: what the probe made is removed, and its findings are not kept", file=sys.stderr)
        return _INTERRUPTED
    if any(not_given(found, "fail") for found in probes.values()):
        return FOUND_SOMETHING_BAD
    return COULD_NOT_RUN if errors or any(not_given(found, "unknown") for found in probes.values()) else 0


async def _until_interrupted(
    backends: dict[str, BackendSettings], writer: CatalogWriter
) -> tuple[dict[str, StoredProbe], dict[str, str], bool]:
    """What each backend was found to do; what kept others from being asked; whether SIGINT or SIGTERM ended it."""
    import trio

    probes: dict[str, StoredProbe] = {}
    errors: dict[str, str] = {}
    interrupted = False
    error: Exception | None = None
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def cancel() -> None:
                nonlocal interrupted
                async for _ in signals:
                    interrupted = True
                    nursery.cancel_scope.cancel()

            nursery.start_soon(cancel)
            try:
                await _probe_all(backends, writer, probes, errors)
            except Exception as exc:
                # Raised outside, so that it is not part of a group.
                error = exc
            nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    return probes, errors, interrupted


async def _probe_all(
    backends: dict[str, BackendSettings],
    writer: CatalogWriter,
    probes: dict[str, StoredProbe],
    errors: dict[str, str],
) -> None:
    """Probe one after the other, and keep what was found as soon as it is known."""
    from castore.errors import ConfigError, StorageError
    from castore.registry.probing import stored_probe
    from castore.storage.open import probe_backend

    for backend_id, settings in backends.items():
        try:
            found = stored_probe(backend_id, await probe_backend(settings))
        except (StorageError, ConfigError) as exc:
            errors[backend_id] = str(exc)
            continue
        probes[backend_id] = found
        await writer.run(partial(_keep, found))


def _keep(probe: StoredProbe, transaction: Transaction) -> None:
    transaction.set_probe(probe)


def _document(probe: StoredProbe) -> dict[str, Any]:
    return {
        "backend_id": probe.backend_id,
        "server": probe.server,
        "probed_at_ns": probe.probed_at_ns,
        "findings": list(probe.findings),
    }


def _print(probe: StoredProbe, consequences: list[str]) -> None:
    said = f": {printable(probe.server)}" if probe.server else ""
    click.echo(f"backend {printable(probe.backend_id)}{said}")
    rows = [
        (
            _RESULTS[finding["severity"]],
            finding["name"],
            finding["enforced"],
            printable(finding["question"]),
            printable(finding["expected"]),
            printable(finding["answer"]),
        )
        for finding in probe.findings
    ]
    print_columns([("RESULT", "NAME", "GIVEN", "QUESTION", "EXPECTED", "ANSWER"), *rows])
    for line in consequences:
        click.echo(f"! {printable(line)}")
    counts = {
        severity: sum(finding["severity"] == severity for finding in probe.findings)
        for severity in ("pass", "fail", "unknown")
    }
    click.echo(
        f"given: {counts['pass']}, relied on and not given: {counts['fail']}, not found out: {counts['unknown']}"
    )
