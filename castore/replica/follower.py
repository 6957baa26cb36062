"""Follows the catalog of another host: its replica's newest state becomes this host's catalog, within seconds.

Two things run beside each other: litestream keeps a copy of its own up to date, from which the catalog is taken when it
has a new transaction; and the replica is asked for its newest transaction, which tells how old the catalog is, and
whether litestream still gets on. It writes to nothing but the state directory.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from castore.config import FollowSettings, StoreSettings
from castore.errors import StateError
from castore.replica import adopting
from castore.replica.adopting import Followed
from castore.replica.litestream import Following, Litestream

LOOK_SECONDS: Final = 0.25
"""Between two looks whether litestream has something new: a file of 17 bytes is read."""
ASK_EVERY_SECONDS: Final = 5.0
"""Between two questions to the replica: each starts the program, 35 ms of one core."""
TAKE_SHARE: Final = 10
"""Taking a catalog copies it where the file system cannot share blocks: what took long is not done again for that many
times as long."""
STALLED_SECONDS: Final = 30.0
"""A copy that is behind the replica for so long while it can be reached is begun anew."""
AGAIN_SECONDS: Final = 1.0
AGAIN_SECONDS_MAX: Final = 60.0
"""From the end of the program to its next start: the first time, and at most."""
FIRST_SECONDS: Final = 600.0
"""For the first restore: a million entries took 3 s, from a disk."""
RESERVE_BYTES: Final = 16 * 2**20
"""Of the state directory's disk that no replica gets, however large it says to be."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FollowedState:
    """How the catalog is. `age_seconds` ago it was the newest state of the replica, or later; `error` says why it is
    not now, empty when all is well.
    """

    url: str
    transaction: int
    age_seconds: float
    error: str


