"""What a probe asks of reads and listings: exact ranges, what is there right after a write, keys, order and pages."""

from __future__ import annotations

import os
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from castore.storage.backends.s3_probe_place import ProbePlace
from castore.storage.probing import Question, Reply

if TYPE_CHECKING:
    from castore.storage.backends.s3_probe_requests import Answer

_SIZE: Final = 200_000
_SPANS: Final = ((0, 0), (0, 99), (1, 131_072), (131_072, 131_171), (_SIZE - 1, _SIZE - 1), (0, _SIZE - 1))
"""First and last byte of ranges over the edges where servers cut objects: blocks of 64 and of 128 KiB."""
_ROUNDS: Final = 5
"""A stale answer comes from a copy that is behind, and not every time."""
_LISTED: Final = 12
_PAGE: Final = 5
"""Keys of a page: twelve make three, the last one short."""
_PREFIX_NAME: Final = "Az09._-"
"""One of each kind that a `key_prefix` may hold."""
_ODD_NAME: Final = "a b+c%20d&e=f~é'(!)*,;:@$"


def read_questions(place: ProbePlace) -> tuple[Question, ...]:
    """In the order in which they are to be asked."""
    return (
        Question(
            "range",
            f"{len(_SPANS)} ranges of an object",
            "206, just those bytes",
            partial(_ranges, place),
            "nothing can be read but by loading whole objects, or not at all: use another server, or take away the "
            "proxy that ignores ranges",
        ),
        Question(
            "range-past-end",
            "ranges that begin or end behind the last byte",
            "416, or up to the end and the true size",
            partial(_past_end, place),
            "an object that lost its end is taken for a server that is away, and is read again in vain",
        ),
        Question("range-suffix", "the last 10 bytes", "206, just those bytes", partial(_suffix, place)),
        Question("range-empty", "a range of an empty object", "416", partial(_empty, place)),
        Question(
            "missing",
            "an object that was never put",
            "404",
            partial(_missing, place),
            "an object that is lost is taken for a server that is away: give these keys the right to list the bucket, "
            "or use another server",
        ),
        Question(
            "read-after-write",
            "an object right after it was put, and put again",
            "the new bytes and the new size",
            partial(_read_after_write, place),
            "what was just published may not be readable, and a repair not be seen: use the server's strong "
            "consistency, and no cache before it",
        ),
        Question(
            "read-after-delete",
            "an object right after it was deleted",
            "404",
            partial(_read_after_delete, place),
            "what was deleted seems to be stored: use the server's strong consistency, and no cache before it",
        ),
        Question("delete-missing", "a delete of what is not there", "succeeds", partial(_delete_missing, place)),
        Question(
            "list-after-write",
            "a listing right after puts and a delete",
            "what is there, with its size",
            partial(_list_after_write, place),
            "lists of what is stored are behind: a rebuild would miss packages, and garbage collection objects",
        ),
        Question(
            "list-pages",
            f"{_LISTED} keys in pages of {_PAGE}",
            "each once",
            partial(_list_pages, place),
            "what is stored cannot be listed: a rebuild would miss packages, and garbage collection objects",
        ),
        Question(
            "list-order",
            "the order of that listing",
            "ascending",
            partial(_list_order, place),
            "comparing what is stored with the catalog needs that order: use another server",
        ),
        Question(
            "key-prefix",
            f"the key {_PREFIX_NAME}/{'a' * 64}",
            "put, listed and read under that name",
            partial(_key, place, f"{_PREFIX_NAME}/{'a' * 64}"),
            "objects cannot be found again under some prefixes: choose a `key_prefix` of lower-case letters and digits",
        ),
        Question(
            "key-odd", f"the key {_ODD_NAME}", "put, listed and read under that name", partial(_key, place, _ODD_NAME)
        ),
    )


async def _ranges(place: ProbePlace) -> Reply:
    data = os.urandom(_SIZE)
    key = place.new_key()
    await place.put(key, data)
    for first, last in _SPANS:
        answer = await place.get(key, f"bytes={first}-{last}")
        wrong = _not_the_range(answer, data, first, last)
        if wrong:
            return Reply("no", f"{first}-{last}: {wrong}")
    return Reply("yes", "206, just those bytes")


def _not_the_range(answer: Answer, data: bytes, first: int, last: int) -> str:
    """What is wrong about an answer to a request for a range; empty when nothing is."""
    if answer.status != 206:
        return str(answer) + (f" with {len(answer.body)} bytes" if answer.good else "")
    said = answer.fields.get("ContentRange")
    if said != f"bytes {first}-{last}/{len(data)}":
        return f"Content-Range is {said}"
    if answer.body != data[first : last + 1]:
        return f"{len(answer.body)} bytes, and not those"
    return ""


async def _past_end(place: ProbePlace) -> Reply:
    data = os.urandom(1000)
    key = place.new_key()
    await place.put(key, data)
    said = []
    for first, last in ((1000, 1009), (5000, 5009), (990, 1009)):
        answer = await place.get(key, f"bytes={first}-{last}")
        if answer.status != 416 and (first >= len(data) or _not_the_range(answer, data, first, len(data) - 1)):
            return Reply("no", f"{first}-{last} of {len(data)}: {answer} with {len(answer.body)} bytes")
        said.append(str(answer.status))
    return Reply("yes", ", ".join(said))


