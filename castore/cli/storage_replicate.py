"""`castore storage replicate`: runs a replication, shows what could not be copied as it comes, and sums up."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from castore.cli.completing import BACKEND, REF
from castore.cli.long_run import INTERRUPTED, LongRun, Snapshot
from castore.cli.output import format_bytes, json_line, printable
from castore.cli.session import Session, common_options
from castore.cli.storage_verify import COULD_NOT_RUN, FOUND_SOMETHING_BAD, failure_lines
from castore.errors import ConfigError, NotFound

if TYPE_CHECKING:
    from castore.catalog.copying import CopyReader, PackageCopy
    from castore.catalog.reader import CatalogReader
    from castore.config import BackendSettings, Config
    from castore.verify.replicate import CopyOutcome, CopyTally


@click.command("replicate")
@click.option("--from", "source_id", metavar="ID", type=BACKEND, required=True, help="The backend to copy from.")
@click.option("--to", "target_id", metavar="ID", type=BACKEND, required=True, help="The backend to copy to.")
@click.option(
    "--package", "ref", metavar="REF", type=REF, help="Only what this package needs.  [default: all packages]"
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document for each object, and one that sums up.")
@common_options
@click.pass_obj
def replicate(session: Session, source_id: str, target_id: str, ref: str | None, as_json: bool) -> int:
    """Copy what packages need from one backend to another, each object checked as a whole.

    What is there already is left out, so that a run which was interrupted goes on with the next one. Exits with 1 when
    an object is missing or wrong or some package is not whole in the new backend, and with 2 when a backend failed.

    Example: castore storage replicate --from local --to rgw
    """
    import trio

    from castore.catalog.copying import CopyReader

    config = session.config()
    source, target = (_backend(config, *chosen) for chosen in (("--from", source_id), ("--to", target_id)))
    if source_id == target_id:
        raise ConfigError(f"--to {target_id}: expected another backend than that of --from")
    with CopyReader(config.store.catalog_path) as reader:
        run = _Run(config, source, target, _package(reader, ref), reader, as_json)
        trio.run(run.main)
        run.sum_up()
    return run.exit_code()


def _backend(config: Config, option: str, backend_id: str) -> BackendSettings:
    settings = config.backends.get(backend_id)
    if settings is None:
        raise ConfigError(
            f"{option} {backend_id}: no such backend is configured; there are {', '.join(config.backends)}"
        )
    return settings


def _package(reader: CopyReader, ref: str | None) -> PackageCopy | None:
    from castore.registry.names import parse_ref

    if ref is None:
        return None
    package = reader.package_copy(*parse_ref(ref, allow_latest=True))
    if package is None:
        raise NotFound(f"{ref}: no such package is published")
    return package


class _Run:
    """One replication on the command line."""

    def __init__(
        self,
        config: Config,
        source: BackendSettings,
        target: BackendSettings,
        package: PackageCopy | None,
        reader: CatalogReader,
        as_json: bool,
    ) -> None:
        self._config = config
        self._source = source
        self._target = target
        self._package = package
        self._reader = reader
        self._as_json = as_json
        self._started = time.monotonic()
        self._tally: CopyTally
        self._long: LongRun

    async def main(self) -> None:
        """The replication, until it is done or interrupted. Raises StateError, and OSError of the output."""
        from castore.storage.open import open_backend
        from castore.verify.replicate import Replication

        source, target = open_backend(self._source), open_backend(self._target)
        run = Replication(
            self._config.store.catalog_path,
            source=source,
            target=target,
            folder=self._config.store.state_dir,
            puts_dir=self._config.store.puts_dir,
            package=self._package,
            on_outcome=self._tell,
        )
        self._tally = run.tally
        self._long = LongRun(f"copying to {printable(target.backend_id)}", (source, target))
        await self._long.main(run.run, self._look)

    def _look(self) -> Snapshot | None:
        tally = self._tally
        if not tally.total_count or tally.total_bytes is None:
            return None
        return Snapshot(
            done_bytes=min(tally.done_bytes, tally.total_bytes),
            total_bytes=tally.total_bytes,
            files=f"{tally.done_count} of {tally.total_count} objects, {tally.counts['failed']} failed",
        )

    # results

    def _tell(self, outcome: CopyOutcome) -> None:
        if self._as_json:
            self._long.say(json_line(self._document(outcome)))
        elif outcome.result == "not_copied":
            self._long.say(f"not copied: {printable(outcome.error)}")
        elif outcome.result == "failed":
            for line in failure_lines(self._reader, outcome.row, outcome.reading):
                self._long.say(line)

    def _document(self, outcome: CopyOutcome) -> dict[str, Any]:
        return {
            "from": outcome.row.backend_id,
            "to": self._target.backend_id,
            "digest": str(outcome.row.digest),
            "size_bytes": outcome.row.size_bytes,
            "result": str(outcome.result),
            "reason": str(outcome.reason) if outcome.result == "failed" else None,
            "error": outcome.error,
            "packages": (outcome.event or {}).get("packages", []),
            "duration_ms": outcome.duration_ms,
        }

    def exit_code(self) -> int:
        """130 when it was interrupted, else 2, 1 or 0."""
        tally = self._tally
        if self._long.is_interrupted:
            return INTERRUPTED
        if tally.stopped or tally.counts["not_copied"]:
            return COULD_NOT_RUN
        return FOUND_SOMETHING_BAD if tally.counts["failed"] or tally.incomplete_count else 0

    def sum_up(self) -> None:
        """The last words: numbers to standard output, what kept it from its end to standard error."""
        tally, seconds = self._tally, time.monotonic() - self._started
        if self._as_json:
            click.echo(json_line(self._summary(seconds)))
        else:
            self._print_numbers(seconds)
        if tally.stopped:
            print(f"castore: error: given up: {printable(tally.stopped)}", file=sys.stderr)
        if self._long.is_interrupted:
            print(
                f"castore: interrupted: {tally.counts['copied']} objects are copied; the same command goes on",
                file=sys.stderr,
            )

    def _print_numbers(self, seconds: float) -> None:
        tally = self._tally
        target_id = printable(self._target.backend_id)
        rate = format_bytes(int(tally.copied_bytes / max(seconds, 0.001)))
        total = "" if tally.total_count is None else f" of {tally.total_count}"
        click.echo(
            f"copied {tally.counts['copied']}{total} objects to {target_id}, {format_bytes(tally.copied_bytes)} "
            f"in {seconds:.1f} s ({rate}/s)"
        )
        counts = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in tally.counts.items())
        click.echo(f"{counts}; packages now whole there: {tally.package_count}")
        for package_ref, lacking in tally.incomplete:
            click.echo(f"not whole in {target_id}: {package_ref} lacks {lacking} of its objects there")
        if tally.incomplete_count > len(tally.incomplete):
            click.echo(f"and {tally.incomplete_count - len(tally.incomplete)} more packages")

    def _summary(self, seconds: float) -> dict[str, Any]:
        tally = self._tally
        return {
            "summary": True,
            "from": self._source.backend_id,
            "to": self._target.backend_id,
            "package": self._package.ref if self._package else None,
            "object_count": tally.total_count,
            "size_bytes": tally.total_bytes,
            **tally.counts,
            "copied_bytes": tally.copied_bytes,
            "package_count": tally.package_count,
            "incomplete_count": tally.incomplete_count,
            "incomplete": [{"package": ref, "object_count": lacking} for ref, lacking in tally.incomplete],
            "given_up": tally.stopped,
            "duration_s": round(seconds, 3),
            "interrupted": self._long.is_interrupted,
            "exit_code": self.exit_code(),
        }
