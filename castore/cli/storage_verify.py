"""`castore storage verify`: runs a scrub, shows what it finds as it comes, and sums up. Judges nothing itself."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.long_run import INTERRUPTED, LongRun, Snapshot
from castore.cli.output import format_bytes, json_line, printable, text_fields
from castore.cli.session import Session, common_options
from castore.cli.storage_choice import backend_option, choice_options, choose_backends, limit_options, make_choice
from castore.cli.storage_orphans import list_orphans

if TYPE_CHECKING:
    from castore.catalog.reader import CatalogReader
    from castore.catalog.scrub import Choice, LocationRow
    from castore.config import Config
    from castore.storage.spi import StorageBackend
    from castore.verify.limits import Limits
    from castore.verify.outcomes import Outcome, Tally
    from castore.verify.pace import Pace
    from castore.verify.reading import Reading
    from castore.verify.shard import Shard

FOUND_SOMETHING_BAD: Final = 1
COULD_NOT_RUN: Final = 2

PATHS_NAMED: Final = 20
"""Paths listed for each failed location; how many more there are is said."""


@click.command("verify")
@backend_option
@choice_options
@limit_options
@click.option("--orphans", is_flag=True, help="Read nothing: list the objects that the catalog does not know.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document for each location, and one that sums up.")
@common_options
@click.pass_obj
def verify(
    session: Session,
    /,
    names: tuple[str, ...],
    time_limit: float | None,
    max_bytes: int | None,
    rate: int | None,
    orphans: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Re-read every stored object, or what is chosen, compare its digest, and record the result.

    What was never verified comes first, then what was verified longest ago: so a run that ends early is gone on with
    by the next one. Exits with 1 when an object is missing or wrong, and with 2 when one could not be reached.

    Example: castore storage verify --backend s3 --older-than 30d
    """
    import trio

    from castore.catalog.scrub import ScrubReader
    from castore.storage.open import open_backend
    from castore.verify.limits import Limits
    from castore.verify.pace import Pace

    config = session.config()
    chosen = choose_backends(config, names)
    if orphans:
        if any((time_limit, max_bytes, rate, *options.values())):
            raise click.UsageError("--orphans lists whole backends: it takes no choice and no limit")
        return list_orphans(config, {key: open_backend(settings) for key, settings in chosen.items()}, as_json)
    with ScrubReader(config.store.catalog_path) as reader:
        choice = make_choice(reader, **options)
        backends = {backend_id: open_backend(settings) for backend_id, settings in chosen.items()}
        limits = Limits(seconds=time_limit or 0, max_bytes=max_bytes or 0)
        run = _Run(config, backends, choice, limits, options["shard"], reader, as_json)
        trio.run(run.main, Pace(rate or 0))
        run.sum_up()
    return run.exit_code()


