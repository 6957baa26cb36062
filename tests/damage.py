"""What can happen to a stored object, done to it through the storage contract: the same on every type of backend."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from castore.config import BackendSettings
from castore.digest import Digest
from castore.storage.open import open_backend
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend

Damage = Callable[[StorageBackend, Digest], Awaitable[None]]


async def read_object(backend: StorageBackend, digest: Digest) -> bytes:
    """All bytes that are stored under a digest."""
    size_bytes = (await backend.head(digest)).size_bytes
    return bytes(await backend.get(digest, offset=0, length=size_bytes))


async def replace(backend: StorageBackend, digest: Digest, data: bytes) -> None:
    """Store other bytes under the digest: backends trust whoever puts."""
    await backend.put(digest, BytesSource(data))


async def flip_a_bit(backend: StorageBackend, digest: Digest) -> None:
    """The last byte differs by one bit."""
    data = bytearray(await read_object(backend, digest))
    data[-1] ^= 1
    await replace(backend, digest, bytes(data))


async def cut_short(backend: StorageBackend, digest: Digest) -> None:
    """The last byte is gone."""
    await replace(backend, digest, (await read_object(backend, digest))[:-1])


async def empty(backend: StorageBackend, digest: Digest) -> None:
    """Nothing is left but the name."""
    await replace(backend, digest, b"")


async def extend(backend: StorageBackend, digest: Digest) -> None:
    """A byte is appended: what was asked for until now reads as before."""
    await replace(backend, digest, await read_object(backend, digest) + b"\0")


async def remove(backend: StorageBackend, digest: Digest) -> None:
    """The object is gone."""
    await backend.delete(digest)


async def put_another(backend: StorageBackend, digest: Digest) -> None:
    """Other bytes of the same length lie under the name."""
    size_bytes = (await backend.head(digest)).size_bytes
    await replace(backend, digest, bytes(reversed(range(256))) * (size_bytes // 256) + b"\xaa" * (size_bytes % 256))


DAMAGES: Final[dict[str, tuple[Damage, str]]] = {
    "one flipped bit": (flip_a_bit, "digest_mismatch"),
    "truncated": (cut_short, "size_mismatch"),
    "emptied": (empty, "size_mismatch"),
    "extended": (extend, "size_mismatch"),
    "missing": (remove, "missing"),
    "another object's bytes": (put_another, "digest_mismatch"),
}
"""Every kind, with the reason that verify gives."""


def do(settings: BackendSettings, damage: Damage, digest: Digest) -> None:
    """Damage an object from outside of any daemon."""

    async def run() -> None:
        backend = open_backend(settings)
        try:
            await damage(backend, digest)
        finally:
            await backend.aclose()

    trio.run(run)
