"""Settings of storage backends, one class for each kind. Opens nothing, and knows no backend's code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from castore.config_values import SecretRef, Table

_BACKEND_ID: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_BACKEND_ID_RULE: Final = "1 to 64 letters, digits or ._-, the first a letter or digit"
_MIB: Final = 2**20
_PART_MIN_BYTES: Final = 5 * _MIB
"""The least that the S3 protocol allows for a part (Amazon S3 user guide, "multipart upload limits")."""
_PART_MAX_BYTES: Final = 5 * 1024 * _MIB
"""The most that it allows for a part, and for a put in one piece."""
_S3_KEYS: Final = (
    "endpoint_url",
    "region",
    "bucket",
    "key_prefix",
    "access_key_ref",
    "secret_key_ref",
    "storage_class",
    "sse",
    "multipart_threshold_bytes",
    "multipart_chunk_bytes",
)


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """A backend that is a directory of this host."""

    backend_type: ClassVar[str] = "local"

    backend_id: str
    path: Path

    @property
    def place(self) -> str:
        """Where its objects lie: two backends may not share it."""
        return str(self.path)


@dataclass(frozen=True, slots=True)
class S3Settings:
    """A backend that is a bucket. `key_prefix` has no slash at either end and may be empty; `sse` is None for none."""

    backend_type: ClassVar[str] = "s3"

    backend_id: str
    endpoint_url: str
    region: str
    bucket: str
    key_prefix: str
    access_key_ref: SecretRef
    secret_key_ref: SecretRef
    storage_class: str
    sse: str | None
    multipart_threshold_bytes: int
    multipart_chunk_bytes: int

    @property
    def place(self) -> str:
        """Where its objects lie: two backends may not share it."""
        return f"{self.endpoint_url}/{self.bucket}/{self.key_prefix}"


BackendSettings = LocalSettings | S3Settings


def parse_backends(top: Table) -> dict[str, BackendSettings]:
    """The backends of a configuration by their id, in the order of the file. Raises ConfigError."""
    table = top.table("backends", secret=True)
    backends: dict[str, BackendSettings] = {}
    for backend_id in table.names():
        if re.fullmatch(_BACKEND_ID, backend_id) is None:
            raise table.refuse(backend_id, f"a backend id: {_BACKEND_ID_RULE}", hide=True)
        backends[backend_id] = _backend(table, backend_id)
    if not backends:
        raise top.missing("backends", 'at least one backend: [backends.local] with type = "local" and a path')
    return backends


def _backend(table: Table, backend_id: str) -> BackendSettings:
    known = {"local": ("type", "path"), "s3": ("type", *_S3_KEYS)}
    every_key = tuple(dict.fromkeys(key for keys in known.values() for key in keys))
    backend_type = table.table(backend_id, every_key, secret=True).choice("type", None, tuple(known))
    settings = table.table(backend_id, known[backend_type], secret=True)
    if backend_type == "local":
        return LocalSettings(backend_id, settings.path("path", None))
    return _s3(settings, backend_id)


def _s3(table: Table, backend_id: str) -> S3Settings:
    return S3Settings(
        backend_id=backend_id,
        endpoint_url=table.text(
            "endpoint_url",
            None,
            allowed="http://HOST[:PORT] or https://HOST[:PORT], without credentials, path or query",
            pattern=r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?/?",
            hide_if="@",
        ).rstrip("/"),
        region=table.text(
            "region", "us-east-1", allowed="1 to 64 letters, digits or _-", pattern=r"[A-Za-z0-9_-]{1,64}"
        ),
        bucket=table.text(
            "bucket",
            None,
            allowed="a bucket's name: 3 to 63 letters, digits or ._-",
            pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}",
        ),
        key_prefix=table.text(
            "key_prefix",
            "castore",
            allowed="up to 512 letters, digits or ._-/, without a slash at either end or two in a row",
            pattern=r"(?=.{0,512}\Z)(?:[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*)?",
        ),
        access_key_ref=table.reference("access_key_ref"),
        secret_key_ref=table.reference("secret_key_ref"),
        storage_class=table.text(
            "storage_class", "STANDARD", allowed="1 to 64 letters, digits or _-", pattern=r"[A-Za-z0-9_-]{1,64}"
        ),
        sse=table.choice("sse", None, ("AES256", "aws:kms")) if "sse" in table else None,
        multipart_threshold_bytes=table.size("multipart_threshold_bytes", 16 * _MIB, maximum=_PART_MAX_BYTES),
        multipart_chunk_bytes=table.size(
            "multipart_chunk_bytes", 16 * _MIB, minimum=_PART_MIN_BYTES, maximum=_PART_MAX_BYTES
        ),
    )
