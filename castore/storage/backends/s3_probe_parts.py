"""What a probe asks of uploads in parts: whether they come back whole, wrong ones are refused, and aborted ones end."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import md5
from typing import Any, Final

from castore.errors import StorageUnavailable
from castore.storage.backends.s3_probe_place import ProbePlace, md5_base64
from castore.storage.probing import Question, Reply

_PART_MIN_BYTES: Final = 5 << 20
"""The least that a part may have, unless it is the last (Amazon S3 user guide, "multipart upload limits")."""


def part_questions(place: ProbePlace) -> tuple[Question, ...]:
    """In the order in which they are to be asked."""
    larger = "objects above `multipart_threshold_bytes`"
    return (
        Question(
            "parts-whole",
            "an object of two parts, sent in the other order",
            "comes back byte for byte",
            partial(_whole, place),
            f"{larger} cannot be trusted: set it to 5GiB, so that none is put in parts, or use another server",
        ),
        Question(
            "part-md5",
            "a part with a wrong Content-MD5",
            "refused",
            partial(_wrong_md5, place),
            f"parts that are damaged on their way are stored as they arrive: use https, and verify {larger}",
        ),
        Question(
            "part-etag",
            "completing with a wrong ETag of a part",
            "refused, nothing stored",
            partial(_refused, place, lambda part: [{**part, "ETag": f'"{"0" * 32}"'}]),
        ),
        Question(
            "part-missing",
            "completing with a part that was never sent",
            "refused, nothing stored",
            partial(_refused, place, lambda part: [{**part, "PartNumber": 1}, part]),
            f"a part that got lost is not noticed: verify {larger} after each publish",
        ),
        Question("part-too-small", "a first part under 5 MiB", "refused", partial(_too_small, place)),
        Question("parts-etag", "the ETag of an object in parts", "MD5 of the parts' MD5s", partial(_etag, place)),
        Question(
            "parts-listed",
            "the parts of an upload under way",
            "each with number, size and ETag",
            partial(_parts_listed, place),
            "an upload that was interrupted cannot go on, and begins anew",
        ),
        Question(
            "uploads-listed",
            "uploads under way below a prefix",
            "listed until they end",
            partial(_uploads_listed, place),
            "uploads that were interrupted stay and cost space: have the server's lifecycle rules abort old ones",
        ),
        Question(
            "abort",
            "an upload that is aborted",
            "gone, with its parts",
            partial(_abort, place),
            "uploads that were interrupted stay and cost space: have the server's lifecycle rules abort old ones",
        ),
        Question(
            "complete-create-only",
            "completing with If-None-Match: * for a key that is there",
            "412, the object is unchanged",
            partial(_create_only, place),
        ),
    )


async def _whole(place: ProbePlace) -> Reply:
    first, last = os.urandom(_PART_MIN_BYTES), os.urandom(1000)
    upload = await place.begin(place.new_key())
    second_part = await place.put_part(upload, 2, last)
    first_part = await place.put_part(upload, 1, first)
    answer = await place.complete(upload, [first_part, second_part])
    if not answer.good:
        return Reply("not supported", str(answer))
    size = (await place.head(upload["Key"])).fields.get("ContentLength")
    if size != len(first) + len(last):
        return Reply("no", f"HEAD says {size} bytes for the {len(first) + len(last)} that were sent")
    if (await place.get(upload["Key"])).body != first + last:
        return Reply("no", "other bytes come back than were sent")
    around = await place.get(upload["Key"], f"bytes={len(first) - 10}-{len(first) + 9}")
    if around.body != first[-10:] + last[:10]:
        return Reply("no", "a range over the edge of the parts has other bytes")
    return Reply("yes", "the same bytes")


async def _wrong_md5(place: ProbePlace) -> Reply:
    data = os.urandom(100)
    upload = await place.begin(place.new_key())
    await place.put_part(upload, 1, data)
    answer = await place.ask("upload_part", data, **upload, PartNumber=2, ContentMD5=md5_base64(data[::-1]))
    return Reply("no", f"the wrong one is taken: {answer}") if answer.good else Reply("yes", str(answer))


async def _refused(place: ProbePlace, named: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> Reply:
    upload = await place.begin(place.new_key())
    # The last one, as a small one before others is refused for its size.
    answer = await place.complete(upload, named(await place.put_part(upload, 2, os.urandom(100))))
    if answer.good:
        return Reply("no", f"taken: {answer}")
    if not (await place.head(upload["Key"])).says_missing:
        return Reply("no", f"{answer}, but something is stored")
    return Reply("yes", str(answer))


async def _too_small(place: ProbePlace) -> Reply:
    upload = await place.begin(place.new_key())
    answer = await place.complete(upload, [await place.put_part(upload, number, b"x" * 1000) for number in (1, 2)])
    return Reply("no", f"taken: {answer}") if answer.good else Reply("yes", str(answer))


async def _etag(place: ProbePlace) -> Reply:
    data = os.urandom(100)
    upload = await place.begin(place.new_key())
    answer = await place.complete(upload, [await place.put_part(upload, 1, data)])
    if not answer.good:
        return Reply("not supported", str(answer))
    expected = md5(md5(data, usedforsecurity=False).digest(), usedforsecurity=False).hexdigest() + "-1"
    said = str(answer.fields.get("ETag", "")).strip('"')
    kept = str((await place.head(upload["Key"])).fields.get("ETag", "")).strip('"')
    if kept != expected:
        return Reply("no", "there is none" if not kept else "another value")
    return Reply("yes", "it is" if said == expected else "it is; not in the answer to completing")


async def _parts_listed(place: ProbePlace) -> Reply:
    upload = await place.begin(place.new_key())
    sent = {}
    for number in (1, 2):
        part = await place.put_part(upload, number, b"x" * (number * 100))
        sent[number] = number * 100, part["ETag"].strip('"')
    answer = await place.ask("list_parts", **upload)
    if not answer.good:
        return Reply("not supported", str(answer))
    listed = {part["PartNumber"]: (part["Size"], part["ETag"].strip('"')) for part in answer.fields.get("Parts", ())}
    return Reply("yes", "just those") if listed == sent else Reply("no", f"{len(listed)} parts, not as they were sent")


async def _uploads_listed(place: ProbePlace) -> Reply:
    folder = place.new_key("")
    begun = [(await place.begin(place.add_key(f"{folder}{name}")))["UploadId"] for name in "ab"]
    answer = await place.ask("list_multipart_uploads", Prefix=folder)
    if not answer.good:
        return Reply("not supported", str(answer))
    listed = [upload["UploadId"] for upload in answer.fields.get("Uploads", ())]
    if sorted(listed) == sorted(begun):
        return Reply("yes", "just those")
    return Reply("no", f"{len(set(begun) - set(listed))} of {len(begun)} are not listed")


async def _abort(place: ProbePlace) -> Reply:
    upload = await place.begin(place.new_key())
    part = await place.put_part(upload, 1, os.urandom(100))
    answer = await place.ask("abort_multipart_upload", **upload)
    if not answer.good:
        return Reply("not supported", str(answer))
    if (await place.ask("list_parts", **upload)).good:
        return Reply("no", "its parts are still listed")
    listed = (await place.done("list_multipart_uploads", Prefix=upload["Key"])).fields.get("Uploads", ())
    if listed:
        return Reply("no", "it is still listed")
    with suppress(StorageUnavailable):  # some servers answer 500
        if (await place.complete(upload, [part])).good:
            return Reply("no", "it can still be completed")
    return Reply("yes", str(answer))


async def _create_only(place: ProbePlace) -> Reply:
    key = place.new_key()
    await place.put(key, b"x")
    upload = await place.begin(key)
    answer = await place.complete(upload, [await place.put_part(upload, 1, os.urandom(100))], IfNoneMatch="*")
    if answer.good:
        return Reply("no", f"it is replaced: {answer}")
    if (await place.get(key)).body != b"x":
        return Reply("no", f"{answer}, but the object has changed")
    return Reply("yes", str(answer))
