"""An import: a directory of the host becomes a version of ingest/, and is published. It reads by `bulk_source` alone.

It goes by the same tree, staged files, uploader and publisher as what a mount is given. A file gets its name when all
its bytes are in staging and their digest is known: what is killed leaves whole files, which the next import keeps.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import trio

from castore.catalog.records import Kind
from castore.catalog.workspace import Node
from castore.digest import BlobHasher
from castore.errors import (
    AlreadyExists,
    CastoreError,
    PackageExists,
    PublishBusy,
    SourceChanged,
    TreeError,
    from_text,
)
from castore.failpoint import failpoint
from castore.ingest.bulk_order import ImportOrder, ImportProgress
from castore.ingest.bulk_source import (
    STAT_BLOCK_BYTES,
    Copied,
    Count,
    Enter,
    Folder,
    Item,
    LinkedFiles,
    Step,
    Walk,
    absent_names,
    copy_files,
    count,
    shown,
)
from castore.ingest.disk_room import DiskRoom
from castore.ingest.service import Ingest
from castore.ingest.tree import INGEST_ROOT, PRODUCER, RETENTION_CLASS, check_label

STEPS: Final = 256
"""Names read from the directory by one hop to a thread."""
BATCH_FILES: Final = 64
BATCH_BYTES: Final = 4 * 1024 * 1024
"""Files that are copied by one hop to a thread and named by one commit; a larger file goes alone."""
COPIES: Final = 3
"""Batches copied at a time: one hashes while another waits for the disk."""
PUBLISH_TRIES: Final = 3
"""A location that goes bad between put and publish has its bytes put again: nobody else is there to try that."""
_PAGE: Final = 256
"""Names of the workspace looked at by one query."""

Publish = Callable[[int], Awaitable[None]]
"""Waits until a version is stored, and publishes it."""


class BulkImport:
    """One import. `avoid` are (device, inode) of directories that it must not lead through, 0 for a whole device.

    `place` is the (device, inode) that its directory has for whoever asks: they may see other mounts than this process.
    `on_changed` is called with (parent, name) of names in ingest/ that a kernel may know otherwise.
    """

    def __init__(
        self,
        ingest: Ingest,
        order: ImportOrder,
        *,
        avoid: frozenset[tuple[int, int]] = frozenset(),
        place: tuple[int, int] | None = None,
        on_changed: Callable[[int, bytes], None] = lambda parent, name: None,
    ) -> None:
        self._ingest = ingest
        self._tree = ingest.tree
        self._store = ingest.store
        self._files = ingest.files
        self._order = order
        self._avoid = avoid
        self._place = place
        self._on_changed = on_changed
        self._groups = frozenset(os.getgroups()) | {order.gid}
        self._version_inode = 0
        self._made_name = False
        self._total = Count()
        self._is_counted = False
        self._copied: list[Count] = []
        self._kept = Count()
        self._stored = (0, 0)
        """As long as the version was looked at: in the end it is published."""
        self._linked = LinkedFiles()
        self._claimed: set[int] = set()
        """Inodes that a file with several names has now: no other file's."""
        self._batch: list[Item] = []
        self._batch_bytes = 0
        self._walk: Walk

    def progress(self) -> ImportProgress:
        """How far it is."""
        if self._version_inode and self._tree.find(self._version_inode) is not None:
            now = self._ingest.publisher.progress(self._version_inode)
            self._stored = now.stored_files, now.stored_bytes
        return ImportProgress(
            total_names=self._total.name_count if self._is_counted else 0,
            total_files=self._total.file_count if self._is_counted else 0,
            total_bytes=self._total.size_bytes if self._is_counted else 0,
            copied_files=sum(each.file_count for each in self._copied),
            copied_bytes=sum(each.size_bytes for each in self._copied),
            kept_files=self._kept.file_count,
            kept_bytes=self._kept.size_bytes,
            stored_files=self._stored[0],
            stored_bytes=self._stored[1],
        )

    def staged(self) -> tuple[int, int]:
        """(files, bytes) that lie in the version now."""
        if not self._version_inode or self._tree.find(self._version_inode) is None:
            return 0, 0
        now = self._ingest.publisher.progress(self._version_inode)
        return now.total_files, now.total_bytes

    async def publish(self, version_inode: int, *, wait_seconds: float) -> None:
        """Wait until a staged version is stored, and publish it. Raises as `Publisher` does."""
        publisher, order = self._ingest.publisher, self._order
        for left in reversed(range(PUBLISH_TRIES)):
            with self._files.room.leaving(version_inode):
                await publisher.wait_stored(version_inode)
            try:
                await publisher.publish(
                    version_inode,
                    order.name,
                    order.version.encode(),
                    wait_seconds=wait_seconds,
                    shares_inodes=True,
                )
                return
            except PublishBusy:
                if not left:
                    raise

    async def run(self, publish: Publish) -> None:
        """Stage and publish. When it fails or is cancelled, what is staged stays, for the next import of the version.

        Raises PackageExists with nothing left; NotPermitted for what cannot be packaged, AlreadyExists for a version
        that no import made, SourceChanged, TreeError, StagingFull, and what a publish may raise.
        """
        order = self._order
        await self._ingest.publisher.check_absent(order.name, order.version)
        for attribute, label in self._labels().items():
            check_label(attribute, label)
        self._check_made_by_import()
        with Walk(order.directory, avoid=self._avoid, place=self._place) as walk:
            await trio.to_thread.run_sync(count, walk, self._total)
        self._is_counted = True
        try:
            with Walk(order.directory, avoid=self._avoid, place=self._place) as self._walk:
                await self._stage()
            await publish(self._version_inode)
        except PackageExists:
            await self._discard()
            raise
        except CastoreError as exc:
            files, _ = self.staged()
            if not files:
                await self._discard()
                raise
            raise type(exc)(
                f"{exc}; {files} files stay staged in ingest/{order.ref}, and the same command goes on from there"
            ) from exc
        if self._made_name:
            self._remove_name()

    def _labels(self) -> dict[bytes, bytes]:
        chosen = {PRODUCER: self._order.producer, RETENTION_CLASS: self._order.retention_class}
        return {name: os.fsencode(label) for name, label in chosen.items() if label is not None}

    def _existing(self) -> Node | None:
        top = self._tree.lookup(INGEST_ROOT, self._order.name.encode())
        return None if top is None else self._tree.lookup(top.inode, self._order.version.encode())

    def _check_made_by_import(self) -> None:
        existing = self._existing()
        if existing is not None and not self._order.resume and not self._store.is_import(existing.inode):
            raise AlreadyExists(
                f"ingest/{self._order.ref} is there, and no import made it: publish it with `castore package publish`, "
                "remove it, or have it made like the directory with --resume"
            )

    # staging

    async def _stage(self) -> None:
        """Walk the directory a second time, and copy what the version does not have."""
        error: CastoreError | None = None

        async def copy_always(batches: trio.MemoryReceiveChannel[list[Item]]) -> None:
            nonlocal error
            counted = self._counted()
            try:
                async for batch in batches:
                    await self._copy(batch, counted)
            except CastoreError as exc:
                error = error or exc
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            send, receive = trio.open_memory_channel[list[Item]](0)
            for _ in range(COPIES):
                nursery.start_soon(copy_always, receive)
            try:
                async with send:
                    await self._follow(send)
            except CastoreError as exc:
                error = error or exc
                nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    def _counted(self) -> Count:
        counted = Count()
        self._copied.append(counted)
        return counted

    async def _follow(self, copies: trio.MemorySendChannel[list[Item]]) -> None:
        steps = self._walk.steps()
        alone = self._counted()
        while some := await trio.to_thread.run_sync(_next_steps, steps):
            for step in some:
                if isinstance(step, Item):
                    await self._take_item(step, alone)
                    if len(self._batch) >= BATCH_FILES or self._batch_bytes >= BATCH_BYTES:
                        await self._send_batch(copies)
                elif isinstance(step, Enter):
                    await self._take_folder(step.folder)
                else:
                    self._end_use(step.folder)
        await self._send_batch(copies)

    async def _send_batch(self, copies: trio.MemorySendChannel[list[Item]]) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if batch:
            await copies.send(batch)

    # directories

    async def _take_folder(self, folder: Folder) -> None:
        above = folder.above
        existing = None
        if above is None:
            existing = self._existing()
        elif not above.is_new:
            existing = self._tree.lookup(above.inode, folder.name)
        if above is not None:
            above.uses += 1
        with self._store.transaction():
            if existing is None:
                folder.is_new = True
                existing = self._make_version(folder) if above is None else self._mkdir(above.inode, folder)
            folder.inode = existing.inode
            attributes = folder.attributes
            if above is None:
                self._version_inode = folder.inode
                self._store.mark_import(folder.inode)
                attributes = attributes | self._labels()
            self._adjust(existing, folder.path, folder.status, attributes, is_new=folder.is_new)
        if not folder.is_new:
            await self._remove_what_left(folder)

    def _make_version(self, folder: Folder) -> Node:
        name, order = self._order.name.encode(), self._order
        top = self._tree.lookup(INGEST_ROOT, name)
        if top is None:
            top = self._tree.mkdir(INGEST_ROOT, name, mode=order.name_mode, uid=order.uid, gid=order.gid)
            self._made_name = True
            self._on_changed(INGEST_ROOT, name)
        version = order.version.encode()
        self._on_changed(top.inode, version)
        mode = stat.S_IMODE(folder.status.st_mode)
        return self._tree.mkdir(top.inode, version, mode=mode, uid=order.uid, gid=order.gid)

    def _mkdir(self, parent: int, folder: Folder) -> Node:
        uid, gid = self._owner(folder.status)
        return self._tree.mkdir(parent, folder.name, mode=stat.S_IMODE(folder.status.st_mode), uid=uid, gid=gid)

    def _end_use(self, folder: Folder | None) -> None:
        """The walk left a directory, or something in it is done; with the last of that its time and mode are set."""
        while folder is not None:
            folder.uses -= 1
            if folder.uses:
                return
            mode = stat.S_IMODE(folder.status.st_mode)
            node = self._tree.get(folder.inode)
            if (node.mtime_ns, node.mode) != (folder.status.st_mtime_ns, mode):
                self._tree.set_attributes(folder.inode, mode=mode, mtime_ns=folder.status.st_mtime_ns)
            self._walk.close_folder(folder)
            folder = folder.above

    async def _remove_what_left(self, folder: Folder) -> None:
        after = 0
        while page := self._tree.children(folder.inode, after, _PAGE):
            after = page[-1][0]
            names = [(name, node.kind is Kind.DIRECTORY) for _, name, node in page]
            for name in await trio.to_thread.run_sync(absent_names, folder, names):
                await self._remove(folder.inode, name)

    # files and links

    async def _take_item(self, item: Item, counted: Count) -> None:
        parent = item.folder.inode
        existing = None if item.folder.is_new else self._tree.lookup(parent, item.name)
        linked = self._linked.find(item)
        if linked is not None:
            if existing is None or existing.inode != linked:
                self._unlink(parent, item.name, existing)
                self._tree.link(linked, parent, item.name)
            return
        if existing is not None and self._is_same(item, existing):
            self._adjust(existing, item.path, item.status, item.attributes, is_new=False)
            if item.is_file:
                self._kept.file_count += 1
                self._kept.size_bytes += existing.size_bytes
            self._remember(item, existing.inode)
            return
        self._unlink(parent, item.name, existing)
        if not item.is_file:
            self._remember(item, self._symlink(item))
        elif item.status.st_nlink > 1:
            item.folder.uses += 1
            self._remember(item, (await self._copy([item], counted))[0])
        else:
            item.folder.uses += 1
            self._batch.append(item)
            self._batch_bytes += item.status.st_size

    def _remember(self, item: Item, inode: int) -> None:
        if item.status.st_nlink > 1:
            self._linked.add(item, inode)
            self._claimed.add(inode)

    def _is_same(self, item: Item, node: Node) -> bool:
        """Whether a file of the version is that of the directory, by kind, size and time, or target."""
        if node.nlink > 1 and (item.status.st_nlink == 1 or node.inode in self._claimed):
            return False
        if not item.is_file:
            return node.kind is Kind.SYMLINK and node.target == item.target
        if node.kind is not Kind.FILE or node.state == "receiving":
            return False
        if (node.size_bytes, node.mtime_ns) != (item.status.st_size, item.status.st_mtime_ns):
            return False
        return node.state != "failed" or not isinstance(from_text(self._store.error(node.inode)), SourceChanged)

    def _symlink(self, item: Item) -> int:
        uid, gid = self._owner(item.status)
        with self._store.transaction():
            node = self._tree.symlink(item.folder.inode, item.name, item.target, uid=uid, gid=gid)
            self._adjust(node, item.path, item.status, {}, is_new=True)
        return node.inode

    async def _copy(self, items: list[Item], counted: Count) -> list[int]:
        """Copy files into staging, and name them; returns their inodes."""
        places = []
        reserved: list[tuple[int, int]] = []
        try:
            for item in items:
                uid, _ = self._owner(item.status)
                self._files.room.reserve(uid, item.status.st_size)
                reserved.append((uid, item.status.st_size))
            inodes = [self._tree.new_inode() for _ in items]
            places = [self._files.path(inode) for inode in inodes]
            work = partial(_copy_within_room, items, places, counted, self._files.disk, self._files.new_hasher)
            copied = await trio.to_thread.run_sync(work)
            failpoint("import.copied")
            with self._store.transaction():
                for inode, each in zip(inodes, copied, strict=True):
                    self._name(inode, each)
            failpoint("import.staged")
        except BaseException:
            for place in places:
                place.unlink(missing_ok=True)
            for uid, size_bytes in reserved:
                self._files.room.take(uid, -size_bytes)
            raise
        self._files.added()
        for item in items:
            self._end_use(item.folder)
        return inodes

    def _name(self, inode: int, copied: Copied) -> None:
        item, status = copied.item, copied.status
        uid, gid = self._owner(item.status)
        node = self._tree.add_staged(
            item.folder.inode,
            item.name,
            inode,
            mode=stat.S_IMODE(status.st_mode),
            uid=uid,
            gid=gid,
            mtime_ns=status.st_mtime_ns,
            summary=copied.summary,
        )
        if item.attributes or node.gid != gid:
            self._adjust(node, item.path, item.status, item.attributes, is_new=True)

    # attributes

    def _owner(self, status: os.stat_result) -> tuple[int, int]:
        """As a copy by that user has it: root keeps owners, others the groups that they are in."""
        if self._order.uid == 0:
            return status.st_uid, status.st_gid
        return self._order.uid, status.st_gid if status.st_gid in self._groups else self._order.gid

    def _adjust(
        self, node: Node, path: bytes, status: os.stat_result, attributes: dict[bytes, bytes], *, is_new: bool
    ) -> None:
        """Give an entry the owner, the mode, the time and the attributes of the source; a directory's at its end."""
        changes: dict[str, int] = {}
        uid, gid = self._owner(status)
        if (node.uid, node.gid) != (uid, gid):
            changes |= {"uid": uid, "gid": gid}
        if node.kind is Kind.FILE and node.mode != status.st_mode & 0o777:
            changes["mode"] = stat.S_IMODE(status.st_mode)
        if node.kind is not Kind.DIRECTORY and node.mtime_ns != status.st_mtime_ns:
            changes["mtime_ns"] = status.st_mtime_ns
        wanted = {name: value for name, value in attributes.items() if _is_kept(name, node)}
        present = {} if is_new else {name: self._tree.attribute(node.inode, name) for name in self._names(node)}
        try:
            for name in present.keys() - wanted.keys():
                self._tree.remove_attribute(node.inode, name)
            for name, value in wanted.items():
                if present.get(name) != value:
                    self._tree.set_attribute(node.inode, name, value)
            if changes:
                self._tree.set_attributes(node.inode, **changes)
        except TreeError as exc:
            raise type(exc)(f"{shown(path)}: {exc}") from exc

    def _names(self, node: Node) -> list[bytes]:
        return self._tree.attribute_names(node.inode)

    # removing

    def _unlink(self, parent: int, name: bytes, existing: Node | None) -> None:
        if existing is not None:
            self._tree.unlink(parent, name)
            self._on_changed(parent, name)

    async def _remove(self, parent: int, name: bytes) -> None:
        """Remove a name and all that is below it."""
        pending = [(parent, name)]
        while pending:
            above, last = pending[-1]
            node = self._tree.lookup(above, last)
            if node is not None and node.kind is Kind.DIRECTORY:
                below = self._tree.children(node.inode, 0, _PAGE)
                directories = [child for _, child, each in below if each.kind is Kind.DIRECTORY]
                for _, child, each in below:
                    if each.kind is not Kind.DIRECTORY:
                        self._unlink(node.inode, child, each)
                if below:
                    pending += [(node.inode, child) for child in directories[:1]]
                    await trio.lowlevel.checkpoint()
                    continue
                self._tree.rmdir(above, last)
                self._on_changed(above, last)
            elif node is not None:
                self._unlink(above, last, node)
            pending.pop()

    async def _discard(self) -> None:
        """Nothing of this import is left in ingest/."""
        existing = self._existing()
        if existing is None or existing.inode != self._version_inode:
            return
        with trio.CancelScope(shield=True):
            await self._remove(self._tree.parent(existing.inode), self._order.version.encode())
        if self._made_name:
            self._remove_name()

    def _remove_name(self) -> None:
        """The NAME that this import made, unless somebody uses it by now."""
        name = self._order.name.encode()
        top = self._tree.lookup(INGEST_ROOT, name)
        if top is not None and self._store.is_empty(top.inode):
            self._tree.rmdir(INGEST_ROOT, name)
            self._on_changed(INGEST_ROOT, name)


def _is_kept(name: bytes, node: Node) -> bool:
    """Not what castore computes, as `cp -a` cannot set that either."""
    if name in (PRODUCER, RETENTION_CLASS):
        return node.is_version
    return not name.startswith((b"user.castore.", b"user.hash."))


def _next_steps(steps: Iterator[Step]) -> list[Step]:
    return list(islice(steps, STEPS))


def _copy_within_room(
    items: list[Item], places: list[Path], counted: Count, disk: DiskRoom, new_hasher: Callable[[], BlobHasher]
) -> list[Copied]:
    """Copy files, and begin only if all of them fit by themselves. Raises as `copy_files`."""
    disk.check(sum(min(item.status.st_size, item.status.st_blocks * STAT_BLOCK_BYTES) for item in items))
    return copy_files(items, places, counted, disk, new_hasher)
