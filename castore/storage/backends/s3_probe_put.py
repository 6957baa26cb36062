"""What a probe asks of puts: which wrong values are refused, and what of a put is kept. Asks nothing of ranges."""

from __future__ import annotations

import os
import zlib
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import md5, sha1, sha256
from typing import TYPE_CHECKING, Any, Final

import trio

from castore.errors import StorageError
from castore.storage.backends.s3_probe_place import ProbePlace, md5_base64
from castore.storage.probing import Question, Reply

if TYPE_CHECKING:
    from castore.storage.backends.s3_probe_requests import Answer

_RACERS: Final = 8
"""Puts of one key at a time, as many as a store does."""
_CRC32C: Final = 0x82F63B78, 32
_CRC64NVME: Final = 0x9A6C9329AC4BC9B5, 64
"""Reversed polynomials and their width (RFC 9260 appendix B; NVM Express base specification 2.0, 64b CRC)."""


def put_questions(place: ProbePlace) -> tuple[Question, ...]:
    """In the order in which they are to be asked."""
    return (
        Question(
            "put-md5",
            "a put with a wrong Content-MD5",
            "refused, nothing stored",
            partial(_wrong_md5, place),
            "bytes that are damaged on their way to the server are stored as they arrive: use https, verify what is "
            "published, and do not take this server for the only copy",
        ),
        Question(
            "payload-sha256",
            "a put whose body is not what x-amz-content-sha256 says",
            "refused, nothing stored",
            partial(_wrong_payload, place),
        ),
        *(
            Question(
                f"checksum-{name}",
                f"a put with a wrong x-amz-checksum-{name}",
                "refused; a right one is kept and returned",
                partial(_wrong_checksum, place, name, of),
            )
            for name, of in _CHECKSUMS.items()
        ),
        Question("put-etag", "the ETag of a put", "the MD5 of its body", partial(_put_etag, place)),
        Question(
            "put-payload",
            "a body that looks like aws-chunked framing",
            "comes back byte for byte",
            partial(_plain_payload, place),
            "what is stored is not what was sent: take away the proxy that rewrites bodies, or use another server",
        ),
        Question(
            "put-trailer",
            "a put in aws-chunked framing with a checksum behind it",
            "comes back without the framing",
            partial(_framed_payload, place),
        ),
        Question(
            "create-only",
            "a put with If-None-Match: * of a key that is there",
            "412, the object is unchanged",
            partial(_create_only, place),
        ),
        Question(
            "create-only-race",
            f"{_RACERS} such puts of a new key at a time",
            "one wins, and its bytes are stored",
            partial(_create_only_race, place),
        ),
        Question(
            "storage-class",
            f"a put with storage class {place.settings.storage_class}",
            "taken, and said of the object",
            partial(_storage_class, place),
        ),
        Question(
            "encryption",
            f"a put with server-side encryption {place.settings.sse or 'AES256'}",
            "taken, and said of the object",
            partial(_encryption, place),
            "the configuration has `sse`, and nothing proves that objects are encrypted: ask who runs the server, or "
            "take the setting away"
            if place.settings.sse
            else "",
        ),
    )


async def _wrong_md5(place: ProbePlace) -> Reply:
    data = os.urandom(100)

    async def put(of: bytes, key: str) -> Answer:
        return await place.ask("put_object", data, Key=key, ContentMD5=md5_base64(of))

    return await place.refuses_wrong(partial(put, data), partial(put, data[::-1]))


async def _wrong_payload(place: ProbePlace) -> Reply:
    data = os.urandom(100)

    async def put(damaged: bool, key: str) -> Answer:
        return await place.ask("put_object", data, damaged=damaged, Key=key)

    return await place.refuses_wrong(partial(put, False), partial(put, True))


async def _wrong_checksum(place: ProbePlace, name: str, of: Callable[[bytes], bytes]) -> Reply:
    data = os.urandom(100)
    parameter = f"Checksum{name.upper()}"
    right = b64encode(of(data)).decode()
    kept: list[str] = []

    async def put_right(key: str) -> Answer:
        header: dict[str, Any] = {parameter: right}
        answer = await place.ask("put_object", data, Key=key, **header)
        head = await place.ask("head_object", Key=key, ChecksumMode="ENABLED")
        kept.append("returned" if head.fields.get(parameter) == right else "not returned")
        return answer

    async def put_wrong(key: str) -> Answer:
        header: dict[str, Any] = {parameter: b64encode(of(data[::-1])).decode()}
        return await place.ask("put_object", data, Key=key, **header)

    reply = await place.refuses_wrong(put_right, put_wrong)
    if reply.enforced == "not supported":
        return reply
    return Reply(reply.enforced, f"{reply.answer}; a right one is {kept[-1]}")


