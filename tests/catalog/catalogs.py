"""A catalog and a workspace on disk with a few rows, for the tests of both. Real SQLite files, no daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from castore.catalog.connection import create_catalog, create_workspace
from castore.catalog.reader import CatalogReader
from castore.catalog.records import Kind
from castore.catalog.workspace import Node, WorkspaceStore
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import MANIFEST_ALGORITHM, BlobHasher, BlobSummary

T = TypeVar("T")

TOP, ROOT = 2000, 2001
"""Inodes of the NAME and the VERSION that `Catalog.fill_version` makes."""


def summary_of(data: bytes, algorithm: str = "sha256") -> BlobSummary:
    """The summary of some bytes."""
    hasher = BlobHasher(algorithm=algorithm)
    hasher.update(data)
    return hasher.finish()


MANIFEST = summary_of(b"a manifest", MANIFEST_ALGORITHM)


def node(inode: int, kind: Kind = Kind.DIRECTORY, **columns: Any) -> Node:
    """A node with few columns that differ from 0."""
    state = "receiving" if kind is Kind.FILE else ""
    made = Node(inode, ROOT, kind, 0o755, 1, 2, 1, inode, inode + 1, 0, 1, b"", state)
    return replace(made, **columns)


class Catalog:
    """Both databases below a folder, with a writer, a reader and a store."""

    def __init__(self, folder: Path) -> None:
        self.path, self.workspace_path = folder / "catalog.db", folder / "workspace.db"
        create_catalog(self.path)
        create_workspace(self.workspace_path)
        self.writer = CatalogWriter(self.path)
        self.reader = CatalogReader(self.path)
        self.store = WorkspaceStore(self.workspace_path)

    def close(self) -> None:
        """Close all three connections."""
        self.store.close()
        self.reader.close()
        self.writer.close()

    def change(self, work: Callable[[Transaction], T]) -> T:
        """One transaction of the catalog, with the workspace attached."""
        return self.writer.run_sync(work, self.workspace_path)

    def add(self, link_id: int, parent: int, name: bytes, made: Node) -> None:
        """A node with its first name."""
        self.store.insert_node(made)
        self.store.insert_link(link_id, parent, name, made.inode)

    def add_file(self, inode: int, parent: int, name: bytes, data: bytes, **columns: Any) -> BlobSummary:
        """A closed file; its bytes are nowhere."""
        self.add(inode, parent, name, node(inode, Kind.FILE, **columns))
        summary = summary_of(data)
        self.store.set_summary(inode, summary)
        return summary

    def fill_version(self) -> list[BlobSummary]:
        """ingest/zlib/1.3 with a folder, two files, a hard link and a symbolic link; the blobs of the files."""
        self.add(TOP, 3, b"zlib", node(TOP, version_inode=0))
        self.add(ROOT, TOP, b"1.3", node(ROOT))
        self.add(2002, ROOT, b"dir", node(2002, mode=0o2750))
        one = self.add_file(2003, 2002, b"\xff one", b"one", uid=7, nlink=2)
        two = self.add_file(2004, ROOT, b"two", b"")
        self.store.insert_link(2005, ROOT, b"hard link", 2003)
        self.add(2006, ROOT, b"link", node(2006, Kind.SYMLINK, target=b"dir/\xff one", size_bytes=9))
        self.store.set_attribute(2003, b"user.note", b"\0\xff")
        self.store.add_names("zlib", 2010, 2011)
        return [one, two]

    def publish(self, version: str = "1.3", *, owner: tuple[int, int] | None = None, time_ns: int = 5) -> None:
        """What publish does in its transaction, for the version that `fill_version` made."""

        def work(transaction: Transaction) -> None:
            transaction.add_locations([(MANIFEST, "local")])
            parent = transaction.add_package_name(
                "zlib", inode=2010, latest_inode=2011, uid=1, gid=2, mode=0o755, now_ns=time_ns, version=version
            )
            count, size = transaction.version_totals(ROOT)
            transaction.copy_entries(ROOT, parent_id=parent, name=version, now_ns=time_ns, owner=owner)
            transaction.add_package(
                name="zlib", version=version, root_id=ROOT, producer="ci", retention_class="release", publisher_uid=7,
                published_at_ns=time_ns, file_count=count, size_bytes=size, manifest=MANIFEST, backend_ids=("local",),
            )  # fmt: skip

        self.change(work)


@contextmanager
def made(folder: Path) -> Iterator[Catalog]:
    """A catalog in a folder, closed in the end."""
    catalog = Catalog(folder)
    try:
        yield catalog
    finally:
        catalog.close()
