"""A command that works for long: progress beside it, a signal ends it well, and so does a reader who went away.

What it does, and what it says at the end, is the command's.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from castore.cli.progress import ShowProgress, progress

if TYPE_CHECKING:
    from castore.storage.spi import StorageBackend

INTERRUPTED: Final = 128 + 2

_SHOW_SECONDS: Final = 0.25
"""Between two looks at how far it is."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far it is; `files` counts objects in words."""

    done_bytes: int
    total_bytes: int
    files: str


class LongRun:
    """Runs `work` once. `look` gives how far it is, None while that is not known."""

    def __init__(self, title: str, backends: Iterable[StorageBackend]) -> None:
        self.is_interrupted = False
        self._title = title
        self._backends = tuple(backends)
        self._output_error: OSError | None = None
        self._show: ShowProgress
        self._scope: Any

    async def main(self, work: Callable[[], Awaitable[None]], look: Callable[[], Snapshot | None]) -> None:
        """Work until it is done or interrupted, then close the backends.

        When interrupted, `work` is cancelled. Raises what it raises, and OSError of the output.
        """
        import trio

        try:
            with progress(self._title) as self._show, trio.CancelScope() as self._scope:
                await self._supervise(work, look)
        finally:
            with trio.CancelScope(shield=True):
                for backend in self._backends:
                    await backend.aclose()
        if self._output_error is not None:
            raise self._output_error

    def say(self, line: str) -> None:
        """Write a line of the result now, from within `work`."""
        if self._output_error is not None:
            return
        try:
            self._show.say(line)
        except OSError as exc:
            self._output_error = exc
            self._scope.cancel()

    async def _supervise(self, work: Callable[[], Awaitable[None]], look: Callable[[], Snapshot | None]) -> None:
        import trio

        error: BaseException | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_on_signal)
            nursery.start_soon(self._show_always, look)
            try:
                await work()
            except Exception as exc:
                # Raised outside, so that it is not part of a group.
                error = exc
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    async def _cancel_on_signal(self) -> None:
        import trio

        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                self.is_interrupted = True
                self._scope.cancel()

    async def _show_always(self, look: Callable[[], Snapshot | None]) -> None:
        import trio

        while True:
            now = look()
            if now is not None:
                self._show(done_bytes=now.done_bytes, total_bytes=now.total_bytes, files=now.files)
            await trio.sleep(_SHOW_SECONDS)
