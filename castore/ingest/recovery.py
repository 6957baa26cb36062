"""What a daemon does first with a workspace that another one left, perhaps killed. Nothing of it is done later."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from castore.catalog.records import Kind
from castore.catalog.workspace import Publishing, WorkspaceStore
from castore.catalog.writer import CatalogWriter, Transaction
from castore.digest import SHA256_BLOCKS
from castore.errors import StateError
from castore.ingest.files import StagedFiles
from castore.ingest.publisher import Publisher
from castore.registry.routing import Router

log = logging.getLogger(__name__)


async def recover_names(
    store: WorkspaceStore,
    *,
    files: StagedFiles,
    writer: CatalogWriter,
    publisher: Publisher,
    manifests: Path,
    block_digest: str,
) -> list[Publishing]:
    """Make names, sizes and states right, before anything can be looked up. Takes time by entries, not by bytes.

    Returns the publishes that are to be undone.
    """
    for node in store.unlinked():
        store.delete_node(node.inode)
        if node.kind is Kind.FILE:
            files.remove(node.inode, node.uid, node.size_bytes)
    for item in os.scandir(manifests):
        os.unlink(item.path)
    for note in store.publishings():
        if await writer.run(partial(Transaction.is_published, root_id=note.version_inode, manifest=note.manifest)):
            await publisher.forget(note.version_inode, note.manifest)
    with store.transaction():
        for state in ("uploading", "failed"):
            store.restage(state=state)
        if block_digest == SHA256_BLOCKS:
            store.clear_summaries(but=block_digest)  # files that were closed before the setting was made
        for node in store.receiving():
            files.measure(node)
    _compare_with_disk(store, files)
    return store.publishings()


def _compare_with_disk(store: WorkspaceStore, files: StagedFiles) -> None:
    """Remove staged bytes that no file owns; distrust the digest of a file whose size on disk is another."""
    sizes: dict[int, int] = {}
    for item in os.scandir(files.folder):
        if _is_inode(item.name):
            sizes[int(item.name, 16)] = item.stat(follow_symlinks=False).st_size
        else:
            os.unlink(item.path)
    # After a power cut a name may be older or newer than its bytes: what the disk holds is then the file.
    # A file that is failed still, after all that have a digest were staged again, could not be read: try that again.
    doubtful = [
        node for node in store.files() if sizes.pop(node.inode, -1) != node.size_bytes or node.state == "failed"
    ]
    with store.transaction():
        for node in doubtful:
            log.warning("staged file %x is not as it was closed, or was not read; it is hashed again", node.inode)
            store.clear_summary(node.inode)
            files.measure(node)
    for inode in sizes:
        files.path(inode).unlink()


async def recover_bytes(
    store: WorkspaceStore,
    notes: list[Publishing],
    *,
    files: StagedFiles,
    publisher: Publisher,
    router: Router,
) -> None:
    """Hash what was receiving, undo what was being published. Runs beside the serving daemon.

    `notes` are the publishes that `recover_names` found: those that began since are nobody's business here.
    """
    for node in store.receiving():
        files.rehash(node.inode)
    for note in notes:
        try:
            # Every configured backend: the route may have changed since.
            await publisher.undo(note, tuple(sorted(router.backend_ids)))
        except StateError as exc:
            what = f"the manifest of unpublished {note.name}/{note.version} stays until the next try or start"
            log.warning("%s: %s", what, exc)


def _is_inode(name: str) -> bool:
    try:
        return f"{int(name, 16):x}" == name
    except ValueError:
        return False
