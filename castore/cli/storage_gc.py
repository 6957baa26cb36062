"""`castore storage gc`: shows what garbage collection would remove, and with `--delete` removes it. Decides nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.completing import BACKEND_OR_TYPE
from castore.cli.long_run import INTERRUPTED, LongRun, Snapshot
from castore.cli.output import format_bytes, print_columns, print_json, printable
from castore.cli.parameters import DURATION
from castore.cli.session import Session, common_options, json_option
from castore.cli.storage_choice import choose_backends
from castore.errors import StateError, StateLocked

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from castore.config import Config
    from castore.digest import BlobSummary, Digest
    from castore.verify.collect import BackendTally, CollectTally, Counted

COULD_NOT_RUN: Final = 2
TURN_SECONDS: Final = 3.0
"""How long it waits for its turn: a put that ends the deletion of a killed collection takes it for a moment."""
_POLL_SECONDS: Final = 0.1
_REFS_SHOWN: Final = 20


@click.command("gc")
@click.option(
    "--backend", "names", metavar="ID_OR_TYPE", type=BACKEND_OR_TYPE, multiple=True, help="Only there; may be repeated."
)
@click.option("--delete", "--yes", "deletes", is_flag=True, help="Do it, instead of showing what would be done.")
@click.option("--grace", type=DURATION, help="Instead of both times of grace in [retention].")
@click.option("--no-orphans", is_flag=True, help="Leave objects alone that the catalog does not know.")
@click.option(
    "--unknown-packages",
    is_flag=True,
    help="Also delete packages that are in a backend and not in this catalog. Be sure that no other catalog has them.",
)
@json_option
@common_options
@click.pass_obj
def gc(
    session: Session,
    names: tuple[str, ...],
    deletes: bool,
    grace: float | None,
    no_orphans: bool,
    unknown_packages: bool,
    as_json: bool,
) -> int:
    """Remove what nothing needs: deleted packages after their grace, blobs of no package, orphans. Dry by default.

    It works beside mounts, imports, verify and replicate. Exits with 2 when a backend could not be collected.

    Example: castore storage gc, then castore storage gc --delete
    """
    import trio

    from castore.storage.open import open_backend
    from castore.verify.collect import GarbageCollection

    config = session.config()
    retention = config.retention
    chosen = choose_backends(config, names)
    with contextlib.ExitStack() as stack:
        if deletes:
            _take_turn(config, stack)
        backends = {backend_id: open_backend(settings) for backend_id, settings in chosen.items()}
        collection = GarbageCollection(
            config.store.catalog_path,
            backends,
            workspace=config.store.workspace_path,
            puts_dir=config.store.puts_dir,
            restore_within_seconds=retention.restore_within_seconds if grace is None else grace,
            orphans_after_seconds=retention.orphans_after_seconds if grace is None else grace,
            deletes=deletes,
            unknown_packages_go=unknown_packages,
            orphans_go=not no_orphans,
            in_use=lambda: _in_use(config),
            on_forgotten=_forget_cached(config, stack),
        )
        run = LongRun("collecting", backends.values())
        trio.run(run.main, collection.run, lambda: _look(collection.tally))
    if as_json:
        print_json(_document(collection.tally, deletes, run.is_interrupted))
    else:
        _print(collection.tally, deletes)
    stopped = {key: tally.stopped for key, tally in collection.tally.backends.items() if tally.stopped}
    for backend_id, why in stopped.items():
        why = printable(why.removeprefix(f"backend {backend_id}: "))
        print(f"castore: error: backend {printable(backend_id)}: {why}", file=sys.stderr)
    if run.is_interrupted:
        print("castore: interrupted; the next one goes on", file=sys.stderr)
        return INTERRUPTED
    return COULD_NOT_RUN if stopped or collection.tally.waiting else 0


def _take_turn(config: Config, stack: contextlib.ExitStack) -> None:
    from castore.registry.deletion import gc_turn

    until = time.monotonic() + TURN_SECONDS
    while True:
        turn = gc_turn(config.store.gc_lock_path)
        if turn.__enter__():
            stack.push(turn)
            return
        turn.__exit__(None, None, None)
        if time.monotonic() > until:
            raise StateLocked(f"{config.store.state_dir}: another garbage collection runs; wait for its end")
        time.sleep(_POLL_SECONDS)


def _in_use(config: Config) -> Collection[Digest]:
    """What the daemon's readers have open; nothing when there is none. Raises CastoreError when it does not say."""
    from castore.api.control_client import ControlClient
    from castore.digest import Digest

    client = ControlClient(config.store.control_path)
    try:
        client.daemon_pid()
    except StateError:
        return ()
    return [Digest.parse(text) for text in client.call("reading")["digests"]]