async def _put_etag(place: ProbePlace) -> Reply:
    data = os.urandom(100)
    key = place.new_key()
    said = str((await place.put(key, data)).fields.get("ETag", "")).strip('"')
    kept = str((await place.head(key)).fields.get("ETag", "")).strip('"')
    expected = md5(data, usedforsecurity=False).hexdigest()
    if said == kept == expected:
        return Reply("yes", "it is")
    return Reply("no", "there is none" if not kept else "another value" if kept != expected else "not in the answer")


async def _plain_payload(place: ProbePlace) -> Reply:
    data = b"5;chunk-signature=" + b"0" * 64 + b"\r\nhello\r\n0;chunk-signature=" + b"0" * 64 + b"\r\n\r\n"
    key = place.new_key()
    await place.put(key, data)
    return _same_bytes(data, await place.get(key))


async def _framed_payload(place: ProbePlace) -> Reply:
    data = os.urandom(100)
    key = place.new_key()
    answer = await place.ask("put_object", data, trailer="crc32", Key=key)
    return _same_bytes(data, await place.get(key)) if answer.good else Reply("not supported", str(answer))


def _same_bytes(data: bytes, answer: Answer) -> Reply:
    if not answer.good:
        return Reply("no", str(answer))
    if answer.body == data:
        return Reply("yes", f"{len(data)} bytes, the same")
    return Reply("no", f"{len(answer.body)} bytes for the {len(data)} that were sent, and not the same")


async def _create_only(place: ProbePlace) -> Reply:
    first, second = os.urandom(100), os.urandom(100)
    key = place.new_key()
    answer = await place.ask("put_object", first, Key=key, IfNoneMatch="*")
    if not answer.good:
        return Reply("not supported", f"refused also for a new key: {answer}")
    answer = await place.ask("put_object", second, Key=key, IfNoneMatch="*")
    if answer.good:
        return Reply("no", f"it is replaced: {answer}")
    if (await place.get(key)).body != first:
        return Reply("no", f"{answer}, but the object has changed")
    return Reply("yes", str(answer))


async def _create_only_race(place: ProbePlace) -> Reply:
    key = place.new_key()
    bodies = [os.urandom(100) for _ in range(_RACERS)]
    answers: dict[bytes, Answer] = {}

    async def race(body: bytes) -> None:
        with suppress(StorageError):  # losers may be told so by a 5xx
            answers[body] = await place.ask("put_object", body, Key=key, IfNoneMatch="*")

    async with trio.open_nursery() as nursery:
        for body in bodies:
            nursery.start_soon(race, body)
    winners = [body for body, answer in answers.items() if answer.good]
    if not winners:
        return Reply("not supported", "all are refused")
    stored = (await place.get(key)).body
    if len(winners) == 1 and stored == winners[0]:
        return Reply("yes", f"1 of {_RACERS} wins")
    if len(winners) == 1:
        return Reply("no", "the winner's bytes are not there")
    return Reply("no", f"{len(winners)} of {_RACERS} are told that they won")


async def _storage_class(place: ProbePlace) -> Reply:
    wanted = place.settings.storage_class
    key = place.new_key()
    answer = await place.ask("put_object", b"x", Key=key, StorageClass=wanted)
    if not answer.good:
        return Reply("not supported", str(answer))
    # The header is absent for the class STANDARD (Amazon S3 API, HeadObject).
    said = (await place.head(key)).fields.get("StorageClass", "STANDARD")
    return Reply("yes" if said == wanted else "no", str(said))


async def _encryption(place: ProbePlace) -> Reply:
    wanted = place.settings.sse or "AES256"
    key = place.new_key()
    named: dict[str, Any] = {"SSEKMSKeyId": place.settings.sse_kms_key_id} if place.settings.sse_kms_key_id else {}
    answer = await place.ask("put_object", b"x", Key=key, ServerSideEncryption=wanted, **named)
    if not answer.good:
        return Reply("not supported", str(answer))
    said = (await place.head(key)).fields.get("ServerSideEncryption")
    return Reply("yes" if said == wanted else "no", str(said or "taken, and not said of the object"))


def crc(data: bytes, polynomial: int, width: int) -> bytes:
    """A reflected CRC with all bits set before and inverted after, bit by bit: for a hundred bytes, not for a store."""
    value = (1 << width) - 1
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (polynomial if value & 1 else 0)
    return (value ^ ((1 << width) - 1)).to_bytes(width // 8)


_CHECKSUMS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "crc32": lambda data: zlib.crc32(data).to_bytes(4),
    "crc32c": lambda data: crc(data, *_CRC32C),
    "sha1": lambda data: sha1(data, usedforsecurity=False).digest(),
    "sha256": lambda data: sha256(data).digest(),
    "crc64nvme": lambda data: crc(data, *_CRC64NVME),
}
