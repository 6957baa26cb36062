"""Places that can hold a test's objects: a section of the configuration each, and how to make them unreachable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol


class Place(Protocol):
    """One type of backend, for one test."""

    @property
    def backend_type(self) -> str:
        """As the configuration calls it."""

    def section(self, backend_id: str) -> str:
        """The table [backends.ID] of the configuration, as text. Backends of different ids share no object."""

    def unreachable(self, backend_id: str) -> AbstractContextManager[None]:
        """Nobody can reach that backend inside the `with` block. Its objects are there again afterwards."""


class LocalPlace:
    """Folders of the test's own folder."""

    backend_type = "local"

    def __init__(self, root: Path) -> None:
        self._root = root

    def section(self, backend_id: str) -> str:
        return f'[backends.{backend_id}]\ntype = "local"\npath = "{self._path(backend_id)}"\n'

    @contextmanager
    def unreachable(self, backend_id: str) -> Iterator[None]:
        path = self._path(backend_id)
        hidden = path.with_name(f"{path.name}.away")
        path.rename(hidden)
        yield
        hidden.rename(path)

    def _path(self, backend_id: str) -> Path:
        return self._root / f"objects-{backend_id}"


PLACES: Final[dict[str, Callable[[Path], Place]]] = {"local": LocalPlace}
"""By the name that tests show."""
