"""Delivers events from the catalog to the sinks of the configuration, in order, and lets old ones go.

At least once: how far a sink has come is written after it has taken the events. So a kill between repeats some, and
loses none. One process at a time does this for a store, which `run/deliver.lock` sees to: else the order would not
hold. A sink waits for nobody but itself.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from typing import Any, Final, Protocol, TypeVar

import trio

from castore.api.event_feed import document
from castore.api.event_file import EventFile
from castore.api.webhook import Webhook
from castore.catalog.delivery import DeliveryReader
from castore.catalog.event_log import StoredEvent
from castore.catalog.writer import CatalogWriter, Transaction
from castore.config import Config
from castore.config_events import EventSettings, SinkSettings
from castore.errors import DeliveryError, StateError, StateLocked
from castore.failpoint import failpoint
from castore.state_lock import take_lock
from castore.verify.first_error import FirstError

T = TypeVar("T")

POLL_SECONDS: Final = 0.5
"""Between two looks for new events: each costs some microseconds."""
BATCH_BYTES: Final = 1 << 20
"""Of JSON that a sink is given at once; one event at least."""
RETRY_SECONDS: Final = 1.0
"""After a first failure; each further one doubles it, up to RETRY_SECONDS_MAX or what the sink's settings say."""
RETRY_SECONDS_MAX: Final = 300.0
"""For a sink whose settings say nothing of it."""
GIVE_UP_TRIES: Final = 4
"""Attempts of a delivery that is to end by itself: some 7 s of waiting."""
UNDELIVERED_KEEPS: Final = 2
"""Times `events.keep` after which an event goes that some sink has not taken: health warns long before."""
PRUNE_SECONDS: Final = 3600.0
"""Between two looks for events to let go."""
PRUNE_PAUSE_SECONDS: Final = 0.1
"""Between two transactions of these: writers that wait come first."""
LOCK_SECONDS: Final = 5.0
"""Between two tries to be the process that delivers."""
_PAGE_EVENTS: Final = 500
_NS: Final = 10**9

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where events go. `send` returns when they are there for good, or raises DeliveryError; it may be cancelled."""

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> str: ...

    @property
    def batch_events(self) -> int: ...

    @property
    def settings(self) -> SinkSettings: ...

    async def send(self, documents: Sequence[Mapping[str, Any]]) -> None: ...

    async def aclose(self) -> None: ...


def open_sinks(settings: EventSettings) -> list[Sink]:
    """The sinks that are configured. Touches nothing."""
    sinks: list[Sink] = []
    if settings.file is not None:
        sinks.append(EventFile(settings.file))
    if settings.webhook is not None:
        sinks.append(Webhook(settings.webhook))
    return sinks


class Deliveries:
    """Delivers the events of one store. `writer` is shared with whatever else the process writes."""

    def __init__(self, config: Config, writer: CatalogWriter) -> None:
        self._config = config
        self._settings = config.events
        self._path = config.store.catalog_path
        self._writer = writer

    async def run(self, *, on_wait: Callable[[str], None] = _log.info) -> None:
        """Deliver, and let old events go, until cancelled. Raises StateError.

        Waits while another process does this, and tells `on_wait` once which one.
        """
        errors = FirstError()
        with closing(_Lock(self._config)) as lock:
            await lock.wait(on_wait)
            async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
                sinks = await self._open(stack)
                nursery.start_soon(errors.guard, nursery.cancel_scope, self._prune_always)
                for sink in sinks:
                    nursery.start_soon(errors.guard, nursery.cancel_scope, self._deliver_always, sink)
        errors.check()

    async def deliver(self) -> dict[str, tuple[int, str]]:
        """Deliver what is there now, and let old events go. By sink: how many events it took, and its last error.

        Raises StateError, StateLocked when another process delivers.
        """
        done: dict[str, tuple[int, str]] = {}
        with closing(_Lock(self._config)) as lock:
            lock.take()
            async with AsyncExitStack() as stack:
                for sink in await self._open(stack):
                    done[sink.name] = await self._deliver_once(sink)
            await self.prune()
        return done

    async def prune(self) -> int:
        """Let events go that are older than `events.keep` and delivered; how many. Raises StateError."""
        now = time.time_ns()
        keep_ns = round(self._settings.keep_seconds * _NS)

        def look() -> tuple[int, int]:
            with DeliveryReader(self._path) as reader:
                expired = reader.sequence_before(now - keep_ns)
                return expired, reader.sequence_before(now - UNDELIVERED_KEEPS * keep_ns) if expired else 0

        expired, hopeless = await trio.to_thread.run_sync(look)
        wanted = {name: sink.wants for name, sink in self._settings.sinks.items()}
        if hopeless and wanted:
            lost = await self._writer.run(lambda transaction: transaction.give_up_events(hopeless, wanted))
            for name, count in lost.items():
                _log.error("%d events are older than twice events.keep: %s will not get them", count, name)
        pruned = 0
        while expired and (count := await self._writer.run(lambda transaction: transaction.prune_events(expired))):
            pruned += count
            await trio.sleep(PRUNE_PAUSE_SECONDS)
        return pruned

    # one sink

    async def _open(self, stack: AsyncExitStack) -> list[Sink]:
        await self._persist(lambda transaction: transaction.keep_deliveries(self._settings.sinks))
        sinks = open_sinks(self._settings)
        for sink in sinks:
            stack.push_async_callback(_close, sink)
        return sinks

    async def _begin(self, sink: Sink, reader: DeliveryReader) -> int:
        begin = reader.last_sequence() if sink.settings.begin == "newest" else 0
        await self._persist(lambda transaction: transaction.begin_delivery(sink.name, begin))
        return reader.deliveries()[sink.name].sequence

    async def _deliver_always(self, sink: Sink) -> None:
        with closing(await trio.to_thread.run_sync(DeliveryReader, self._path)) as reader:
            source = reader.catalog_id()
            after = await self._begin(sink, reader)
            while True:
                while not reader.has_news():  # noqa: ASYNC110 another process may write
                    await trio.sleep(POLL_SECONDS)
                is_more = True
                while is_more:
                    page, last = await self._page(reader, after)
                    for batch, upto in _batches(sink, page, last, source):
                        await self._send(sink, batch, None)
                        await self._note_delivered(sink, upto)
                    is_more = bool(page)
                    after = last
                await self._note_skipped(sink, reader, after)

    async def _deliver_once(self, sink: Sink) -> tuple[int, str]:
        count = 0
        with closing(await trio.to_thread.run_sync(DeliveryReader, self._path)) as reader:
            source = reader.catalog_id()
            after = await self._begin(sink, reader)
            end = reader.last_sequence()
            while after < end:
                page, last = await self._page(reader, after)
                for batch, upto in _batches(sink, page, last, source):
                    try:
                        await self._send(sink, batch, GIVE_UP_TRIES)
                    except DeliveryError as exc:
                        return count, str(exc)
                    await self._note_delivered(sink, upto)
                    count += len(batch)
                after = last
            await self._note_skipped(sink, reader, after)
        return count, ""

    async def _page(self, reader: DeliveryReader, after: int) -> tuple[list[StoredEvent], int]:
        return await trio.to_thread.run_sync(reader.events_after, after, _PAGE_EVENTS)

    async def _send(self, sink: Sink, batch: Sequence[Mapping[str, Any]], tries: int | None) -> None:
        """Raises DeliveryError after so many tries; never when `tries` is None."""
        failed = 0
        while True:
            try:
                await sink.send(batch)
            except DeliveryError as exc:
                failed += 1
                if failed == 1:
                    _log.warning("events are not delivered: %s; tried again", exc)
                await self._note_failing(sink, str(exc))
                if failed == tries:
                    raise
                await trio.sleep(_wait_seconds(sink, failed, exc.retry_after_seconds))
            else:
                failpoint("events.sent")
                if failed:
                    _log.info("events are delivered again: %s", sink.place)
                return

    async def _note_failing(self, sink: Sink, error: str) -> None:
        await self._persist(lambda transaction: transaction.set_failing(sink.name, error))

    async def _note_delivered(self, sink: Sink, upto: int) -> None:
        await self._persist(lambda transaction: transaction.set_delivered(sink.name, upto))

    async def _note_skipped(self, sink: Sink, reader: DeliveryReader, after: int) -> None:
        """What nobody wanted counts as delivered, once the end is reached."""
        if reader.deliveries()[sink.name].sequence < after:
            await self._note_delivered(sink, after)

    async def _persist(self, work: Callable[[Transaction], T]) -> T:
        """One transaction, tried again while others hold the catalog or its disk is full. Raises StateError."""
        failed = 0
        while True:
            try:
                # Not cancelled: a delivery that is told to end would repeat what was taken just before.
                with trio.CancelScope(shield=True):
                    return await self._writer.run(work)
            except StateError as exc:
                if not exc.temporary:
                    raise
                failed += 1
                _log.warning("the catalog does not know what was delivered: %s; tried again", exc)
                await trio.sleep(min(RETRY_SECONDS * 2 ** min(failed, 8), RETRY_SECONDS_MAX))

    async def _prune_always(self) -> None:
        while True:
            try:
                await self.prune()
            except StateError as exc:
                _log.warning("old events are not removed: %s; tried again", exc)
            await trio.sleep(PRUNE_SECONDS)


class _Lock:
    """`run/deliver.lock`."""

    def __init__(self, config: Config) -> None:
        self._store = config.store
        self._descriptor = -1

    def take(self) -> None:
        """Raises StateLocked."""
        self._descriptor = take_lock(self._store.run_dir / "deliver.lock", self._store.state_dir, holder="delivery")

    async def wait(self, on_wait: Callable[[str], None]) -> None:
        """Take it as soon as nobody else has it."""
        is_told = False
        while True:
            try:
                return self.take()
            except StateLocked as exc:
                if not is_told:
                    on_wait(f"waiting: {exc}")
                is_told = True
            await trio.sleep(LOCK_SECONDS)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


async def _close(sink: Sink) -> None:
    with trio.CancelScope(shield=True):
        await sink.aclose()


def _batches(
    sink: Sink, page: Sequence[StoredEvent], last: int, source: str
) -> Iterator[tuple[list[Mapping[str, Any]], int]]:
    """What a sink wants of a page, in pieces, and how far it has come when it has taken each."""
    batch: list[Mapping[str, Any]] = []
    size = upto = 0
    for stored in page:
        if not sink.settings.wants(stored.event.type):
            continue
        made = document(stored, source)
        length = len(json.dumps(made))
        if batch and (len(batch) == sink.batch_events or size + length > BATCH_BYTES):
            yield batch, upto
            batch, size = [], 0
        batch.append(made)
        size += length
        upto = stored.sequence
    if batch:
        yield batch, last


def _wait_seconds(sink: Sink, failed: int, asked: float) -> float:
    """After so many failures in a row: twice as long each time, or what the receiver asks for; with jitter, bounded."""
    most = getattr(sink.settings, "retry_max_seconds", RETRY_SECONDS_MAX)
    wait = max(asked, RETRY_SECONDS * 2.0 ** min(failed - 1, 20))
    return float(min(wait * random.uniform(0.75, 1.25), most))
