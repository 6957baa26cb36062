"""`castore storage repair`: runs a repair, shows what it mends and what it cannot as it comes, and sums up."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from castore.cli.long_run import INTERRUPTED, LongRun, Snapshot
from castore.cli.output import format_bytes, json_line, printable, text_fields
from castore.cli.session import Session, common_options
from castore.cli.storage_choice import backend_option, choose_backends
from castore.cli.storage_verify import COULD_NOT_RUN, FOUND_SOMETHING_BAD, PATHS_NAMED
from castore.errors import StateError

if TYPE_CHECKING:
    from castore.blobs.disk_cache import DiskCache
    from castore.catalog.reader import CatalogReader
    from castore.config import Config
    from castore.verify.repair import RepairOutcome, RepairTally


@click.command("repair")
@backend_option
@click.option(
    "--from",
    "directory",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Also look for the lost bytes in the files below DIR, whatever they are called.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document for each location, and one that sums up.")
@common_options
@click.pass_obj
def repair(session: Session, names: tuple[str, ...], directory: Path | None, as_json: bool) -> int:
    """Put the right bytes again where an object is missing or wrong, as far as verify and reads have found.

    They are taken from a good copy in another backend, else from the disk cache, else from DIR; checked as a whole
    before they are put, and read back afterwards. What turns out to be good is not touched. Exits with 1 when something
    has no good copy, and with 2 when a backend failed.

    Example: castore storage repair
    """
    import trio

    from castore.catalog.reader import CatalogReader

    config = session.config()
    targets = tuple(choose_backends(config, names))
    with CatalogReader.open(config.store.catalog_path) as reader:
        run = _Run(config, targets, directory, reader, as_json)
        trio.run(run.main)
        run.sum_up()
    return run.exit_code()


class _Run:
    """One repair on the command line."""

    def __init__(
        self, config: Config, targets: tuple[str, ...], directory: Path | None, reader: CatalogReader, as_json: bool
    ) -> None:
        self._config = config
        self._targets = targets
        self._directory = directory
        self._reader = reader
        self._as_json = as_json
        self._started = time.monotonic()
        self._tally: RepairTally
        self._long: LongRun

    async def main(self) -> None:
        """The repair, until it is done or interrupted. Raises StateError, and OSError of the output."""
        from castore.storage.open import open_backend
        from castore.verify.repair import Repair

        backends = {backend_id: open_backend(settings) for backend_id, settings in self._config.backends.items()}
        cache = self._open_cache()
        run = Repair(
            self._config.store.catalog_path,
            backends,
            targets=self._targets,
            folder=self._config.store.state_dir,
            puts_dir=self._config.store.puts_dir,
            cache=cache,
            directory=self._directory,
            on_outcome=self._tell,
        )
        self._tally = run.tally
        self._long = LongRun(f"repairing {printable(', '.join(self._targets))}", backends.values())
        try:
            await self._long.main(run.run, self._look)
        finally:
            if cache is not None:
                cache.close()

    def _open_cache(self) -> DiskCache | None:
        """The disk cache, if there is one and it can be used: a repair does without it."""
        from castore.blobs.disk_cache import open_disk_cache

        if not self._config.cache.dir.exists():
            return None
        try:
            return open_disk_cache(self._config)
        except StateError as exc:
            print(f"castore: {printable(str(exc))}; going on without the disk cache", file=sys.stderr)
            return None

    def _look(self) -> Snapshot | None:
        tally = self._tally
        if not tally.total_count:
            return None
        return Snapshot(
            done_bytes=min(tally.done_bytes, tally.total_bytes),
            total_bytes=tally.total_bytes,
            files=f"{tally.done_count} of {tally.total_count} objects, {tally.counts['repaired']} repaired",
        )

    # results

    def _tell(self, outcome: RepairOutcome) -> None:
        if self._as_json:
            self._long.say(json_line(self._document(outcome)))
            return
        row = outcome.row
        what = f"{row.size_bytes} bytes of {row.digest} in backend {printable(row.backend_id)}"
        if outcome.result == "repaired" and outcome.copy is not None:
            where = {"cache": "the disk cache", "directory": "the directory"}.get(
                outcome.copy.kind, f"backend {printable(outcome.copy.backend_id or '')}"
            )
            self._long.say(f"repaired: {what}, from {where}")
        elif outcome.result == "verified":
            self._long.say(f"good again: {what}")
        elif outcome.result == "not_repaired":
            self._long.say(f"not repaired: {what}: {printable(outcome.error)}")
        elif outcome.result == "no_copy":
            self._long.say(f"no good copy: {what}")
            uses, count = self._reader.paths_of(row.blob_id, PATHS_NAMED)
            for use in uses:
                self._long.say(f"  {use.ref}: {printable(use.path) or 'its manifest'}")
            if count > len(uses):
                self._long.say(f"  and {count - len(uses)} more")
            if not uses:
                self._long.say("  no package uses it")

    def _document(self, outcome: RepairOutcome) -> dict[str, Any]:
        row, copy = outcome.row, outcome.copy
        document = {
            "backend_id": row.backend_id,
            "digest": str(row.digest),
            "size_bytes": row.size_bytes,
            "result": str(outcome.result),
            "reason": str(outcome.reason) if outcome.reason else None,
            "source": copy.kind if copy else None,
            "source_backend_id": copy.backend_id if copy else None,
            "error": outcome.error,
            "packages": (outcome.event or {}).get("packages", []),
            "duration_ms": outcome.duration_ms,
        }
        if outcome.result == "no_copy":
            uses, count = self._reader.paths_of(row.blob_id, PATHS_NAMED)
            document["paths"] = [{"package": use.ref, **text_fields("path", use.path)} for use in uses]
            document["path_count"] = count
        return document

    def exit_code(self) -> int:
        """130 when it was interrupted, else 2, 1 or 0."""
        tally = self._tally
        if self._long.is_interrupted:
            return INTERRUPTED
        if tally.stopped or tally.counts["not_repaired"]:
            return COULD_NOT_RUN
        return FOUND_SOMETHING_BAD if tally.counts["no_copy"] else 0

    def sum_up(self) -> None:
        """The last words: numbers to standard output, what kept it from its end to standard error."""
        tally, seconds = self._tally, time.monotonic() - self._started
        if self._as_json:
            click.echo(json_line(self._summary(seconds)))
        else:
            click.echo(
                f"looked at {tally.done_count} of {tally.total_count} failed locations, "
                f"{format_bytes(tally.done_bytes)} in {seconds:.1f} s"
            )
            counts = (f"{result.replace('_', ' ')}: {count}" for result, count in tally.counts.items())
            click.echo(", ".join(counts))
        for line in tally.unreadable:
            print(f"castore: not looked at: {printable(line)}", file=sys.stderr)
        if tally.unreadable_count > len(tally.unreadable):
            print(f"castore: and {tally.unreadable_count - len(tally.unreadable)} more files", file=sys.stderr)
        for backend_id, error in tally.stopped.items():
            why = printable(error.removeprefix(f"backend {backend_id}: "))
            print(f"castore: error: backend {printable(backend_id)} is given up: {why}", file=sys.stderr)
        if self._long.is_interrupted:
            print(
                f"castore: interrupted: {tally.counts['repaired']} locations are repaired; the same command goes on",
                file=sys.stderr,
            )

    def _summary(self, seconds: float) -> dict[str, Any]:
        tally = self._tally
        return {
            "summary": True,
            "backends": list(self._targets),
            "location_count": tally.total_count,
            "looked_at": tally.done_count,
            **tally.counts,
            "unreadable_file_count": tally.unreadable_count,
            "duration_s": round(seconds, 3),
            "given_up": [{"backend_id": backend_id, "error": error} for backend_id, error in tally.stopped.items()],
            "interrupted": self._long.is_interrupted,
            "exit_code": self.exit_code(),
        }
