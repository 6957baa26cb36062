"""Settings of storage backends, one class for each kind. Opens nothing, and knows no backend's code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from castore.config_values import SecretRef, Table
from castore.digest import CHECKSUM_BYTES, XXH3

_BACKEND_ID: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_BACKEND_ID_RULE: Final = "1 to 64 letters, digits or ._-, the first a letter or digit"
_MIB: Final = 2**20
_PART_MIN_BYTES: Final = 5 * _MIB
"""The least that the S3 protocol allows for a part (Amazon S3 user guide, "multipart upload limits")."""
_PART_MAX_BYTES: Final = 5 * 1024 * _MIB
"""The most that it allows for a part, and for a put in one piece."""
KEY_REFERENCES: Final = ("access_key_ref", "secret_key_ref", "session_token_ref")
_S3_KEYS: Final = (
    "endpoint_url",
    "addressing_style",
    "region",
    "bucket",
    "key_prefix",
    *KEY_REFERENCES,
    "storage_class",
    "sse",
    "sse_kms_key_id",
    "multipart_threshold_bytes",
    "multipart_chunk_bytes",
    "ca_bundle",
    "connect_timeout",
    "read_timeout",
    "max_connections",
    "transfer",
    "block_digest",
)
CONNECT_TIMEOUT_S: Final = 5.0
"""Seconds for a connection: a host that is up answers in less than one, also across an ocean."""
READ_TIMEOUT_S: Final = 30.0
"""Seconds of silence that end a request, as long as a deadline allows for a call that moves no bytes."""
MAX_CONNECTIONS: Final = 64
"""Connections at a time. Above what the bounds on reads, writes and parts allow together."""
_CONNECTIONS_BOUND: Final = 512
"""Half of the files that a process may usually have open; the rest are users' files and the cache."""


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """A backend that is a directory of this host. `block_digest` is how blocks are checked that lie there."""

    backend_type: ClassVar[str] = "local"

    backend_id: str
    path: Path
    block_digest: str = XXH3

    @property
    def place(self) -> str:
        """Where its objects lie: two backends may not share it."""
        return str(self.path)


@dataclass(frozen=True, slots=True)
class S3Settings:
    """A backend that is a bucket. `key_prefix` has no slash at either end and may be empty; `sse` is None for none.

    Both references are None where the standard AWS credential chain decides, else neither is. `sse_kms_key_id` is
    given for `sse` "aws:kms" alone. Without a `ca_bundle` the authorities of the host are trusted. The field of a
    timeout ends in `_seconds`, its key does not. `block_digest` is how blocks are checked that lie there.
    """

    backend_type: ClassVar[str] = "s3"

    backend_id: str
    endpoint_url: str
    region: str
    bucket: str
    key_prefix: str
    access_key_ref: SecretRef | None
    secret_key_ref: SecretRef | None
    storage_class: str
    sse: str | None
    multipart_threshold_bytes: int
    multipart_chunk_bytes: int
    session_token_ref: SecretRef | None = None
    sse_kms_key_id: str | None = None
    addressing_style: str = "path"
    ca_bundle: Path | None = None
    connect_timeout_seconds: float = CONNECT_TIMEOUT_S
    read_timeout_seconds: float = READ_TIMEOUT_S
    max_connections: int = MAX_CONNECTIONS
    transfer: str = "native"
    block_digest: str = XXH3

    @property
    def place(self) -> str:
        """Where its objects lie: two backends may not share it."""
        return f"{self.endpoint_url}/{self.bucket}/{self.key_prefix}"

    @property
    def references(self) -> tuple[SecretRef, ...]:
        """The references to secrets that are set."""
        every = (self.access_key_ref, self.secret_key_ref, self.session_token_ref)
        return tuple(reference for reference in every if reference is not None)


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
    known = {"local": ("type", "path", "block_digest"), "s3": ("type", *_S3_KEYS)}
    every_key = tuple(dict.fromkeys(key for keys in known.values() for key in keys))
    backend_type = table.table(backend_id, every_key, secret=True).choice("type", None, tuple(known))
    settings = table.table(backend_id, known[backend_type], secret=True)
    if backend_type == "local":
        return LocalSettings(backend_id, settings.path("path", None), _block_digest(settings))
    return _s3(settings, backend_id)


