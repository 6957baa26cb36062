"""The storage SPI: what any backend promises. Contains no behaviour, and no vocabulary of any one store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol, TypeVar, runtime_checkable

from castore.digest import Digest


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a backend says of one object, without reading it."""

    digest: Digest
    size_bytes: int
    modified_ns: int
    """When the object was written, nanoseconds since the epoch, by the backend's clock."""


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """One probe of a backend. `detail` is one line for a person and holds no secret."""

    status: Literal["pass", "warn", "fail"]
    detail: str
    free_bytes: int | None = None
    clock_ahead_s: float | None = None
    """Seconds by which this host's clock is ahead of the backend's; None where that one does not tell, or is none."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question of a probe. All of it is for a person too, and holds no secret."""

    name: str
    """Of the question, and the same for ever: lower-case words with dashes between them."""
    question: str
    expected: str
    answer: str
    enforced: Literal["yes", "no", "not supported", "unknown"]
    """Whether what is expected is what the backend does. `unknown`: it could not be asked, for now."""
    consequence: str
    """What follows where it is not so, and the mend; empty for what castore does not rely on."""

    @property
    def severity(self) -> Literal["pass", "fail", "unknown", "info"]:
        """`fail` and `unknown` are of what castore relies on, `info` of what would merely be nice."""
        if self.enforced == "yes":
            return "pass"
        if not self.consequence:
            return "info"
        return "unknown" if self.enforced == "unknown" else "fail"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """All that a probe found. `server` is what the backend says it is, empty where it says nothing."""

    server: str
    findings: tuple[Finding, ...]


@runtime_checkable
class Probing(Protocol):
    """What a backend may offer beside the contract: to find out what the place of its objects really does."""

    async def probe(self) -> ProbeReport:
        """Ask, with deliberately bad values too, and believe only what comes back.

        Bounded in time. Works in a place of its own, touches no object, and leaves nothing there, also when it is
        cancelled; what a killed probe left is removed by a later one. A question that cannot be answered for now is a
        finding that says so. Raises StorageError when nothing can be asked at all.
        """


class Taker(Protocol):
    """Is given bytes in a thread, as a hasher is. A piece is its own only until `update` returns; it raises nothing."""

    def update(self, piece: memoryview, /) -> None: ...


TakerT = TypeVar("TakerT", bound=Taker)


@runtime_checkable
class Scanning(Protocol):
    """What a backend may offer beside the contract: bytes that are looked at where they are read, in its own thread.

    For who reads everything and keeps nothing: the piece is small enough to be in the processor's cache still.
    """

    @property
    def scans(self) -> bool:
        """Whether `scan` may be called: a backend around another one can as much as that."""

    async def scan(self, digest: Digest, *, offset: int, length: int, begin: Callable[[], TakerT]) -> TakerT:
        """As `get`, but hands the bytes piece by piece, in order, to what `begin` makes; the one that got them all.

        `begin` is called in the thread, once for each try, and once more by a try that was given up and comes late. A
        scan that is cancelled returns at once, and its thread gives up after the piece that it is at; so a taker must
        touch nothing that others use by then.
        """


@runtime_checkable
class Source(Protocol):
    """Bytes to put that can be read again, for a retry or for parts in parallel.

    The bytes must not change between the first `open` and the end of the put; a source that can tell
    raises `SourceChanged` from the reader.
    """

    @property
    def size_bytes(self) -> int:
        """The exact number of bytes."""

    def open(self) -> BinaryIO:
        """A new reader at offset 0, independent of all others, seekable. Whoever opens it closes it.

        Blocking, as its reads are: use it in a thread. `read(n)` gives fewer than n bytes only at the end.
        """


class StorageBackend(Protocol):
    """One place that stores immutable objects named by digest.

    All methods may run at once from many tasks. Nothing but `StorageError` (and cancellation) leaves them.
    Cancellation leaves nothing half-visible: an object is whole or absent.
    """

    @property
    def backend_id(self) -> str:
        """The id under which the configuration knows this backend."""

    @property
    def backend_type(self) -> str:
        """The kind of backend, for example `local`."""

    async def put(self, digest: Digest, source: Source) -> None:
        """Store all bytes of `source` under `digest`.

        Atomic: no reader ever sees part of it. Durable: when it returns, the object survives power loss.
        Idempotent: putting what is there replaces it with the same bytes (and so repairs a damaged object).
        The backend trusts the caller that the bytes have that digest; it proves that it stored the bytes it read,
        or raises. Raises SourceChanged when the source yields more or fewer bytes than it promised, or cannot be read.
        A put that is cancelled returns at once, even while the source blocks. Unless the source has been read to
        its end by then, nothing is stored afterwards.
        What a put that was cancelled, killed, or failed for now has sent may stay, unseen, for the next put of the
        digest to go on from; `abandon` removes it.
        """

    async def get(
        self, digest: Digest, *, offset: int, length: int, into: bytearray | memoryview | None = None
    ) -> memoryview:
        """Exactly `length` bytes from `offset`, never fewer.

        With `into` (at least `length` bytes long) they are received there and the returned view is a slice of it:
        the caller owns the buffer, the backend keeps no reference after it returns or is cancelled. Without, a fresh
        buffer is returned. Raises ObjectMissing, or ObjectTruncated when the object ends earlier; ValueError for a
        negative offset or length, or a buffer that is too small. `length` 0 reads nothing but still proves that
        the object is there.
        """

    async def head(self, digest: Digest) -> ObjectInfo:
        """What is known of the object without reading it. Raises ObjectMissing."""

    async def delete(self, digest: Digest) -> None:
        """Remove the object, durably. Succeeds when it is not there. Not what unfinished puts left: see `abandon`."""

    async def abandon(self, digest: Digest) -> None:
        """Remove what unfinished puts of the digest left, of dead processes too, when none is going to be tried again.

        Touches no object. A put of the digest that is under way in this or another process either succeeds all the
        same or raises a temporary StorageError.
        """

    def list(self, algorithm: str, *, prefix: str = "") -> AbstractAsyncContextManager[AsyncIterator[ObjectInfo]]:
        """All objects of a digest algorithm whose hex begins with `prefix`, in ascending order of digest.

            async with backend.list("sha256", prefix="ab") as objects:
                async for info in objects: ...

        Entering asks nothing of the backend, the first step does. Pages inside, in bounded memory. Objects put or
        deleted meanwhile may or may not appear. Names that are not objects of this layout (temporary files,
        strangers) are not reported.
        """

    async def health(self) -> BackendHealth:
        """Probe the backend, cheaply and without changing it. Never raises StorageError: a failure is a status."""

    async def aclose(self) -> None:
        """Release what the backend holds. Idempotent; nothing else may be called afterwards."""
