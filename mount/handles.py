"""Open files: what a file handle number stands for. Reading and writing them is left to the library."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from castore.blobs.open_blob import OpenBlob
from castore.errors import NotOpen
from castore.ingest.staged_file import StagedFile


@dataclass(frozen=True, slots=True)
class StagedHandle:
    """A file of ingest/."""

    file: StagedFile
    writable: bool


@dataclass(frozen=True, slots=True)
class BlobHandle:
    """A published file, or one of by-digest/."""

    blob: OpenBlob


@dataclass(frozen=True, slots=True)
class TextHandle:
    """A document of .castore/, made when it was opened."""

    data: bytes


Handle = StagedHandle | BlobHandle | TextHandle


class Handles:
    """Numbers for open files."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._handles: dict[int, Handle] = {}

    def add(self, handle: Handle) -> int:
        """A number for an open file."""
        number = next(self._numbers)
        self._handles[number] = handle
        return number

    def get(self, number: int) -> Handle:
        """The open file. Raises NotOpen."""
        try:
            return self._handles[number]
        except KeyError:
            raise NotOpen("no such open file") from None

    def staged(self, number: int) -> StagedHandle:
        """The open file of ingest/. Raises NotOpen for anything else."""
        handle = self.get(number)
        if not isinstance(handle, StagedHandle):
            raise NotOpen("not a file of ingest/")
        return handle

    def pop(self, number: int) -> Handle:
        """Forget a number. Raises NotOpen."""
        handle = self.get(number)
        del self._handles[number]
        return handle

    def __len__(self) -> int:
        return len(self._handles)
