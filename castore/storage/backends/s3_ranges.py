"""Whether an answer to a ranged get holds the range that was asked for. Receives nothing."""

from __future__ import annotations

from castore.config_backends import S3Settings
from castore.errors import ObjectTruncated, StorageUnavailable


def bytes_before(
    settings: S3Settings, what: str, *, status: int, sent: int | None, content_range: str, offset: int, length: int
) -> int:
    """How many bytes of the body come before the `length` bytes from `offset` on that were asked for.

    `sent` is the body's length, None where the answer does not say. Raises ObjectTruncated when the object ends
    before, StorageUnavailable when the answer is about something else.
    """
    end = offset + length
    if status == 200:  # the whole object: no ranges are known there
        if sent is None or sent < end:
            raise strange(settings, what, f"{sent} bytes, for {length} from byte {offset}")
        return offset
    span, _, total = content_range.partition("/")
    if total.isascii() and total.isdigit() and int(total) < end:
        raise ObjectTruncated(f"backend {settings.backend_id}: {what}: the object has {total} bytes, {end} are needed")
    if span != f"bytes {offset}-{end - 1}" or sent not in (length, None):
        raise strange(settings, what, f"{sent} bytes called {span!r}, for {length} from byte {offset}")
    return 0


def strange(settings: S3Settings, what: str, answer: str) -> StorageUnavailable:
    """The error for an answer that is none to what was asked."""
    return StorageUnavailable(f"backend {settings.backend_id}: {what}: {settings.endpoint_url} sent {answer}")
