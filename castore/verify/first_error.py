"""Tasks that stand and fall together: the first error of one ends all, and is raised alone. Retries nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from castore.errors import CastoreError


class FirstError:
    """Keeps the first CastoreError of some tasks, so that it is raised by itself instead of in a group."""

    def __init__(self) -> None:
        self._error: CastoreError | None = None

    async def guard(self, scope: trio.CancelScope, task: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Run a task; its error is kept, and cancels `scope`."""
        try:
            await task(*arguments)
        except CastoreError as exc:
            self._error = self._error or exc
            scope.cancel()

    def check(self) -> None:
        """Raise what was kept."""
        if self._error is not None:
            raise self._error