def _s3(table: Table, backend_id: str) -> S3Settings:
    endpoint_url = table.text(
        "endpoint_url",
        None,
        allowed="http://HOST[:PORT] or https://HOST[:PORT], without credentials, path or query",
        pattern=r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?/?",
        hide_if="@",
    ).rstrip("/")
    bucket = table.text(
        "bucket",
        None,
        allowed="a bucket's name: 3 to 63 letters, digits or ._-",
        pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}",
    )
    access_key_ref, secret_key_ref, session_token_ref = key_references(table)
    sse = table.choice("sse", None, ("AES256", "aws:kms")) if "sse" in table else None
    return S3Settings(
        backend_id=backend_id,
        endpoint_url=endpoint_url,
        addressing_style=_addressing_style(table, endpoint_url, bucket),
        region=table.text(
            "region", "us-east-1", allowed="1 to 64 letters, digits or _-", pattern=r"[A-Za-z0-9_-]{1,64}"
        ),
        bucket=bucket,
        key_prefix=table.text(
            "key_prefix",
            "castore",
            allowed="up to 512 letters, digits or ._-/, without a slash at either end or two in a row",
            pattern=r"(?=.{0,512}\Z)(?:[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*)?",
        ),
        access_key_ref=access_key_ref,
        secret_key_ref=secret_key_ref,
        session_token_ref=session_token_ref,
        storage_class=table.text(
            "storage_class", "STANDARD", allowed="1 to 64 letters, digits or _-", pattern=r"[A-Za-z0-9_-]{1,64}"
        ),
        sse=sse,
        sse_kms_key_id=_sse_kms_key_id(table, sse),
        multipart_threshold_bytes=table.size("multipart_threshold_bytes", 16 * _MIB, maximum=_PART_MAX_BYTES),
        multipart_chunk_bytes=table.size(
            "multipart_chunk_bytes", 16 * _MIB, minimum=_PART_MIN_BYTES, maximum=_PART_MAX_BYTES
        ),
        ca_bundle=_ca_bundle(table, endpoint_url),
        # Above the bound of a call's deadline neither would ever be reached.
        connect_timeout_seconds=table.duration(
            "connect_timeout", f"{CONNECT_TIMEOUT_S:g}s", minimum="100ms", maximum="30s"
        ),
        read_timeout_seconds=table.duration("read_timeout", f"{READ_TIMEOUT_S:g}s", minimum="100ms", maximum="10min"),
        max_connections=table.count("max_connections", MAX_CONNECTIONS, minimum=1, maximum=_CONNECTIONS_BOUND),
        transfer=table.choice("transfer", "native", ("native", "aioboto3")),
        block_digest=_block_digest(table),
    )


def _block_digest(table: Table) -> str:
    return table.choice("block_digest", XXH3, tuple(CHECKSUM_BYTES))


def key_references(table: Table) -> tuple[SecretRef | None, SecretRef | None, SecretRef | None]:
    """Of the key's id, the key and the session token: all that are set, and none without the first two."""
    given = [key for key in KEY_REFERENCES if key in table]
    for key in KEY_REFERENCES[:2]:
        if given and key not in given:
            raise table.missing(key, f"a reference, as {given[0]} is one; without any the AWS credential chain decides")
    access, secret, token = (table.reference(key) if key in table else None for key in KEY_REFERENCES)
    return access, secret, token


def _addressing_style(table: Table, endpoint_url: str, bucket: str) -> str:
    """`virtual` only where the bucket can be a part of the host's name: elsewhere the client library uses paths."""
    style = table.choice("addressing_style", "path", ("path", "virtual"))
    if style == "path":
        return style
    host = endpoint_url.partition("://")[2]
    if host.startswith("[") or re.fullmatch(r"[0-9.]+(?::[0-9]+)?", host):
        raise table.refuse("addressing_style", f'"path": endpoint_url = "{endpoint_url}" has an address, not a name')
    if re.fullmatch(r"[a-z0-9][a-z0-9-]+[a-z0-9]", bucket) is None:
        raise table.refuse("addressing_style", f'"path": a host\'s name cannot begin with bucket = "{bucket}"')
    return style


def _sse_kms_key_id(table: Table, sse: str | None) -> str | None:
    if "sse_kms_key_id" not in table:
        return None
    allowed = "the id, ARN or alias of a key: up to 2048 letters, digits or :/._-"
    key_id = table.text("sse_kms_key_id", None, allowed=allowed, pattern=r"[A-Za-z0-9:/._-]{1,2048}")
    if sse != "aws:kms":
        raise table.refuse("sse_kms_key_id", 'to be left out, or sse = "aws:kms" beside it')
    return key_id


def _ca_bundle(table: Table, endpoint_url: str) -> Path | None:
    if "ca_bundle" not in table:
        return None
    if not endpoint_url.startswith("https:"):
        raise table.refuse("ca_bundle", f'to be left out, or https in endpoint_url = "{endpoint_url}"')
    return table.path("ca_bundle", None)
