"""What a package will be, decided when its version is frozen: its manifest and its event. Nothing is stored here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from castore.catalog.records import Kind
from castore.catalog.workspace import Node, WorkspaceStore
from castore.digest import BlobSummary, Digest
from castore.errors import NameTooLong
from castore.events import PACKAGE_PUBLISHED, Event
from castore.ingest.labels import Labels
from castore.ingest.sums import check_sums
from castore.registry.manifest import ManifestEntry, ManifestHeader, write_manifest
from castore.registry.manifest_rules import PATH_BYTES_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A frozen version and what it is published as. `owner` (uid, gid) replaces that of each entry, unless None.

    With `shares_inodes`, files may show the inode numbers of equal ones of other packages.
    """

    name: str
    version: str
    name_node: Node
    root: Node
    owner: tuple[int, int] | None
    labels: Labels
    backend_ids: tuple[str, ...]
    published_at_ns: int
    shares_inodes: bool


def write_draft(path: Path, draft: Draft, workspace: Path, path_of: Callable[[int], Path]) -> BlobSummary:
    """Check the version's lists of sums, then write its manifest to `path`. With a connection of its own.

    Blocking, for a thread of trio's: it ends with its task, since a tree may be deep and broad at once. Raises
    SumsMismatch, NameTooLong, StateError and OSError.
    """
    store = WorkspaceStore(workspace, read_only=True)
    try:
        check_sums(store, draft.root.inode, path_of)
        header = ManifestHeader(
            name=draft.name,
            version=draft.version,
            producer=draft.labels.producer,
            retention_class=draft.labels.retention_class,
            publisher_uid=draft.labels.uid,
            published_at_ns=draft.published_at_ns,
            backend_ids=draft.backend_ids,
            name_uid=draft.name_node.uid,
            name_gid=draft.name_node.gid,
            name_mode=draft.name_node.mode & 0o777,
        )
        return write_manifest(path, header, _until_cancelled(manifest_entries(store, draft.root.inode, draft.owner)))
    finally:
        store.close()


def _until_cancelled(entries: Iterator[ManifestEntry]) -> Iterator[ManifestEntry]:
    for entry in entries:
        trio.from_thread.check_cancelled()
        yield entry


def manifest_entries(
    store: WorkspaceStore, version_inode: int, owner: tuple[int, int] | None
) -> Iterator[ManifestEntry]:
    """The entries of a version, parents before children; `owner` replaces each one's uid and gid.

    Of paths, which may be long, those of two levels of directories are in memory. Raises NameTooLong.
    """
    above: dict[int, bytes] = {}
    here: dict[int, bytes] = {}
    linked: dict[int, tuple[int, bytes]] = {}
    for _, parent, name, node in store.tree(version_inode):
        if parent not in above:
            above, here = here, {}  # the first of its level
        folder = above.get(parent, b"")
        path = b"" if node.inode == version_inode else folder + b"/" + name if folder else name
        if len(path) > PATH_BYTES_MAX:
            raise NameTooLong(f"a path of more than {PATH_BYTES_MAX} bytes cannot be published")
        if node.kind is Kind.DIRECTORY:
            here[node.inode] = path
        elif node.nlink > 1:
            first = linked.setdefault(node.inode, (parent, name))
            if first != (parent, name):
                yield ManifestEntry(path=path, kind=node.kind, link_to=_path(store, version_inode, *first))
                continue
        uid, gid = owner if owner is not None else (node.uid, node.gid)
        yield ManifestEntry(
            path=path,
            kind=node.kind,
            mode=node.mode & 0o777,
            uid=uid,
            gid=gid,
            mtime_ns=node.mtime_ns,
            blob=store.summary(node.inode) if node.kind is Kind.FILE else None,
            target=node.target,
            attributes=store.attributes(node.inode),
        )


def _path(store: WorkspaceStore, version_inode: int, parent: int, name: bytes) -> bytes:
    """The path from the version on of a name in a directory of it."""
    names = [name]
    while parent != version_inode:
        link = store.parent_of(parent)
        assert link is not None, "it was found from its version on"
        parent = link[0]
        names.append(link[1])
    return b"/".join(reversed(names))


def published_event(draft: Draft, manifest: Digest, file_count: int, size_bytes: int) -> Event:
    """The event of a publish."""
    return Event(
        type=PACKAGE_PUBLISHED,
        subject=f"{draft.name}/{draft.version}",
        data={
            "name": draft.name,
            "version": draft.version,
            "producer": draft.labels.producer,
            "retention_class": draft.labels.retention_class,
            "publisher_uid": draft.labels.uid,
            "backend_ids": list(draft.backend_ids),
            "file_count": file_count,
            "size_bytes": size_bytes,
            "manifest_digest": str(manifest),
        },
        time_ns=draft.published_at_ns,
    )
