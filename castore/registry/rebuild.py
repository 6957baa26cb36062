"""Rebuilding a catalog from the manifests that a backend has. Puts and deletes no object; writes the catalog alone.

First every manifest is read whole, compared with its digest and made into a package, or refused, as one. Then the
objects are listed: only what is there with the right size becomes a location that is `stored`. Run again, it goes on.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from castore.catalog.building import BlobsDiffer, CatalogBuilder, Known, PackageTree
from castore.digest import MANIFEST_ALGORITHM, PRIMARY_ALGORITHM, BlobHasher, BlobSummary, Digest
from castore.errors import FormatError, StateError, StorageError
from castore.registry.deletion import is_over
from castore.registry.manifest import ManifestEntry, ManifestHeader, read_manifest
from castore.registry.one_thread import OneThread, one_thread
from castore.storage.spi import ObjectInfo, StorageBackend

FETCHES: Final = 8
"""Manifests fetched at a time."""
AHEAD: Final = 64
"""Manifests fetched before they are made into packages, in order: so inode numbers do not depend on chance."""
PIECE_BYTES: Final = 4 * 1024 * 1024
MANIFEST_BYTES_MAX: Final = 4 * 1024**3
"""A larger manifest is refused unread: 61 bytes for an entry make it that of 70 million."""
AHEAD_BYTES: Final = 256 * 1024 * 1024
"""Manifests that lie on the disk at a time, unless one alone is larger."""
OBJECTS_AT_ONCE: Final = 1000
ERRORS_IN_A_ROW: Final = 8
"""After so many manifests that could not be fetched, one after the other, the backend is given up."""
FUTURE_NS: Final = 24 * 3600 * 10**9
"""A package that was published later than this from now was not."""


class Result(enum.StrEnum):
    """What became of a manifest."""

    ADDED = "added"
    """A package was made."""
    KNOWN = "known"
    """The catalog had the package already; its locations in this backend are looked for."""
    REFUSED = "refused"
    """It is none that castore wrote, or contradicts others."""
    SKIPPED = "skipped"
    """Its package is not lost: it was about to be published and is in ingest/ still, or it was deleted on purpose."""
    UNREADABLE = "unreadable"
    """It could not be fetched."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A manifest and what became of it; `ref` is '' where that is not known, `why` where nothing is wrong."""

    digest: Digest
    result: Result
    ref: str = ""
    why: str = ""


@dataclass(slots=True)
class RebuildTally:
    """How far a rebuild is."""

    manifest_count: int | None = None
    manifest_bytes: int = 0
    done_bytes: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {str(result): 0 for result in Result})
    entry_count: int = 0
    object_count: int = 0
    unknown_count: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    stopped: str = ""