class _Run:
    """One scrub on the command line."""

    def __init__(
        self,
        config: Config,
        backends: dict[str, StorageBackend],
        choice: Choice,
        limits: Limits,
        shard: Shard | None,
        reader: CatalogReader,
        as_json: bool,
    ) -> None:
        self._config = config
        self._backends = backends
        self._choice = choice
        self._limits = limits
        self._shard = shard
        self._reader = reader
        self._as_json = as_json
        self._long = LongRun(f"verifying {printable(', '.join(backends))}", backends.values())
        self._started: float
        self._tally: Tally

    async def main(self, pace: Pace) -> None:
        """The scrub, with progress, until it is done or interrupted. Raises StateError, and OSError of the output."""
        from castore.verify.scrub import Scrub

        self._started = time.monotonic()
        scrub = Scrub(
            self._config.store.catalog_path,
            self._backends,
            choice=self._choice,
            limits=self._limits,
            pace=pace,
            on_outcome=self._tell,
        )
        self._tally = scrub.tally
        await self._long.main(scrub.run, self._look)

    def _look(self) -> Snapshot | None:
        tally = self._tally
        if not tally.total_count or tally.total_bytes is None:
            return None
        return Snapshot(
            done_bytes=min(tally.read_bytes, tally.total_bytes),
            total_bytes=tally.total_bytes,
            files=f"{tally.done_count} of {tally.total_count} objects, {tally.counts['failed']} failed",
        )

    # results

    def _tell(self, outcome: Outcome) -> None:
        if self._as_json:
            self._long.say(json_line(self._document(outcome)))
        elif outcome.verdict == "unreachable":
            self._long.say(f"unreachable: {printable(outcome.error)}")
        elif outcome.verdict == "failed":
            for line in failure_lines(self._reader, outcome.row, outcome.reading):
                self._long.say(line)

    def _document(self, outcome: Outcome) -> dict[str, Any]:
        row, reading, event = outcome.row, outcome.reading, outcome.event or {}
        document = {
            "backend_id": row.backend_id,
            "digest": str(row.digest),
            "size_bytes": row.size_bytes,
            "status": str(outcome.verdict),
            "reason": event.get("reason"),
            "observed_digest": event.get("observed_digest"),
            "observed_size_bytes": reading.observed_size_bytes if reading else None,
            "error": outcome.error,
            "packages": event.get("packages", []),
            "duration_ms": outcome.duration_ms,
        }
        if outcome.verdict == "failed":
            uses, count = self._reader.paths_of(row.blob_id, PATHS_NAMED)
            document["paths"] = [{"package": use.ref, **text_fields("path", use.path)} for use in uses]
            document["path_count"] = count
        return document

    def exit_code(self) -> int:
        """130 when it was interrupted, else 2, 1 or 0."""
        counts = self._tally.counts
        if self._long.is_interrupted:
            return INTERRUPTED
        if self._tally.stopped or counts["unreachable"]:
            return COULD_NOT_RUN
        return FOUND_SOMETHING_BAD if counts["failed"] else 0

    def sum_up(self) -> None:
        """The last words: numbers to standard output, what kept it from its end to standard error."""
        tally, seconds = self._tally, time.monotonic() - self._started
        if self._as_json:
            click.echo(json_line(self._summary(seconds)))
        else:
            rate = format_bytes(int(tally.read_bytes / max(seconds, 0.001)))
            total = "" if tally.total_count is None else f" of {tally.total_count}"
            click.echo(
                f"looked at {tally.done_count}{total} locations, {format_bytes(tally.read_bytes)} "
                f"in {seconds:.1f} s ({rate}/s)"
            )
            click.echo(", ".join(f"{verdict}: {count}" for verdict, count in tally.counts.items()))
            if self._limits.reached:
                click.echo(f"ended by its {self._limits.reached}; the next run goes on with what was not looked at")
        for backend_id, error in tally.stopped.items():
            why = printable(error.removeprefix(f"backend {backend_id}: "))
            print(f"castore: error: backend {printable(backend_id)} is given up: {why}", file=sys.stderr)
        if self._long.is_interrupted:
            print(f"castore: interrupted: what was found of {tally.done_count} locations is recorded", file=sys.stderr)

    def _summary(self, seconds: float) -> dict[str, Any]:
        tally = self._tally
        return {
            "summary": True,
            "backends": list(self._backends),
            "shard": f"{self._shard.number}/{self._shard.count}" if self._shard else None,
            "location_count": tally.total_count,
            "looked_at": tally.done_count,
            **{str(verdict): count for verdict, count in tally.counts.items()},
            "read_bytes": tally.read_bytes,
            "duration_s": round(seconds, 3),
            "given_up": [{"backend_id": backend_id, "error": error} for backend_id, error in tally.stopped.items()],
            "ended_by": self._limits.reached or None,
            "interrupted": self._long.is_interrupted,
            "exit_code": self.exit_code(),
        }


def failure_lines(reader: CatalogReader, row: LocationRow, reading: Reading | None) -> list[str]:
    """What is wrong with an object that was read, and the paths that it touches."""
    assert reading is not None
    found = ""
    if reading.observed_digest is not None:
        found = f"; found {reading.observed_size_bytes} bytes of {reading.observed_digest}"
    backend_id = printable(row.backend_id)
    lines = [f"failed: {reading.reason} in backend {backend_id}: {row.size_bytes} bytes of {row.digest}{found}"]
    uses, count = reader.paths_of(row.blob_id, PATHS_NAMED)
    lines += [f"  {use.ref}: {printable(use.path) or 'its manifest'}" for use in uses]
    if count > len(uses):
        lines.append(f"  and {count - len(uses)} more")
    if not uses:
        lines.append("  no package uses it")
    return lines
