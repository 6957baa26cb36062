"""Which backends a package belongs in: rules by retention class and producer. No backend is asked here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from castore.config import RoutingSettings
from castore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Route:
    """Where a package's blobs and manifest go: the primary backend first, then the copies."""

    backend_ids: tuple[str, ...]


class Router:
    """Chooses by the configuration's rules, its function, or its default.

    `source` is the file that errors name. Raises ConfigError when the function cannot be imported.
    """

    def __init__(self, settings: RoutingSettings, backend_ids: frozenset[str], *, source: Path | None = None) -> None:
        self._settings = settings
        self.backend_ids = backend_ids
        self._where = f"{source}: " if source else ""
        self._function = self._load(settings.function) if settings.function else None

    def route(self, retention_class: str, producer: str) -> Route:
        """The route of a package; the first matching rule wins, patterns are shell-style.

        Raises ConfigError when the function fails or names a backend that is not configured.
        """
        if self._function is not None:
            return Route((self._ask(self._function, retention_class, producer),))
        for rule in self._settings.rules:
            if fnmatchcase(retention_class, rule.retention_class) and fnmatchcase(producer, rule.producer):
                return Route((rule.backend, *rule.copies))
        return Route((self._settings.default,))

    def _ask(self, function: Callable[[str, str], object], retention_class: str, producer: str) -> str:
        """The backend that a site's function chooses: code that is not ours, and must not end a daemon."""
        try:
            chosen = function(retention_class, producer)
        except (Exception, SystemExit) as exc:
            raise self._refuse(f"({retention_class!r}, {producer!r}) raised {_one_line(exc)}") from exc
        if isinstance(chosen, str) and chosen in self.backend_ids:
            return chosen
        allowed = ", ".join(sorted(self.backend_ids))
        shown = repr(chosen) if isinstance(chosen, str | None) else f"a value of type {type(chosen).__name__}"
        raise self._refuse(
            f"({retention_class!r}, {producer!r}) returned {shown}; expected one of the configured backends ({allowed})"
        )

    def _load(self, path: str) -> Callable[[str, str], object]:
        module_name, _, name = path.partition(":")
        try:
            function = getattr(importlib.import_module(module_name), name)
        except (Exception, SystemExit) as exc:
            # Importing runs the module: anything may come of that.
            raise self._refuse(
                f" cannot be imported: {_one_line(exc)}; expected MODULE:NAME of a module on PYTHONPATH or installed "
                "beside castore"
            ) from exc
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise self._refuse(f" is of type {type(function).__name__}; expected a function that is not async")
        return function  # type: ignore[no-any-return]

    def _refuse(self, why: str) -> ConfigError:
        return ConfigError(f"{self._where}routing.function = {self._settings.function!r}{why}")


def _one_line(exc: BaseException) -> str:
    said = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {said}" if said else type(exc).__name__