class Follower:
    """For one state directory, whose lock the caller holds. Raises ConfigError for what cannot be followed at all."""

    def __init__(
        self,
        url: str,
        store: StoreSettings,
        settings: FollowSettings,
        *,
        stalled_seconds: float = STALLED_SECONDS,
        ask_every_seconds: float = ASK_EVERY_SECONDS,
    ) -> None:
        self._litestream = Litestream(url, settings)
        self._store = store
        self._stalled_seconds = stalled_seconds
        self._ask_every_seconds = ask_every_seconds
        self._following: Following | None = None
        self._transaction = 0
        self._newest = 0
        """Of the replica, when it was last asked, at `_asked_ns`."""
        self._asked_ns = 0
        self._current_ns = 0
        """When the catalog was last known to be the newest."""
        self._ask_error = ""
        self._take_error = ""
        self._run_error = ""
        """Why litestream is begun anew, until its copy is as new as the catalog again."""
        self._rejected = 0
        """A transaction that was not taken, so that it is not tried again."""
        self._said = ""
        self._moved = time.monotonic()
        """When the copy last moved, or was not behind."""
        self._copied = 0

    def state(self) -> FollowedState:
        """As of now."""
        return FollowedState(
            self._litestream.shown_url,
            self._transaction,
            max(0.0, (time.time_ns() - self._current_ns) / 1e9),
            self._take_error or self._ask_error or self._run_error,
        )

    # beginning

    def begin(self) -> None:
        """See to it that there is a catalog: the one that was followed before, or the replica's. Blocking.

        Raises StateError when there is neither, or the state directory has a catalog of its own.
        """
        store = self._store
        marker = adopting.read_marker(store.followed_path)
        if marker is None and store.catalog_path.exists():
            raise StateError(
                f"{store.state_dir}: holds a catalog of its own, which following would replace; set another state_dir"
            )
        shutil.rmtree(store.follow_dir, ignore_errors=True)
        if marker is not None and marker.url == self._litestream.shown_url and store.catalog_path.exists():
            self._transaction = marker.transaction
            self._current_ns = store.followed_path.stat().st_mtime_ns
            return
        self._restore_first()

    def _restore_first(self) -> None:
        deadline = time.monotonic() + FIRST_SECONDS
        try:
            following = self._following = self._start()
            while not (transaction := adopting.take(following.copy, self._part()) if following.copy.exists() else 0):
                if following.has_ended:
                    raise StateError(self._litestream.explained(following.said))
                self._check_room()
                if time.monotonic() > deadline:
                    raise StateError(f"{self._litestream.shown_url}: was not restored within {FIRST_SECONDS:g} s")
                time.sleep(0.02)
            adopting.check(self._part(), None)
            # First the marker: what lies there must never be taken for a catalog of this host's own.
            adopting.write_marker(self._store.followed_path, Followed(self._litestream.shown_url, transaction))
            adopting.put_in_place(self._part(), self._store.catalog_path)
        except OSError as exc:
            self.close()
            raise StateError(f"{exc.filename or self._store.follow_dir}: {exc.strerror}") from exc
        except BaseException:
            self.close()
            raise
        self._transaction = self._copied = transaction
        self._current_ns = time.time_ns()

    def close(self) -> None:
        """End the program and remove its copy."""
        if self._following is not None:
            self._following.end()
            self._following = None
        shutil.rmtree(self._store.follow_dir, ignore_errors=True)

    # going on

    async def run(self, on_taken: Callable[[], None]) -> None:
        """Follow until cancelled. `on_taken` is called when another catalog lies at the path."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ask_always)
            again_seconds = AGAIN_SECONDS
            while True:
                taken = 0.0
                try:
                    if self._following is None:
                        self._following = self._start()
                        self._moved = time.monotonic()
                    taken = await self._take_new(self._following, on_taken)
                    self._check_getting_on(self._following)
                except (StateError, OSError) as exc:
                    self._say_once(str(exc))
                    self._run_error = str(exc)
                    await self._end_following()
                    await trio.sleep(again_seconds)
                    again_seconds = min(2 * again_seconds, AGAIN_SECONDS_MAX)
                    continue
                if taken:
                    again_seconds = AGAIN_SECONDS
                if self._copied == self._transaction:
                    self._run_error = ""
                await trio.sleep(max(LOOK_SECONDS, taken * TAKE_SHARE))

    async def _ask_always(self) -> None:
        while True:
            asked_ns = time.time_ns()
            try:
                newest = await self._litestream.newest()
            except StateError as exc:
                self._say_once(str(exc))
                self._ask_error = str(exc)
            else:
                if self._ask_error:
                    log.info("%s: can be reached again", self._litestream.shown_url)
                self._ask_error = ""
                self._newest, self._asked_ns = newest, asked_ns
                self._note_age()
            await trio.sleep(self._ask_every_seconds)

    def _note_age(self) -> None:
        if self._asked_ns and self._transaction == self._newest:
            self._current_ns = max(self._current_ns, self._asked_ns)

    async def _take_new(self, following: Following, on_taken: Callable[[], None]) -> float:
        """Take what is new; the seconds that it took, 0 when there was nothing to take."""
        copied = adopting.transaction_of(following.copy)
        if copied != self._copied or copied >= self._newest or self._ask_error:
            self._copied, self._moved = copied, time.monotonic()
        if not copied or copied in (self._transaction, self._rejected):
            return 0
        began = time.monotonic()
        try:
            transaction = await trio.to_thread.run_sync(self._take, following.copy)
        except (StateError, OSError) as exc:
            self._say_once(f"{self._litestream.shown_url}: transaction {copied:x} is not taken: {exc}")
            self._take_error = str(exc)
            if isinstance(exc, OSError):  # as of a full disk: tried again
                return max(AGAIN_SECONDS, time.monotonic() - began)
            self._rejected = copied
            return time.monotonic() - began
        if transaction:
            self._transaction = transaction
            self._take_error = ""
            on_taken()
            # What came with it was the newest when it was asked for, unless the replica had more by then.
            if self._transaction >= self._newest:
                self._current_ns = max(self._current_ns, self._asked_ns)
            log.debug("%s: transaction %x", self._litestream.shown_url, transaction)
        return time.monotonic() - began

    def _take(self, copy: Path) -> int:
        try:
            transaction = adopting.take(copy, self._part())
        except OSError:
            self._part().unlink(missing_ok=True)
            raise
        if transaction:
            adopting.check(self._part(), self._store.catalog_path)
            adopting.put_in_place(self._part(), self._store.catalog_path)
            adopting.write_marker(self._store.followed_path, Followed(self._litestream.shown_url, transaction))
        return transaction

    def _check_getting_on(self, following: Following) -> None:
        """Raises StateError when litestream has to be begun anew."""
        if following.has_ended:
            raise StateError(self._litestream.explained(following.said))
        if time.monotonic() - self._moved > self._stalled_seconds:
            raise StateError(f"{self._litestream.shown_url}: litestream does not get on; it is started anew")
        self._check_room()

    def _check_room(self) -> None:
        """Raises StateError before litestream fills the disk."""
        if shutil.disk_usage(self._store.follow_dir).free < RESERVE_BYTES:
            raise StateError(
                f"{self._store.follow_dir}: no space left on the device but {RESERVE_BYTES >> 20} MiB: a catalog takes "
                "three times its size while it is taken; make room, or see whose replica it is"
            )

    async def _end_following(self) -> None:
        # In a thread: a program that does not heed its signal takes seconds, in which this mount serves.
        if (following := self._following) is not None:
            await trio.to_thread.run_sync(following.end)
            await trio.to_thread.run_sync(partial(shutil.rmtree, following.copy.parent, ignore_errors=True))
            self._following = None
        self._copied = 0

    def _start(self) -> Following:
        # A name of its own each time: a copy of a run that went wrong is never gone on with.
        return self._litestream.follow(self._store.follow_dir / uuid.uuid4().hex / "catalog.db")

    def _part(self) -> Path:
        return self._store.follow_dir / "new.db"

    def _say_once(self, error: str) -> None:
        if error not in (self._ask_error, self._take_error, self._said):
            log.warning("%s", error)
        self._said = error
