"""What a daemon does before it serves a workspace that another one left, perhaps killed. Nothing is done while serving."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from castore.catalog.workspace import WorkspaceStore
from castore.catalog.writer import CatalogWriter
from castore.errors import StorageError
from castore.ingest.files import StagedFiles
from castore.ingest.publisher import Publisher
from castore.registry.routing import Router

log = logging.getLogger(__name__)


async def recover_names(
    store: WorkspaceStore, *, files: StagedFiles, writer: CatalogWriter, publisher: Publisher, owner: str
) -> None:
    """Make names, sizes and states right, before anything can be looked up. Takes time by entries, not by bytes."""
    for inode in store.unlinked():
        store.delete_node(inode)
    for publishing in store.publishings():
        root = publishing.version_inode
        if await writer.run(lambda transaction, root=root: transaction.root_exists(root)):  # type: ignore[misc]
            await publisher.forget(root)
    with store.transaction():
        store.restage(state="uploading")
        for node in store.receiving():
            files.measure(node)
    known = store.file_inodes()
    for item in os.scandir(files.folder):
        if not _is_inode(item.name) or int(item.name, 16) not in known:
            os.unlink(item.path)
    dropped = await writer.run(lambda transaction: transaction.drop_intents_of_others(owner))
    if dropped:
        log.info("%d puts of an earlier daemon had not ended; they are put again where they are needed", dropped)


async def recover_bytes(
    store: WorkspaceStore, *, files: StagedFiles, publisher: Publisher, router: Router, manifests: Path
) -> None:
    """Hash what was receiving, undo what was being published. Runs beside the serving daemon."""
    for publishing in store.publishings():
        try:
            # Every configured backend: the route may have changed since.
            await publisher.undo(publishing, tuple(sorted(router.backend_ids)))
        except StorageError as exc:
            log.warning("publish of %s/%s is not undone yet: %s", publishing.name, publishing.version, exc)
    noted = {f"{publishing.version_inode:x}" for publishing in store.publishings()}
    for item in os.scandir(manifests):
        if item.name not in noted and not _is_publishing(store, item.name):
            os.unlink(item.path)
    for node in store.receiving():
        await files.rehash(node)


def _is_publishing(store: WorkspaceStore, name: str) -> bool:
    return any(f"{publishing.version_inode:x}" == name for publishing in store.publishings())


def _is_inode(name: str) -> bool:
    try:
        return f"{int(name, 16):x}" == name
    except ValueError:
        return False
