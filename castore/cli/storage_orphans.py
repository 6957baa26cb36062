"""`castore storage verify --orphans`: objects that the catalog does not know, listed. Nothing is read or removed."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from castore.cli.long_run import INTERRUPTED, LongRun
from castore.cli.output import format_bytes, format_time_ns, json_line, printable
from castore.errors import StorageError

if TYPE_CHECKING:
    from castore.catalog.collecting import CollectReader
    from castore.config import Config
    from castore.storage.spi import ObjectInfo, StorageBackend

FOUND_SOMETHING_BAD = 1
COULD_NOT_RUN = 2


def list_orphans(config: Config, backends: dict[str, StorageBackend], as_json: bool) -> int:
    """Print every object without a location, whose put nobody has begun either; the exit code."""
    import trio

    from castore.catalog.collecting import CollectReader

    with CollectReader(config.store.catalog_path) as reader:
        listing = _Listing(reader, backends, as_json)
        trio.run(listing.long.main, listing.run, lambda: None)
    if as_json:
        click.echo(json_line(listing.summary()))
    else:
        click.echo(
            f"{listing.count} orphans, {format_bytes(listing.size_bytes)}; `castore storage gc` removes old ones"
        )
    for backend_id, error in listing.unreachable.items():
        why = printable(error.removeprefix(f"backend {backend_id}: "))
        print(f"castore: error: backend {printable(backend_id)} could not be listed: {why}", file=sys.stderr)
    if listing.long.is_interrupted:
        return INTERRUPTED
    if listing.unreachable:
        return COULD_NOT_RUN
    return FOUND_SOMETHING_BAD if listing.count else 0


class _Listing:
    """One run."""

    def __init__(self, reader: CollectReader, backends: dict[str, StorageBackend], as_json: bool) -> None:
        self.long = LongRun("listing", backends.values())
        self.count = 0
        self.size_bytes = 0
        self.unreachable: dict[str, str] = {}
        self._reader = reader
        self._backends = backends
        self._as_json = as_json

    async def run(self) -> None:
        """All algorithms of all backends."""
        from castore.digest import MANIFEST_ALGORITHM, PRIMARY_ALGORITHM
        from castore.verify.collect import each_stranger

        for backend_id, backend in self._backends.items():
            try:
                for algorithm in (MANIFEST_ALGORITHM, PRIMARY_ALGORITHM):
                    await each_stranger(self._reader, backend, algorithm, partial(self._tell, backend_id))
            except StorageError as exc:
                self.unreachable[backend_id] = str(exc)

    async def _tell(self, backend_id: str, found: list[ObjectInfo]) -> None:
        for info in found:
            self.count += 1
            self.size_bytes += info.size_bytes
            if self._as_json:
                self.long.say(json_line(_document(backend_id, info)))
            else:
                size, when = format_bytes(info.size_bytes), format_time_ns(info.modified_ns)
                self.long.say(f"orphan in backend {printable(backend_id)}: {info.digest}, {size}, put {when}")

    def summary(self) -> dict[str, Any]:
        """The last document."""
        return {
            "summary": True,
            "backends": list(self._backends),
            "orphan_count": self.count,
            "orphan_bytes": self.size_bytes,
            "not_listed": [{"backend_id": key, "error": error} for key, error in self.unreachable.items()],
        }


def _document(backend_id: str, info: ObjectInfo) -> dict[str, Any]:
    return {
        "backend_id": backend_id,
        "digest": str(info.digest),
        "size_bytes": info.size_bytes,
        "modified_ns": info.modified_ns,
        "status": "orphan",
    }
