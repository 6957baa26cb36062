"""What surrounds every handler: errors become errno, the unforeseen is logged and becomes EIO, and waits end."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar

import pyfuse3
import trio

from castore.errors import DeadlineExceeded, NotConfigured
from castore.seldom import SeldomLog
from mount.errnos import errno_of, is_expected

log = logging.getLogger(__name__)
_complaints = SeldomLog(log)

P = ParamSpec("P")
T = TypeVar("T")

HANDLER_SECONDS: Final = 120.0
"""A handler that waits longer answers ETIMEDOUT. Backends have shorter deadlines; this one catches what they miss."""


class _Waits:
    """The handlers that wait just now. pyfuse3's loop ends only when all of them have answered."""

    def __init__(self) -> None:
        self._scopes: set[trio.CancelScope] = set()
        self._ended = False

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Cancel the body after `seconds`, or when the daemon ends."""
        with self.scope(seconds) as scope:
            try:
                yield
            finally:
                self.over(scope)

    def scope(self, seconds: float) -> trio.CancelScope:
        """For `with`, and to be given to `over` then: as `within`, at half of its cost."""
        scope = trio.CancelScope(deadline=trio.current_time() + seconds)
        self._scopes.add(scope)
        if self._ended:
            scope.cancel()
        return scope

    def over(self, scope: trio.CancelScope) -> None:
        """The body of a scope has ended."""
        self._scopes.discard(scope)

    def end(self) -> None:
        """The daemon ends: nobody waits any longer, and nobody begins to."""
        self._ended = True
        for scope in self._scopes:
            scope.cancel()


waits: Final = _Waits()
"""Of this process: pyfuse3, too, serves one mount a process."""


def guarded(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Wrap a handler that does not wait for anything: any exception but FUSEError would end the mount."""

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except (pyfuse3.FUSEError, trio.Cancelled):
            raise
        except Exception as exc:
            raise fuse_error(handler.__name__, exc) from exc

    return wrapper


def deadlined(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """As `guarded`, for a handler that may wait: it answers within HANDLER_SECONDS, and when the daemon ends."""

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        scope = waits.scope(HANDLER_SECONDS)
        try:
            with scope:
                return await handler(*args, **kwargs)
            raise DeadlineExceeded(f"{handler.__name__}: no answer within {HANDLER_SECONDS:g} s, or the daemon ends")
        except (pyfuse3.FUSEError, trio.Cancelled):
            raise
        except Exception as exc:
            raise fuse_error(handler.__name__, exc) from exc
        finally:
            waits.over(scope)

    return wrapper


def fuse_error(what: str, exc: Exception) -> pyfuse3.FUSEError:
    """The answer for an exception; the unforeseen is logged with its traceback, what else is EIO with its reason."""
    number = errno_of(exc)
    if not is_expected(exc):
        log.error("%s: unforeseen %s", what, type(exc).__name__, exc_info=exc)
    elif number == errno_of(Exception()) and not isinstance(exc, NotConfigured):
        _complaints.warning(f"{what} {type(exc).__name__}", f"{what}: {exc}")
    return pyfuse3.FUSEError(number)
