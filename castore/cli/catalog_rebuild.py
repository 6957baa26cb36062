"""`castore catalog rebuild`: makes a catalog from what a backend has, shows what it refuses, and sums up."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.completing import BACKEND
from castore.cli.long_run import INTERRUPTED, LongRun, Snapshot
from castore.cli.output import json_line, printable
from castore.cli.session import Session, common_options
from castore.errors import ConfigError, StateError, StateLocked

if TYPE_CHECKING:
    from castore.catalog.building import CatalogBuilder
    from castore.config import BackendSettings, Config
    from castore.registry.rebuild import Outcome, RebuildTally

FOUND_SOMETHING_BAD: Final = 1
COULD_NOT_RUN: Final = 2


@click.command("rebuild")
@click.option(
    "--backend", "backend_id", metavar="ID", type=BACKEND, required=True, help="The backend whose manifests are read."
)
@click.option("--add", is_flag=True, help="Add what a catalog lacks that has packages already; the rest of it stays.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document for each manifest, and one that sums up.")
@common_options
@click.pass_obj
def rebuild(session: Session, backend_id: str, add: bool, as_json: bool) -> int:
    """Make the catalog anew from the manifests that a backend has, after the state directory was lost.

    Each manifest is compared with its digest and refused, by name, when it is not one that castore writes; the others
    go on. Objects are listed, not read: `castore storage verify` does that. For a store of several backends, run it for
    each, with --add from the second one on. Interrupted, it goes on when it is run again.

    Exits with 1 when something was refused or an object is missing, and with 2 when the backend could not be read.

    Example: castore catalog rebuild --backend rgw
    """
    import trio

    from castore.registry.deletion import gc_turn
    from castore.state_lock import take_lock

    config = session.config()
    settings = config.backends.get(backend_id)
    if settings is None:
        raise ConfigError(
            f"--backend {backend_id}: no such backend is configured; there are {', '.join(config.backends)}"
        )
    _make_state_dir(config.store.state_dir)
    lock = take_lock(config.store.run_dir / "lock", config.store.state_dir, holder="rebuild")
    try:
        path, replaces = _choose_catalog(config.store.catalog_path, add)
        run = _Run(config, settings, as_json)
        with gc_turn(config.store.gc_lock_path) as is_ours:
            if not is_ours:
                raise StateLocked(f"{config.store.state_dir}: a garbage collection runs; wait for its end")
            with _building(config, path) as ingest:
                trio.run(run.main, ingest, replaces)
        if run.is_whole and path != config.store.catalog_path:
            _put_in_place(path, config.store.catalog_path)
        run.sum_up()
    finally:
        os.close(lock)
    return run.exit_code()


def _make_state_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StateError(f"{path}: cannot be created: {exc.strerror}") from exc


def _choose_catalog(path: Path, add: bool) -> tuple[Path, bool]:
    """The file to build in, and whether all that it has comes from manifests."""
    from castore.catalog.building import row_count
    from castore.catalog.connection import create_catalog

    if path.exists():
        count = row_count(path)
        if count and not add:
            raise StateError(
                f"{path}: has {count} packages, names or blobs already, and a rebuild overwrites nothing; "
                "move it away, or add what it lacks with --add"
            )
        return path, not count
    if add:
        raise StateError(f"{path}: there is no catalog to add to; leave out --add")
    building = path.with_name(f"{path.name}.rebuilding")
    create_catalog(building)
    return building, True


def _put_in_place(path: Path, target: Path) -> None:
    """A catalog that is whole, and that nobody has open, gets its name. What an older one left is not its own."""
    for suffix in ("-wal", "-shm"):
        target.with_name(f"{target.name}{suffix}").unlink(missing_ok=True)
    path.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class _Ingest:
    """The open builder, and what a workspace that survived says."""

    builder: CatalogBuilder
    unpublished: set[bytes] = field(default_factory=set)
    names: dict[str, tuple[int, int]] = field(default_factory=dict)


@contextmanager
def _building(config: Config, path: Path) -> Iterator[_Ingest]:
    from castore.catalog.building import CatalogBuilder
    from castore.catalog.workspace import WorkspaceStore

    found: dict[str, Any] = {}
    first_inode = 0
    if config.store.workspace_path.exists():
        store = WorkspaceStore(config.store.workspace_path, read_only=True)
        try:
            found["unpublished"] = {note.manifest for note in store.publishings()}
            found["names"] = store.all_names()
            first_inode = store.largest_number() + 1
        finally:
            store.close()
    builder = CatalogBuilder(path, first_inode=first_inode)
    try:
        yield _Ingest(builder, **found)
    except BaseException:
        builder.abandon()
        raise
    builder.close()


class _Run:
    """One rebuild on the command line."""

    def __init__(self, config: Config, settings: BackendSettings, as_json: bool) -> None:
        self._config = config
        self._settings = settings
        self._as_json = as_json
        self._started = time.monotonic()
        self._tally: RebuildTally
        self._long: LongRun

    async def main(self, ingest: _Ingest, replaces: bool) -> None:
        """The rebuild, until it is done or interrupted. Raises StateError, and OSError of the output."""
        from castore.registry.rebuild import Rebuild
        from castore.storage.open import open_backend

        backend = open_backend(self._settings)
        folder = self._config.store.state_dir / "rebuild"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        run = Rebuild(
            ingest.builder,
            backend,
            folder=folder,
            on_outcome=self._tell,
            replaces=replaces,
            unpublished=ingest.unpublished,
            names=ingest.names,
        )
        self._tally = run.tally
        self._long = LongRun(f"rebuilding from {printable(backend.backend_id)}", (backend,))
        try:
            await self._long.main(run.run, self._look)
        finally:
            shutil.rmtree(folder)

    @property
    def is_whole(self) -> bool:
        """Whether every manifest was read, and every object seen."""
        return not (self._long.is_interrupted or self._tally.stopped or self._tally.counts["unreadable"])

    def _look(self) -> Snapshot | None:
        tally = self._tally
        if tally.manifest_count is None:
            return None
        done = sum(tally.counts.values())
        return Snapshot(
            done_bytes=tally.done_bytes,
            total_bytes=max(tally.manifest_bytes, tally.done_bytes),
            files=f"{done} of {tally.manifest_count} packages, {tally.counts['refused']} refused, "
            f"{tally.object_count} objects seen",
        )

    # results

    def _tell(self, outcome: Outcome) -> None:
        if self._as_json:
            self._long.say(json_line(self._document(outcome)))
        elif outcome.why:
            named = f"{outcome.digest} ({outcome.ref})" if outcome.ref else str(outcome.digest)
            self._long.say(f"{outcome.result}: {printable(named)}: {printable(outcome.why)}")

    def _document(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "backend_id": self._settings.backend_id,
            "manifest_digest": str(outcome.digest),
            "package": outcome.ref,
            "result": str(outcome.result),
            "why": outcome.why,
        }

    def exit_code(self) -> int:
        """130 when it was interrupted, else 2, 1 or 0."""
        tally = self._tally
        if self._long.is_interrupted:
            return INTERRUPTED
        if not self.is_whole:
            return COULD_NOT_RUN
        return FOUND_SOMETHING_BAD if tally.counts["refused"] or tally.counts["skipped"] or tally.failed else 0

    def sum_up(self) -> None:
        """The last words: numbers to standard output, what kept it from its end to standard error."""
        tally, seconds = self._tally, time.monotonic() - self._started
        if self._as_json:
            click.echo(json_line(self._summary(seconds)))
        else:
            counts = ", ".join(f"{result}: {count}" for result, count in tally.counts.items())
            click.echo(f"{counts}; {tally.entry_count} entries in {seconds:.1f} s")
            click.echo(f"objects of these packages: {tally.object_count}; others there: {tally.unknown_count}")
            for reason, count in sorted(tally.failed.items()):
                click.echo(f"failed: {reason}: {count} objects; `castore storage verify` names the packages")
        if tally.stopped:
            print(f"castore: error: given up: {printable(tally.stopped)}", file=sys.stderr)
        if not self.is_whole:
            print("castore: the catalog is not finished; the same command goes on", file=sys.stderr)

    def _summary(self, seconds: float) -> dict[str, Any]:
        tally = self._tally
        return {
            "summary": True,
            "backend_id": self._settings.backend_id,
            "manifest_count": tally.manifest_count,
            **{str(result): count for result, count in tally.counts.items()},
            "entry_count": tally.entry_count,
            "object_count": tally.object_count,
            "unknown_object_count": tally.unknown_count,
            "failed_locations": tally.failed,
            "given_up": tally.stopped,
            "duration_s": round(seconds, 3),
            "interrupted": self._long.is_interrupted,
            "exit_code": self.exit_code(),
        }
