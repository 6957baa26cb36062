"""Which backends a package belongs in: rules by retention class and producer. Nothing is stored or asked here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from castore.config import RoutingSettings
from castore.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Route:
    """Where a package's blobs and manifest go: the primary backend first, then the copies."""

    backend_ids: tuple[str, ...]


class Router:
    """Chooses by the configuration's rules, its function, or its default.

    Raises ConfigError when the function cannot be imported or names a backend that is not configured.
    """

    def __init__(self, settings: RoutingSettings, backend_ids: frozenset[str]) -> None:
        self._settings = settings
        self.backend_ids = backend_ids
        self._function = _load(settings.function) if settings.function else None

    def route(self, retention_class: str, producer: str) -> Route:
        """The route of a package; the first matching rule wins, patterns are shell-style."""
        if self._function is not None:
            chosen = self._function(retention_class, producer)
            if chosen not in self.backend_ids:
                raise ConfigError(f"routing.function: returned {chosen!r}, which is no configured backend")
            return Route((chosen,))
        for rule in self._settings.rules:
            if fnmatchcase(retention_class, rule.retention_class) and fnmatchcase(producer, rule.producer):
                return Route((rule.backend, *rule.copies))
        return Route((self._settings.default,))


def _load(path: str) -> Callable[[str, str], str]:
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(f"routing.function: cannot import {path!r}: {exc}; expected MODULE:FUNCTION") from exc
    if not callable(function):
        raise ConfigError(f"routing.function: {path!r} is not callable")
    return function  # type: ignore[no-any-return]