class Rebuild:
    """One run over one backend, into an open builder. `folder` holds manifests while they are read.

    With `replaces`, all packages of the catalog come from manifests that were read for it: where two of them contradict
    each other, the better one may take the other's place. Else what is there stays. `unpublished` are the raw digests
    of manifests whose publish did not end, `names` the inodes that ingest/ has for NAMEs.
    """

    def __init__(
        self,
        builder: CatalogBuilder,
        backend: StorageBackend,
        *,
        folder: Path,
        on_outcome: Callable[[Outcome], None],
        replaces: bool,
        unpublished: Collection[bytes] = (),
        names: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.tally = RebuildTally()
        self._builder = builder
        self._backend = backend
        self._folder = folder
        self._on_outcome = on_outcome
        self._replaces = replaces
        self._unpublished = frozenset(unpublished)
        self._names = names or {}
        self._errors_in_a_row = 0
        self._thread: OneThread
        self._ref = ""

    async def run(self) -> None:
        """Until every manifest was read and every object seen, or the backend is given up. Raises StateError.

        Nobody collects garbage meanwhile: whoever runs it holds the turn of `castore.registry.deletion.gc_turn`.
        """
        if not is_over(self._backend, self._builder.newest_mark_ns(self._backend.backend_id)):
            raise StateError(
                f"backend {self._backend.backend_id}: what a garbage collection sent that was killed may be under way "
                "still; try again in two minutes"
            )
        try:
            await self._count()
            async with one_thread() as self._thread:
                await self._make_packages()
                if not self.tally.stopped:
                    await self._see_objects()
        except StorageError as exc:
            self.tally.stopped = str(exc)
        self.tally.failed = self._builder.failed_counts(self._backend.backend_id)

    async def _count(self) -> None:
        count = 0
        async with self._backend.list(MANIFEST_ALGORITHM) as objects:
            async for info in objects:
                count += 1
                self.tally.manifest_bytes += info.size_bytes
        self.tally.manifest_count = count

    # packages

    async def _make_packages(self) -> None:
        ahead: list[ObjectInfo] = []
        size = 0
        async with self._backend.list(MANIFEST_ALGORITHM) as objects:
            async for info in objects:
                if ahead and (len(ahead) == AHEAD or size + info.size_bytes > AHEAD_BYTES):
                    await self._make(ahead)
                    ahead, size = [], 0
                ahead.append(info)
                size += info.size_bytes
                if self.tally.stopped:
                    return
        await self._make(ahead)

    async def _make(self, infos: list[ObjectInfo]) -> None:
        fetched: dict[Digest, BlobSummary | Outcome] = {}
        turns = trio.CapacityLimiter(FETCHES)
        known = {info.digest for info in infos if self._builder.package_with_manifest(info.digest)}

        async def fetch(info: ObjectInfo) -> None:
            async with turns:
                fetched[info.digest] = await self._fetch(info)

        async with trio.open_nursery() as nursery:
            for info in infos:
                # A known one is read as well: what it says of its backends, and that it is whole, counts.
                nursery.start_soon(fetch, info)
        for info in infos:
            result = fetched[info.digest]
            path = self._path(info.digest)
            try:
                if isinstance(result, BlobSummary):
                    result = await self._make_one(path, info, result, known=info.digest in known)
            finally:
                path.unlink(missing_ok=True)
            self._note(info, result)

    def _note(self, info: ObjectInfo, outcome: Outcome) -> None:
        self.tally.counts[outcome.result] += 1
        self.tally.done_bytes += info.size_bytes
        self._errors_in_a_row = self._errors_in_a_row + 1 if outcome.result is Result.UNREADABLE else 0
        if self._errors_in_a_row == ERRORS_IN_A_ROW:
            self.tally.stopped = outcome.why
        self._on_outcome(outcome)

    def _path(self, digest: Digest) -> Path:
        return self._folder / digest.hex

    async def _fetch(self, info: ObjectInfo) -> BlobSummary | Outcome:
        """The manifest as a file, when it has the digest by which it is named."""
        digest = info.digest
        if digest.raw in self._unpublished:
            why = "its package was about to be published: it is in ingest/ still, and can be published again"
            return Outcome(digest, Result.SKIPPED, why=why)
        if self._builder.is_deleted(digest):
            return Outcome(digest, Result.SKIPPED, why="its package was deleted, and can be restored")
        if info.size_bytes > MANIFEST_BYTES_MAX:
            why = f"has {info.size_bytes} bytes; a manifest has {MANIFEST_BYTES_MAX} at most"
            return Outcome(digest, Result.REFUSED, why=why)
        hasher = BlobHasher(algorithm=MANIFEST_ALGORITHM)
        try:
            with self._path(digest).open("wb") as file:
                for offset in range(0, info.size_bytes, PIECE_BYTES):
                    length = min(PIECE_BYTES, info.size_bytes - offset)
                    piece = await self._backend.get(digest, offset=offset, length=length)
                    hasher.update(piece)
                    file.write(piece)
        except StorageError as exc:
            return Outcome(digest, Result.UNREADABLE, why=str(exc))
        summary = hasher.finish()
        if summary.digest != digest:
            return Outcome(digest, Result.REFUSED, why=f"its bytes have another digest, {summary.digest}")
        return summary

    async def _make_one(self, path: Path, info: ObjectInfo, summary: BlobSummary, *, known: bool) -> Outcome:
        """Make the package, with the object itself as the judge where manifests differ over a blob."""
        judged: set[Digest] = set()
        self._ref = ""
        while True:
            try:
                return await self._thread.run(self._make_package, path, info, summary, known)
            except FormatError as exc:
                why = str(exc).removeprefix(f"{path}: ")
                return Outcome(info.digest, Result.REFUSED, self._ref, why)
            except BlobsDiffer as exc:
                digest = exc.summary.digest
                if not self._replaces or digest in judged or not await self._judge(digest, exc.summary):
                    return Outcome(info.digest, Result.REFUSED, self._ref, str(exc))
                judged.add(digest)

    async def _judge(self, digest: Digest, claimed: BlobSummary) -> bool:
        """Whether the object is as `claimed`; then packages that said otherwise are taken out again."""
        hasher = BlobHasher(block_size_bytes=claimed.block_size_bytes, checksum_algorithm=claimed.checksum_algorithm)
        try:
            info = await self._backend.head(digest)
            for offset in range(0, info.size_bytes, PIECE_BYTES):
                length = min(PIECE_BYTES, info.size_bytes - offset)
                hasher.update(await self._backend.get(digest, offset=offset, length=length))
        except StorageError:
            return False
        if hasher.finish() != claimed:
            return False
        with self._builder.whole():
            liars = self._builder.packages_using(digest)
            for package in liars:
                self._builder.remove_package(package.package_id)
            self._builder.set_blob(claimed)
        for package in liars:
            self._take_back(package, f"says something else of {digest} than its bytes")
        return True

    def _take_back(self, package: Known, why: str) -> None:
        self.tally.counts[Result.ADDED] -= 1
        self.tally.counts[Result.REFUSED] += 1
        self._on_outcome(Outcome(package.manifest, Result.REFUSED, package.ref, why))

    def _make_package(self, path: Path, info: ObjectInfo, summary: BlobSummary, known: bool) -> Outcome:
        """In a thread. Raises FormatError and BlobsDiffer, and leaves nothing of the package then."""
        builder, backend_id = self._builder, self._backend.backend_id
        header, entries = read_manifest(path, self._proves)
        ref = self._ref = f"{header.name}/{header.version}"
        if header.published_at_ns > time.time_ns() + FUTURE_NS:
            raise FormatError("was published in the future")
        replaced = None
        with builder.whole():
            if known:
                package_id = builder.package_with_manifest(info.digest)
                builder.add_locations_of(package_id, backend_id)
                result = Result.KNOWN
            else:
                replaced = self._make_room(header)
                self._make_entries(header, entries, summary)
                package_id = builder.package_with_manifest(info.digest)
                result = Result.ADDED
            builder.add_backend(package_id, backend_id, header.backend_ids)
            builder.drop_marks(backend_id)
        builder.see_objects(backend_id, [(info.digest, info.size_bytes, info.modified_ns)])
        if replaced is not None:
            self._take_back(replaced, f"{info.digest} describes {ref}, too, and was published later")
        return Outcome(info.digest, result, ref)

    def _make_room(self, header: ManifestHeader) -> Known | None:
        """Of two manifests of one NAME/VERSION, the one that was published later counts: it came after a delete."""
        other = self._builder.package(header.name, header.version)
        if other is None:
            return None
        if not self._replaces or other.published_at_ns >= header.published_at_ns:
            raise FormatError(f"{other.manifest} describes the same NAME/VERSION, and counts")
        self._builder.remove_package(other.package_id)
        return other

    def _make_entries(self, header: ManifestHeader, entries: Iterator[ManifestEntry], summary: BlobSummary) -> None:
        builder, backend_id = self._builder, self._backend.backend_id
        parent_id = builder.add_name(
            header.name,
            header.version,
            header.published_at_ns,
            (header.name_uid, header.name_gid, header.name_mode),
            self._names.get(header.name),
        )
        tree = PackageTree(builder, parent_id, header.version, header.published_at_ns)
        for entry in entries:
            self._add(tree, entry, backend_id)
        tree.finish()
        builder.add_package(
            (
                *(header.name, header.version, tree.root_id, header.producer, header.retention_class),
                *(header.publisher_uid, header.published_at_ns, tree.file_count, tree.size_bytes),
            ),
            summary,
            backend_id,
        )

    def _add(self, tree: PackageTree, entry: ManifestEntry, backend_id: str) -> None:
        if entry.link_to is not None:
            tree.add_link(entry.path, entry.kind, entry.link_to)
        else:
            blob, target = entry.blob, entry.target
            tree.add(
                entry.path,
                entry.kind,
                entry.mode,
                (entry.uid, entry.gid),
                entry.mtime_ns,
                blob.size_bytes if blob is not None else len(target),
                self._builder.add_blob(blob, backend_id) if blob is not None else 0,
                target,
                entry.attributes or {},
            )
        self.tally.entry_count += 1

    def _proves(self, digest: Digest, size_bytes: int) -> bool:
        try:
            return trio.from_thread.run(self._backend.head, digest).size_bytes == size_bytes
        except StorageError:
            return False

    # objects

    async def _see_objects(self) -> None:
        page: list[tuple[Digest, int, int]] = []
        async with self._backend.list(PRIMARY_ALGORITHM) as objects:
            async for info in objects:
                page.append((info.digest, info.size_bytes, info.modified_ns))
                if len(page) == OBJECTS_AT_ONCE:
                    await self._see(page)
                    page = []
        await self._see(page)

    async def _see(self, page: list[tuple[Digest, int, int]]) -> None:
        known = await self._thread.run(self._builder.see_objects, self._backend.backend_id, page)
        self.tally.object_count += known
        self.tally.unknown_count += len(page) - known
