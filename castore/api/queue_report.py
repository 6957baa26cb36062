"""What waits in ingest/ to be stored: as a daemon knows it of itself, or as another program hears it from the daemon.

It changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from castore.api.control_client import ControlClient
from castore.api.status import states_of
from castore.errors import CastoreError, StateError
from castore.ingest.rate import Rate

if TYPE_CHECKING:
    from castore.ingest.service import Ingest

VERSIONS_SHOWN: Final = 20
"""Versions in ingest/ on the page. `castore status` names all."""
ASK_SECONDS: Final = 1.0
"""A daemon answers from memory. One that does not is said to hang, and whoever asks is answered."""
KEPT_SECONDS: Final = 1.0
"""What a daemon said is given again for that long."""


@dataclass(frozen=True, slots=True)
class StagedVersion:
    """A version in ingest/, how much of it is stored, and why it could not be published."""

    ref: str
    stored_files: int
    total_files: int
    stored_bytes: int
    total_bytes: int
    error: str


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits to be stored."""

    states: tuple[tuple[str, int, int], ...]
    """(state, files, bytes)"""
    rate: Rate
    eta_s: float | None
    staged_bytes: int
    staging_max_bytes: int
    versions: tuple[StagedVersion, ...]
    """VERSIONS_SHOWN of them."""
    version_count: int
    expired: tuple[str, ...]
    """Versions in which nothing changed for `ingest.expire_after`."""


@dataclass(frozen=True, slots=True)
class MountSaid:
    """What was heard of the writing mount of a store. `problem` is why nothing was, though there may be one."""

    queue: Queue | None = None
    mountpoint: str = ""
    http_url: str = ""
    """Where that mount tells of its queue itself; empty when nowhere."""
    problem: str = ""


class MountQueue:
    """Asks the daemon that listens at `control_path`, at most once in KEPT_SECONDS however many want to know."""

    def __init__(self, control_path: Path) -> None:
        self._client = ControlClient(control_path)
        self._turn = trio.Lock()
        self._heard: tuple[float, MountSaid] | None = None

    async def latest(self) -> MountSaid:
        """Within ASK_SECONDS, whatever the daemon does."""
        async with self._turn:
            if self._heard is None or trio.current_time() - self._heard[0] > KEPT_SECONDS:
                said = await trio.to_thread.run_sync(self._ask, abandon_on_cancel=True)
                self._heard = trio.current_time(), said
            return self._heard[1]

    def _ask(self) -> MountSaid:
        try:
            document = self._client.call("status", within=ASK_SECONDS)
            return MountSaid(queue_in(document), str(document["mountpoint"]), str(document["http_url"]))
        except StateError:  # no daemon listens
            return MountSaid()
        except CastoreError as exc:
            return MountSaid(problem=str(exc))
        except (KeyError, TypeError, ValueError):
            return MountSaid(problem="the daemon is of a castore that says its status otherwise")


def queue_of(ingest: Ingest) -> Queue:
    """Of this process."""
    versions = ingest.store.versions()
    shown = []
    for name, version, inode in versions[:VERSIONS_SHOWN]:
        progress = ingest.publisher.progress(inode)
        shown.append(
            StagedVersion(
                ref=f"{name}/{version}",
                stored_files=progress.stored_files,
                total_files=progress.total_files,
                stored_bytes=progress.stored_bytes,
                total_bytes=progress.total_bytes,
                error=ingest.store.error(inode),
            )
        )
    return Queue(
        states=tuple(states_of(ingest)),
        rate=ingest.uploader.rate.rate(),
        eta_s=ingest.eta_seconds(),
        staged_bytes=ingest.files.staged_bytes,
        staging_max_bytes=ingest.files.max_bytes,
        versions=tuple(shown),
        version_count=len(versions),
        expired=tuple(each.ref for each in ingest.expiry.expired),
    )


def queue_in(document: dict[str, Any]) -> Queue | None:
    """In a status document; None in that of a read-only mount. Raises KeyError, TypeError, ValueError."""
    if document["read_only"]:
        return None
    return Queue(
        states=tuple(
            (state, int(count["file_count"]), int(count["size_bytes"])) for state, count in document["queue"].items()
        ),
        rate=Rate(**document["rate"]),
        eta_s=document["eta_s"],
        staged_bytes=int(document["staged_bytes"]),
        staging_max_bytes=int(document["staging_max_bytes"]),
        versions=tuple(StagedVersion(**each) for each in document["versions"][:VERSIONS_SHOWN]),
        version_count=len(document["versions"]),
        expired=tuple(str(each["ref"]) for each in document["expired"]),
    )
