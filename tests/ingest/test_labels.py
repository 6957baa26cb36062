"""Labels of a version: what is declared counts, else who made it and the configured class."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from castore.catalog.workspace import WorkspaceStore
from castore.errors import InvalidName, NotFound
from castore.ingest.labels import LabelReader, Labels
from castore.ingest.tree import LABEL_MAX, PRODUCER, RETENTION_CLASS, check_label
from tests.catalog.catalogs import ROOT, made, node

NOBODY_KNOWS = 3_999_999_999


@pytest.fixture
def store(tmp_path: Path) -> Iterator[WorkspaceStore]:
    """A workspace with ingest/zlib/1.3, made by this user."""
    with made(tmp_path) as catalog:
        catalog.fill_version()
        catalog.store.update_node(ROOT, creator_uid=os.getuid())
        yield catalog.store


@pytest.fixture
def labels(store: WorkspaceStore) -> LabelReader:
    """With the default class `standard`."""
    return LabelReader(store, default_retention_class="standard")


async def test_defaults(labels: LabelReader) -> None:
    me = os.getuid()
    assert await labels.labels(ROOT) == Labels(pwd.getpwuid(me).pw_name, "standard", me)


async def test_a_user_without_a_name(labels: LabelReader, store: WorkspaceStore) -> None:
    store.insert_node(replace(node(3000), version_inode=3000, creator_uid=NOBODY_KNOWS))
    assert (await labels.labels(3000)).producer == f"uid:{NOBODY_KNOWS}"


async def test_declared_ones(labels: LabelReader, store: WorkspaceStore) -> None:
    """The creator stays recorded beside them. They may change at any time before the publish."""
    store.set_attribute(ROOT, PRODUCER, "ci-ünï".encode())
    assert await labels.labels(ROOT) == Labels("ci-ünï", "standard", os.getuid())
    store.set_attribute(ROOT, RETENTION_CLASS, b"release")
    assert (await labels.labels(ROOT)).retention_class == "release"
    store.remove_attribute(ROOT, PRODUCER)
    assert (await labels.labels(ROOT)).producer == pwd.getpwuid(os.getuid()).pw_name


async def test_a_new_owner_is_not_the_creator(labels: LabelReader, store: WorkspaceStore) -> None:
    store.update_node(ROOT, uid=NOBODY_KNOWS)
    assert (await labels.labels(ROOT)).uid == os.getuid()


async def test_a_version_that_is_gone(labels: LabelReader) -> None:
    with pytest.raises(NotFound):
        await labels.labels(12345)


@pytest.mark.parametrize("value", [b"ci", "ü" * LABEL_MAX, b"a b/c:*"])
def test_allowed(value: bytes | str) -> None:
    check_label(PRODUCER, value if isinstance(value, bytes) else value.encode())


@pytest.mark.parametrize("value", [b"", b"\xff", b"a\nb", b"\x1b[0m", b"x" * (LABEL_MAX + 1), b"a\0"])
def test_refused(value: bytes) -> None:
    with pytest.raises(InvalidName, match=r"user\.castore\.producer: "):
        check_label(PRODUCER, value)
