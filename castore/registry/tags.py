"""The rules of tags: what may be tagged, moved, rolled back and removed. A tag never takes the place of a version."""

from __future__ import annotations

import time

from castore.catalog import tagging
from castore.catalog.writer import Transaction
from castore.errors import AlreadyExists, NotFound
from castore.events import PACKAGE_TAGGED, Event


def tag_package(transaction: Transaction, name: str, tag: str, version: str, *, uid: int) -> str:
    """Point a tag to a published version, or pin `latest` to it; what it pointed to before, '' for nothing.

    Raises NotFound without that version, AlreadyExists when a version has the name of the tag.
    """
    if transaction.package_exists(name, tag):
        raise AlreadyExists(f"{name}/{tag} is a version, so no tag can have that name")
    if not transaction.package_exists(name, version):
        raise NotFound(f"{name}/{version}: no such package is published")
    return _change(transaction, name, tag, version, uid)


def remove_tag(transaction: Transaction, name: str, tag: str, *, uid: int) -> str:
    """Remove a tag, or the pin of `latest`; what it pointed to. Raises NotFound when there is none."""
    if tagging.tag(transaction, name, tag) is None:
        raise NotFound(f"{name} has no tag {tag}" if tag != "latest" else f"{name}: latest is not pinned")
    return _change(transaction, name, tag, "", uid)


def roll_back(transaction: Transaction, name: str, tag: str, *, uid: int) -> str:
    """Undo the last change of a tag; what it points to now, '' when it is removed by that.

    Raises NotFound when it was never set, or when what it pointed to is not published any more.
    """
    before = tagging.version_before(transaction, name, tag)
    if before is None:
        raise NotFound(f"{name} has no tag {tag}, and never had")
    if before:
        tag_package(transaction, name, tag, before, uid=uid)
    else:
        remove_tag(transaction, name, tag, uid=uid)
    return before


def _change(transaction: Transaction, name: str, tag: str, version: str, uid: int) -> str:
    before = tagging.tag(transaction, name, tag) or ""
    if before == version:
        return before
    now = time.time_ns()
    tagging.set_tag(transaction, name, tag, version, uid=uid, now_ns=now)
    data = {
        "name": name,
        "tag": tag,
        "version": version or None,
        "previous_version": before or None,
        "changed_by_uid": uid,
    }
    transaction.add_event(Event(type=PACKAGE_TAGGED, subject=f"{name}/{tag}", data=data, time_ns=now))
    return before
