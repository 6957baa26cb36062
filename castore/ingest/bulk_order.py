"""What an import is told, and what it tells of itself: values, and the form in which a daemon is told.."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from castore.errors import CastoreError
from castore.registry.names import parse_ref


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOrder:
    """What is imported, as what, and for whom. Root's imports keep owners; those of others belong to them."""

    directory: bytes
    """Absolute."""
    name: str
    version: str
    uid: int
    gid: int
    name_mode: int = 0o755
    """Permission bits of ingest/NAME, if it has to be made."""
    producer: str | None = None
    retention_class: str | None = None
    resume: bool = False
    """Also make a version like the directory that no import made."""

    @property
    def ref(self) -> str:
        """`NAME/VERSION`."""
        return f"{self.name}/{self.version}"

    def to_request(self) -> dict[str, Any]:
        """As parameters of the command `import` on the control socket."""
        fields = asdict(self)
        del fields["name"], fields["version"]
        return fields | {"ref": self.ref, "directory": os.fsdecode(self.directory)}

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> ImportOrder:
        """What `to_request` wrote. Raises CastoreError for what is no such thing."""
        name, version = parse_ref(str(request.get("ref", "")))
        directory = os.fsencode(str(request.get("directory", "")))
        numbers = [request.get(key) for key in ("uid", "gid", "name_mode")]
        labels = [request.get(key) for key in ("producer", "retention_class")]
        if not directory.startswith(b"/") or not all(isinstance(number, int) for number in numbers):
            raise CastoreError("the request is no import: it needs directory, an absolute path, uid, gid and name_mode")
        if not all(label is None or isinstance(label, str) for label in labels):
            raise CastoreError("the request is no import: producer and retention_class are texts")
        uid, gid, name_mode = (int(number or 0) for number in numbers)
        return cls(
            directory=directory,
            name=name,
            version=version,
            uid=uid,
            gid=gid,
            name_mode=name_mode & 0o777,
            producer=labels[0],
            retention_class=labels[1],
            resume=request.get("resume") is True,
        )


@dataclass(frozen=True, slots=True)
class ImportProgress:
    """How far an import is. What was counted is 0 until the directory was walked once. A file with many names is one.

    `kept` is what the version had already when the import began, `stored` what of all of it its backends have.
    """

    total_names: int
    total_files: int
    total_bytes: int
    copied_files: int
    copied_bytes: int
    kept_files: int
    kept_bytes: int
    stored_files: int
    stored_bytes: int