async def _suffix(place: ProbePlace) -> Reply:
    data = os.urandom(1000)
    key = place.new_key()
    await place.put(key, data)
    wrong = _not_the_range(await place.get(key, "bytes=-10"), data, 990, 999)
    return Reply("no", wrong) if wrong else Reply("yes", "206, just those bytes")


async def _empty(place: ProbePlace) -> Reply:
    key = place.new_key()
    await place.put(key, b"")
    answer = await place.get(key, "bytes=0-9")
    return Reply("yes" if answer.status == 416 else "no", str(answer))


async def _missing(place: ProbePlace) -> Reply:
    key = place.new_key()
    answers = [await place.get(key), await place.get(key, "bytes=0-9"), await place.head(key)]
    for answer in answers:
        if not answer.says_missing:
            return Reply("no", str(answer))
    return Reply("yes", str(answers[0]))


async def _read_after_write(place: ProbePlace) -> Reply:
    for size in range(1000, 1000 + _ROUNDS):
        key = place.new_key()
        await place.head(key)  # an answer that may be remembered wrongly
        for data in (os.urandom(size), os.urandom(size + 100)):
            await place.put(key, data)
            answer = await place.get(key)
            if answer.body != data:
                return Reply("no", f"{answer}: not what was put a moment before")
            head = await place.head(key)
            if head.fields.get("ContentLength") != len(data):
                return Reply("no", f"{head}: HEAD says {head.fields.get('ContentLength')} bytes, {len(data)} were put")
    return Reply("yes", "the new bytes and the new size")


async def _read_after_delete(place: ProbePlace) -> Reply:
    for _ in range(_ROUNDS):
        key = place.new_key()
        await place.put(key, b"x")
        await place.get(key)
        await place.done("delete_object", Key=key)
        for answer in (await place.get(key), await place.head(key)):
            if not answer.says_missing:
                return Reply("no", str(answer))
    return Reply("yes", "404")


async def _delete_missing(place: ProbePlace) -> Reply:
    answer = await place.ask("delete_object", Key=place.new_key())
    return Reply("yes" if answer.good else "no", str(answer))


async def _list_after_write(place: ProbePlace) -> Reply:
    folder = place.new_key("")
    keys = [place.add_key(f"{folder}{number}") for number in range(_ROUNDS)]
    for size, key in enumerate(keys):
        await place.put(key, b"x" * size)
        listed = await _listed(place, folder)
        if listed.get(key) != size:
            return Reply(
                "no", "an object is not listed" if key not in listed else f"its size is {listed[key]}, not {size}"
            )
    await place.done("delete_object", Key=keys[0])
    listed = await _listed(place, folder)
    if sorted(listed) != keys[1:]:
        return Reply("no", "a deleted object is listed" if keys[0] in listed else "objects are missing")
    return Reply("yes", "just what is there")


async def _listed(place: ProbePlace, folder: str) -> dict[str, Any]:
    page = await place.done("list_objects_v2", Prefix=folder)
    return {entry["Key"]: entry["Size"] for entry in page.fields.get("Contents", ())}


async def _put_many(place: ProbePlace) -> tuple[str, list[str]]:
    """A folder with keys as the layout has them, put in no order: it and they, in order."""
    folder = place.new_key("")
    names = [sha256(str(number).encode()).hexdigest() for number in range(_LISTED)]
    keys = [place.add_key(f"{folder}{name[:2]}/{name[2:4]}/{name}") for name in names]
    for key in keys:
        await place.put(key, b"x")
    return folder, sorted(keys)


async def _pages(place: ProbePlace, folder: str) -> list[list[str]]:
    pages: list[list[str]] = []
    position: dict[str, Any] = {}
    while len(pages) <= _LISTED:  # one that goes round in circles ends
        answer = await place.done("list_objects_v2", Prefix=folder, MaxKeys=_PAGE, **position)
        pages.append([entry["Key"] for entry in answer.fields.get("Contents", ())])
        position = {"ContinuationToken": answer.fields.get("NextContinuationToken")}
        if not answer.fields.get("IsTruncated") or position["ContinuationToken"] is None:
            break
    return pages


async def _list_pages(place: ProbePlace) -> Reply:
    folder, keys = await _put_many(place)
    pages = await _pages(place, folder)
    listed = [key for page in pages for key in page]
    if sorted(listed) == keys:
        return Reply("yes", f"{len(listed)} keys in {len(pages)} pages")
    return Reply(
        "no", f"{len(listed)} keys in {len(pages)} pages, {len(set(keys) - set(listed))} of {len(keys)} missing"
    )


async def _list_order(place: ProbePlace) -> Reply:
    folder, _ = await _put_many(place)
    listed = [key for page in await _pages(place, folder) for key in page]
    if listed != sorted(listed):
        return Reply("no", "in some other order")
    return Reply("yes", "ascending") if listed else Reply("no", "nothing is listed")


async def _key(place: ProbePlace, name: str) -> Reply:
    folder = place.new_key("")
    key = place.add_key(folder + name)
    answer = await place.ask("put_object", b"x", Key=key)
    if not answer.good:
        return Reply("not supported", str(answer))
    if (await place.get(key)).body != b"x":
        return Reply("no", "cannot be read")
    listed = list(await _listed(place, folder))
    return Reply("yes", "as it was given") if listed == [key] else Reply("no", "is listed under another name")
