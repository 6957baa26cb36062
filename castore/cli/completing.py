"""What a shell completes beyond commands and options: packages, tags, backends. Decides nothing of a command's values.

What cannot be told, because there is no catalog or the settings are wrong, completes to nothing: the command says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import click

from castore.cli.session import Session
from castore.errors import CastoreError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from castore.config import Config

OFFERED_MAX: Final = 500
"""Packages; with more of them that begin so, the NAMEs alone. A shell asks first before it shows so many."""


class _Known(click.ParamType[Any]):
    """A text that is taken as it is, and completed from what there is."""

    def __init__(self, name: str, known: Callable[[Config, str, str], Iterable[str]]) -> None:
        self.name = name
        self._known = known

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        try:
            found = list(self._known(ctx.ensure_object(Session).config(), incomplete, ctx.params.get("name") or ""))
        except (CastoreError, OSError):
            return []
        return [CompletionItem(text) for text in found if text.startswith(incomplete)]


def _refs(config: Config, begin: str, _: str) -> list[str]:
    from castore.catalog.reader import CatalogReader

    with CatalogReader.open(config.store.catalog_path) as reader:
        name, slash, version = begin.partition("/")
        if slash:
            return [f"{name}/{known}" for known in reader.versions(name, version, OFFERED_MAX)]
        names = reader.names(begin, OFFERED_MAX)
        refs: list[str] = []
        for known in names:
            refs += [f"{known}/{version}" for version in reader.versions(known, "", OFFERED_MAX + 1)]
            if len(refs) > OFFERED_MAX:
                return [f"{name}/" for name in names]
        return refs


def _names(config: Config, begin: str, _: str) -> list[str]:
    from castore.catalog.reader import CatalogReader

    with CatalogReader.open(config.store.catalog_path) as reader:
        return reader.names(begin, OFFERED_MAX)


def _versions(config: Config, begin: str, name: str) -> list[str]:
    from castore.catalog.reader import CatalogReader

    with CatalogReader.open(config.store.catalog_path) as reader:
        return reader.versions(name, begin, OFFERED_MAX)


def _tags(config: Config, begin: str, name: str) -> list[str]:
    from castore.catalog.reader import CatalogReader

    with CatalogReader.open(config.store.catalog_path) as reader:
        return sorted({"latest", *(tag.tag for tag in reader.tags(name))})


def _deleted(config: Config, begin: str, _: str) -> list[str]:
    from castore.catalog.deleting import DeletedReader

    with DeletedReader(config.store.catalog_path) as reader:
        return [one.package.ref for one in reader.deleted_packages(time.time_ns()) if not one.is_purging]


def _backends(config: Config, begin: str, _: str) -> list[str]:
    return sorted(config.backends)


def _backends_and_types(config: Config, begin: str, _: str) -> list[str]:
    return sorted({*config.backends, *(settings.backend_type for settings in config.backends.values())})


REF: Final = _Known("ref", _refs)
"""A published package."""
DELETED_REF: Final = _Known("ref", _deleted)
"""One that can be restored."""
NAME: Final = _Known("name", _names)
VERSION: Final = _Known("version", _versions)
"""Of the NAME that stands before it."""
TAG: Final = _Known("tag", _tags)
"""Of the NAME that stands before it."""
BACKEND: Final = _Known("id", _backends)
BACKEND_OR_TYPE: Final = _Known("id or type", _backends_and_types)
