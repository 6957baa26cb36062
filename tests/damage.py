"""What can happen to a stored object, done to it past castore: to the file, or with a plain S3 client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from boto3.session import Session
from botocore.config import Config

from castore.config import BackendSettings, LocalSettings, S3Settings
from castore.digest import Digest
from castore.storage.layout import key_of

Damage = Callable[[BackendSettings, Digest], None]


def read_object(settings: BackendSettings, digest: Digest) -> bytes:
    """All bytes that are stored under a digest."""
    if isinstance(settings, LocalSettings):
        return _path(settings, digest).read_bytes()
    return _ask(settings, "get_object", digest)


def replace(settings: BackendSettings, digest: Digest, data: bytes) -> None:
    """Store other bytes under the digest."""
    if isinstance(settings, LocalSettings):
        _path(settings, digest).write_bytes(data)
    else:
        _ask(settings, "put_object", digest, Body=data)


def flip_a_bit(settings: BackendSettings, digest: Digest) -> None:
    """The last byte differs by one bit."""
    data = bytearray(read_object(settings, digest))
    data[-1] ^= 1
    replace(settings, digest, bytes(data))


def cut_short(settings: BackendSettings, digest: Digest) -> None:
    """The last byte is gone."""
    replace(settings, digest, read_object(settings, digest)[:-1])


def empty(settings: BackendSettings, digest: Digest) -> None:
    """Nothing is left but the name."""
    replace(settings, digest, b"")


def extend(settings: BackendSettings, digest: Digest) -> None:
    """A byte is appended: what was asked for until now reads as before."""
    replace(settings, digest, read_object(settings, digest) + b"\0")


def remove(settings: BackendSettings, digest: Digest) -> None:
    """The object is gone."""
    if isinstance(settings, LocalSettings):
        _path(settings, digest).unlink()
    else:
        _ask(settings, "delete_object", digest)


def put_another(settings: BackendSettings, digest: Digest) -> None:
    """Other bytes of the same length lie under the name."""
    size_bytes = len(read_object(settings, digest))
    replace(settings, digest, bytes(reversed(range(256))) * (size_bytes // 256) + b"\xaa" * (size_bytes % 256))


DAMAGES: Final[dict[str, tuple[Damage, str]]] = {
    "one flipped bit": (flip_a_bit, "digest_mismatch"),
    "truncated": (cut_short, "size_mismatch"),
    "emptied": (empty, "size_mismatch"),
    "extended": (extend, "size_mismatch"),
    "missing": (remove, "missing"),
    "another object's bytes": (put_another, "digest_mismatch"),
}
"""Every kind, with the reason that verify gives."""


def _path(settings: LocalSettings, digest: Digest) -> Path:
    return settings.path / key_of(digest)


def _ask(settings: S3Settings, operation: str, digest: Digest, **params: Any) -> bytes:
    """Do one operation on the object; the body of the answer, empty when it has none."""
    assert settings.access_key_ref is not None
    assert settings.secret_key_ref is not None
    client = Session().client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        aws_access_key_id=settings.access_key_ref.resolve(),
        aws_secret_access_key=settings.secret_key_ref.resolve(),
        verify=str(settings.ca_bundle) if settings.ca_bundle else None,
        config=Config(s3={"addressing_style": "path"}, proxies={}, request_checksum_calculation="when_required"),
    )
    try:
        key = f"{settings.key_prefix}/{key_of(digest)}".lstrip("/")
        answer = getattr(client, operation)(Bucket=settings.bucket, Key=key, **params)
        return bytes(answer["Body"].read()) if "Body" in answer else b""
    finally:
        client.close()
