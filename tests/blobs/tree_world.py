"""A published tree of small files for the tests of the read path: real rows, the mount's own order, real backends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import trio
import trio.testing

from castore.blobs.disk_cache import DiskCache
from castore.blobs.memory import MEMORY_BYTES
from castore.blobs.reader import BlobReader
from castore.blobs.siblings import Order, Place, Sibling
from castore.catalog.records import Blob, Kind
from mount.package_order import PackageOrder
from tests.blobs.blob_world import World, until

NAME_INODE, ROOT = 5000, 5001


def data_of(name: str, size: int) -> bytes:
    """Bytes that differ by name."""
    return hashlib.shake_256(name.encode()).digest(size)


class Tree:
    """A package in `world`. Files are named by their paths, numbered in the order in which they are added."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._order = PackageOrder(world.catalog)
        self.listings = 0
        """How often the catalog was asked what follows."""
        self._next = ROOT
        self._folders = {"": self._insert(NAME_INODE, "1", Kind.DIRECTORY)}
        self._files: dict[str, tuple[Place, Blob, bytes]] = {}

    def _insert(self, parent: int, name: str, kind: Kind, *, size: int = 0, blob_id: int = 0, inode: int = 0) -> int:
        number = self._next
        self._next += 1
        self.world.insert_entry(number, parent, name.encode(), inode or number, kind, size, blob_id)
        return number

    def folder(self, path: str) -> int:
        """The number of a folder, made with those above it."""
        if path not in self._folders:
            above, _, name = path.rpartition("/")
            self._folders[path] = self._insert(self.folder(above), name, Kind.DIRECTORY)
        return self._folders[path]

    async def add(self, path: str, size: int, *backend_ids: str) -> Blob:
        """A file."""
        above, _, name = path.rpartition("/")
        data = data_of(path, size)
        blob = await self.world.add(data, *(backend_ids or ("first",)))
        parent = self.folder(above)
        number = self._insert(parent, name, Kind.FILE, size=size, blob_id=blob.blob_id)
        self._files[path] = (Place(parent, number, name.encode()), blob, data)
        return blob

    def link(self, path: str, target: str) -> None:
        """A further name of a file."""
        above, _, name = path.rpartition("/")
        place, blob, data = self._files[target]
        self._insert(self.folder(above), name, Kind.FILE, size=len(data), blob_id=blob.blob_id, inode=place.number)

    async def fill(self, folder: str, count: int, size: int) -> list[str]:
        """`count` files; their paths, in the order of numbers, which is that of names, too."""
        paths = [f"{folder}/f{number:04}" for number in range(count)]
        for path in paths:
            await self.add(path, size)
        return paths

    def place(self, path: str) -> Place:
        return self._files[path][0]

    def data(self, path: str) -> bytes:
        return self._files[path][2]

    def next_version(self) -> None:
        """Another version of the same NAME: what is added from now on is there."""
        self._folders = {"": self._insert(NAME_INODE, str(len(self._files)), Kind.DIRECTORY)}

    def blob(self, path: str) -> Blob:
        return self._files[path][1]

    async def read(self, reader: BlobReader, path: str) -> None:
        """Open, read as `cat` does, and close; the bytes have to be right."""
        place, blob, data = self._files[path]
        file = reader.open(blob, place)
        try:
            assert await file.read(0, 1 << 20) == data
            assert await file.read(len(data), 1 << 20) == b""
        finally:
            file.close()

    async def rest(self) -> None:
        """As long as a slow reader takes to ask for its next file: all that is fetched ahead has arrived by then."""
        await trio.testing.wait_all_tasks_blocked()
        await until(lambda: all(not one.under_way or not one.open.is_set() for one in self.world.backends.values()))
        await trio.testing.wait_all_tasks_blocked()

    async def read_each(self, reader: BlobReader, paths: Iterable[str]) -> None:
        """One after the other, as one `cat` does with all of them."""
        for path in paths:
            await self.read(reader, path)
            await self.rest()

    def following(self, place: Place, order: Order, limit: int, largest_bytes: int) -> list[Sibling]:
        """The mount's own answer, counted."""
        self.listings += 1
        return self._order.following(place, order, limit, largest_bytes)

    def reader(self, *, memory_bytes: int = MEMORY_BYTES, cache: DiskCache | None = None) -> BlobReader:
        return self.world.reader(memory_bytes=memory_bytes, cache=cache, following=self.following)

    def gets(self, backend_id: str = "first") -> list[str]:
        """The paths whose bytes a backend was asked for, in that order."""
        paths = {blob.summary.digest: path for path, (_, blob, _) in reversed(self._files.items())}
        return [paths[get.digest] for get in self.world[backend_id].gets]