def _forget_cached(config: Config, stack: contextlib.ExitStack) -> Callable[[BlobSummary], None]:
    """What the caches have of a blob goes with it. They are only caches: what fails there fails nothing."""
    from castore.blobs.cache_files import CacheFiles
    from castore.blobs.disk_cache import open_tiny_blobs

    files = CacheFiles(config.cache.dir)
    tiny = open_tiny_blobs(config) if config.store.tiny_path.exists() else None
    if tiny is not None:
        stack.callback(tiny.close)

    def forget(blob: BlobSummary) -> None:
        files.forget(blob)
        if tiny is not None and blob.size_bytes <= config.cache.tiny_bytes:
            with contextlib.suppress(StateError):
                tiny.forget(blob.digest)

    return forget


def _look(tally: CollectTally) -> Snapshot | None:
    done = sum(backend.deleted.count for backend in tally.backends.values())
    if not done:
        return None
    found = sum(backend.unneeded.size_bytes + backend.orphans.size_bytes for backend in tally.backends.values())
    return Snapshot(tally.deleted_bytes, max(found, tally.deleted_bytes), f"{done} objects deleted")


def _print(tally: CollectTally, deletes: bool) -> None:
    if tally.expired:
        shown = ", ".join(map(printable, tally.expired[:_REFS_SHOWN]))
        more = f" and {len(tally.expired) - _REFS_SHOWN} more" if len(tally.expired) > _REFS_SHOWN else ""
        count = f"{tally.purged_count} of {len(tally.expired)}" if deletes else str(len(tally.expired))
        click.echo(f"deleted packages whose time is over: {count} ({format_bytes(tally.expired_bytes)}): {shown}{more}")
    header = ("BACKEND", "UNNEEDED", "ORPHANS", "YOUNG", "IN USE", "DELETED")
    rows = [(printable(key), *map(_counted, _columns(one))) for key, one in tally.backends.items()]
    print_columns([header, *rows])
    if tally.waiting:
        click.echo(f"not touched until their manifests can be deleted everywhere: {', '.join(tally.waiting)}")
    if tally.left_count:
        click.echo(f"{tally.left_count} objects are left to the next garbage collection")
    if not deletes:
        what = "the blobs that only those packages need, too" if tally.expired else "it"
        click.echo(
            f"nothing is deleted; with --delete {what} would be"
            if tally.expired
            else "nothing is deleted: give --delete"
        )


def _columns(one: BackendTally) -> tuple[Counted, ...]:
    return one.unneeded, one.orphans, one.young, one.in_use, one.deleted


def _counted(counted: Counted) -> str:
    return f"{counted.count} ({format_bytes(counted.size_bytes)})" if counted.count else "-"


def _document(tally: CollectTally, deletes: bool, is_interrupted: bool) -> dict[str, Any]:
    return {
        "deletes": deletes,
        "expired_packages": tally.expired,
        "purged_count": tally.purged_count,
        "waiting_packages": tally.waiting,
        "left_count": tally.left_count,
        "interrupted": is_interrupted,
        "backends": [
            {
                "backend_id": backend_id,
                **{
                    f"{name}_{unit}": getattr(counted, unit)
                    for name, counted in zip(
                        ("unneeded", "orphan", "young", "in_use", "deleted"), _columns(one), strict=True
                    )
                    for unit in ("count", "size_bytes")
                },
                "unknown_package_count": one.unknown_packages,
                "stopped": one.stopped,
            }
            for backend_id, one in tally.backends.items()
        ],
    }
