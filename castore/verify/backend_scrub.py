"""The scrub of one backend: workers that read what is sent to them, an outage that is waited for, a second round.

Records nothing: what was found goes to a channel.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from castore.catalog.scrub import LocationRow
from castore.errors import StorageError
from castore.storage.spi import StorageBackend
from castore.verify.first_error import FirstError
from castore.verify.limits import Limits
from castore.verify.outcomes import Outcome, Verdict
from castore.verify.pace import Pace
from castore.verify.reading import ObjectReader, Reading

WORKERS: Final = 16
"""Objects of a backend read at a time: hides the latency of small ones, and is what a local backend reads at once."""
ERRORS_IN_A_ROW: Final = 8
"""Errors without a success in between after which a backend counts as away. Each was tried several times below."""
OUTAGE_SECONDS: Final = 60.0
"""How long a backend that was well at first is waited for: a server that is started anew is there within that."""
OUTAGE_LOOK_SECONDS: Final = 2.0
"""Between two looks at a backend that is away."""
AGAIN_MAX: Final = 1000
"""Locations that were not reached and are asked for once more at the end."""

Feed = Callable[[trio.MemorySendChannel[LocationRow]], Awaitable[None]]
"""Sends the locations that are to be looked at; may be cancelled."""


class BackendScrub:
    """One run over one backend. `stopped` says why it was given up; empty when it was not."""

    def __init__(
        self,
        backend: StorageBackend,
        *,
        limits: Limits,
        pace: Pace,
        on_bytes: Callable[[int], None],
        workers: int = WORKERS,
        outage_s: float = OUTAGE_SECONDS,
    ) -> None:
        self.stopped = ""
        self._backend = backend
        self._limits = limits
        self._workers = workers
        self._outage_s = outage_s
        self._reader = ObjectReader(backend, pace=pace, on_bytes=on_bytes)
        self._errors = FirstError()
        self._errors_in_a_row = 0
        self._is_ill = False
        self._has_waited = False
        self._is_calm = trio.Event()
        self._is_calm.set()
        self._again: list[Outcome] = []
        self._looked_at = 0

    async def run(self, feed: Feed, results: trio.MemorySendChannel[Outcome]) -> None:
        """Read the locations that `feed` sends, and send what was found. Raises what `feed` raises."""
        # A backend that is ill gets one chance: its first error is the answer.
        health = await self._backend.health()
        self._is_ill = health.status == "fail"
        await self._round(feed, partial(self._first_look, results))
        again, self._again = self._again, []
        if self.stopped or self._limits.reached:
            for outcome in again:
                await results.send(outcome)
        elif again:
            await self._round(partial(_send_all, [outcome.row for outcome in again]), partial(self._last_look, results))
        if self._is_ill and not self._looked_at:
            # There was nothing to read, and yet it must not look as if all were well.
            self.stopped = health.detail

    async def _round(self, feed: Feed, look: Callable[[LocationRow], Awaitable[bool]]) -> None:
        """Look at what `feed` sends, until a look says that it is enough, or the backend is given up."""
        queue, waiting = trio.open_memory_channel[LocationRow](self._workers)
        feeding = trio.CancelScope()
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                async for row in waiting:
                    if not await look(row):
                        feeding.cancel()
                        return
                    if self.stopped:
                        nursery.cancel_scope.cancel()

            for _ in range(self._workers):
                nursery.start_soon(self._errors.guard, nursery.cancel_scope, work)
            async with queue:
                with feeding:
                    await self._errors.guard(nursery.cancel_scope, feed, queue)
        self._errors.check()

    async def _first_look(self, results: trio.MemorySendChannel[Outcome], row: LocationRow) -> bool:
        """False when no more is to be begun."""
        await self._is_calm.wait()
        if self.stopped or not self._limits.allow(row.size_bytes):
            return False
        outcome = await self._look_at(row)
        self._looked_at += 1
        if outcome.verdict is not Verdict.UNREACHABLE:
            self._errors_in_a_row, self._has_waited = 0, False
        elif outcome.is_temporary and not self._is_ill and len(self._again) < AGAIN_MAX:
            self._again.append(outcome)
            await self._no_answer(outcome)
            return True
        await results.send(outcome)
        if outcome.verdict is Verdict.UNREACHABLE:
            await self._no_answer(outcome)
        return True

    async def _last_look(self, results: trio.MemorySendChannel[Outcome], row: LocationRow) -> bool:
        await results.send(await self._look_at(row))
        return True

    async def _no_answer(self, outcome: Outcome) -> None:
        """Count an error; when there are too many, wait for the backend, or give it up."""
        self._errors_in_a_row += 1
        patience = 1 if self._is_ill else ERRORS_IN_A_ROW
        if self._errors_in_a_row < patience or self.stopped or not self._is_calm.is_set():
            return
        if outcome.is_temporary and not self._is_ill and not self._has_waited:
            self._has_waited = True
            self._is_calm = trio.Event()
            try:
                with trio.move_on_after(self._outage_s):
                    while True:
                        if (await self._look_at(outcome.row)).verdict is not Verdict.UNREACHABLE:
                            self._errors_in_a_row = 0
                            return
                        await trio.sleep(OUTAGE_LOOK_SECONDS)
            finally:
                self._is_calm.set()
        self.stopped = outcome.error

    async def _look_at(self, row: LocationRow) -> Outcome:
        started = time.monotonic()

        def outcome(verdict: Verdict, reading: Reading | None, exc: StorageError | None) -> Outcome:
            duration_ms = round((time.monotonic() - started) * 1000)
            error, is_temporary = ("", False) if exc is None else (str(exc), exc.temporary)
            return Outcome(row, verdict, reading, error, duration_ms, is_temporary=is_temporary)

        try:
            reading = await self._reader.judge(row.digest, row.size_bytes)
        except StorageError as exc:
            return outcome(Verdict.UNREACHABLE, None, exc)
        return outcome(Verdict.VERIFIED if reading.reason is None else Verdict.FAILED, reading, None)


async def _send_all(rows: list[LocationRow], queue: trio.MemorySendChannel[LocationRow]) -> None:
    for row in rows:
        await queue.send(row)
