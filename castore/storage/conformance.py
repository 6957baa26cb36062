"""The tests that any backend must pass, for backends outside this project too. Needs pytest and pytest-trio.

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        async def backend(self):
            backend = MyBackend(...)
            yield backend
            await backend.aclose()

Each sentence of `castore.storage.spi.StorageBackend` is asked for here. A backend that wraps another runs it as well.
"""

from __future__ import annotations

import io
import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

import pytest
import trio

from castore.digest import BLOCK_SIZE_BYTES, MANIFEST_ALGORITHM, PRIMARY_ALGORITHM, BlobHasher, Digest
from castore.errors import ObjectMissing, ObjectTruncated, SourceChanged, StorageError
from castore.storage.conformance_sources import PATIENCE_S, BlockingSource, ScriptedSource, failing_reader
from castore.storage.source import BytesSource, FileSource
from castore.storage.spi import ObjectInfo, StorageBackend

SIZES: Final = (
    0,
    1,
    4096,
    BLOCK_SIZE_BYTES - 1,
    BLOCK_SIZE_BYTES,
    BLOCK_SIZE_BYTES + 1,
    3 * BLOCK_SIZE_BYTES,
    (5 << 20) + 3,
    (16 << 20) + 1,
)
"""Nothing, one byte, a page, the edges of blocks; and beyond the sizes at which stores begin to work in parts."""
MANY: Final = 300


class BackendConformance:
    """Subclass it, name the subclass `Test...`, and give it the fixture `backend`: a backend without objects.

    The tests put up to 300 objects and 17 MiB at a time, and leave them there.
    """

    pytestmark = pytest.mark.trio

    @pytest.fixture
    async def backend(self) -> StorageBackend:
        raise NotImplementedError("a subclass gives the fixture `backend`")

    async def damage(self, backend: StorageBackend, digest: Digest, data: bytes) -> None:
        """Make `data` what is stored under `digest`. Override it to write underneath the backend."""
        await backend.put(digest, BytesSource(data))

    @pytest.mark.parametrize("size", SIZES)
    async def test_what_was_put_comes_back(self, backend: StorageBackend, size: int) -> None:
        digest, data = _blob(size)
        await backend.put(digest, BytesSource(data))
        assert await _whole(backend, digest, size) == data
        info = await backend.head(digest)
        assert (info.digest, info.size_bytes) == (digest, size)
        assert info.modified_ns > 0

    async def test_ids_are_plain_text(self, backend: StorageBackend) -> None:
        assert isinstance(backend.backend_id, str)
        assert isinstance(backend.backend_type, str)
        assert backend.backend_id
        assert backend.backend_type

    async def test_any_range_is_given_exactly(self, backend: StorageBackend) -> None:
        size = 3 * BLOCK_SIZE_BYTES + 77
        digest, data = _blob(size)
        await backend.put(digest, BytesSource(data))
        edge = BLOCK_SIZE_BYTES
        for offset, length in (
            (0, 1),
            (0, size),
            (1, size - 1),
            (edge - 1, 2),
            (edge, edge),
            (size - 1, 1),
            (size // 2, 4096),
            (0, 0),
            (edge, 0),
        ):
            view = await backend.get(digest, offset=offset, length=length)
            assert isinstance(view, memoryview)
            assert view == data[offset : offset + length], f"{length} bytes from {offset}"

    async def test_the_same_range_again_and_again(self, backend: StorageBackend) -> None:
        digest, data = _blob(2 * BLOCK_SIZE_BYTES)
        await backend.put(digest, BytesSource(data))
        for _ in range(20):
            assert await backend.get(digest, offset=100, length=BLOCK_SIZE_BYTES) == data[100 : 100 + BLOCK_SIZE_BYTES]

    @pytest.mark.parametrize(("offset", "length"), [(0, 1001), (999, 2), (1000, 1), (5000, 1), (0, 1 << 20)])
    async def test_a_range_beyond_the_end_is_never_shortened(
        self, backend: StorageBackend, offset: int, length: int
    ) -> None:
        digest, data = _blob(1000)
        await backend.put(digest, BytesSource(data))
        for _ in range(2):
            with pytest.raises(ObjectTruncated):
                await backend.get(digest, offset=offset, length=length)
        assert await _whole(backend, digest, 1000) == data
        with pytest.raises(ObjectTruncated):
            await backend.get(digest, offset=offset, length=length)

    async def test_into_fills_the_callers_buffer_and_nothing_beyond(self, backend: StorageBackend) -> None:
        digest, data = _blob(BLOCK_SIZE_BYTES + 9)
        await backend.put(digest, BytesSource(data))
        for _ in range(2):
            buffer = bytearray(b"\xee" * (len(data) + 1000))
            view = await backend.get(digest, offset=4, length=len(data) - 4, into=buffer)
            assert view == data[4:]
            assert view.obj is buffer
            assert buffer == data[4:] + b"\xee" * 1004

            buffer = bytearray(b"\xee" * 100)
            part = await backend.get(digest, offset=0, length=10, into=memoryview(buffer)[50:70])
            assert part == data[:10]
            assert buffer == b"\xee" * 50 + data[:10] + b"\xee" * 40

    async def test_ranges_and_buffers_that_make_no_sense(self, backend: StorageBackend) -> None:
        digest, data = _blob(100)
        await backend.put(digest, BytesSource(data))
        with pytest.raises(ValueError, match="negative"):
            await backend.get(digest, offset=-1, length=1)
        with pytest.raises(ValueError, match="negative"):
            await backend.get(digest, offset=0, length=-1)
        with pytest.raises(ValueError, match="too small"):
            await backend.get(digest, offset=0, length=10, into=bytearray(9))

    async def test_a_missing_object(self, backend: StorageBackend) -> None:
        digest, _ = _blob(10)
        for length in (1, 0, 1 << 20):
            with pytest.raises(ObjectMissing):
                await backend.get(digest, offset=0, length=length)
        with pytest.raises(ObjectMissing):
            await backend.head(digest)
        await backend.delete(digest)

    async def test_put_again_is_the_same_put(self, backend: StorageBackend) -> None:
        digest, data = _blob(BLOCK_SIZE_BYTES + 1)
        for _ in range(3):
            await backend.put(digest, BytesSource(data))
            assert await _whole(backend, digest, len(data)) == data
        assert [info.digest for info in await _listed(backend, PRIMARY_ALGORITHM)] == [digest]

    @pytest.mark.parametrize("damaged_bytes", [0, 10, BLOCK_SIZE_BYTES, 2 * BLOCK_SIZE_BYTES])
    async def test_put_repairs_a_damaged_object(self, backend: StorageBackend, damaged_bytes: int) -> None:
        digest, data = _blob(BLOCK_SIZE_BYTES)
        await backend.put(digest, BytesSource(data))
        assert await _whole(backend, digest, len(data)) == data
        _, damaged = _blob(damaged_bytes, seed=1)
        await self.damage(backend, digest, damaged)
        assert (await backend.head(digest)).size_bytes == damaged_bytes
        assert await _whole(backend, digest, damaged_bytes) == damaged
        await backend.put(digest, BytesSource(data))
        assert (await backend.head(digest)).size_bytes == len(data)
        assert await _whole(backend, digest, len(data)) == data

    @pytest.mark.parametrize("size", [1, 4096, BLOCK_SIZE_BYTES, (5 << 20) + 3])
    @pytest.mark.parametrize("difference", [-1, 1])
    async def test_a_source_of_another_length_stores_nothing(
        self, backend: StorageBackend, size: int, difference: int
    ) -> None:
        digest, data = _blob(size)
        longer = data + b"x"
        source = ScriptedSource(size, lambda: io.BytesIO(longer[: size + difference]))
        with pytest.raises(SourceChanged):
            await backend.put(digest, source)
        await _assert_absent(backend, digest)

    async def test_a_source_that_cannot_be_opened_stores_nothing(self, backend: StorageBackend, tmp_path: Path) -> None:
        digest, data = _blob(100)
        source = ScriptedSource(len(data), lambda: (tmp_path / "absent").open("rb"))
        with pytest.raises(SourceChanged):
            await backend.put(digest, source)
        await _assert_absent(backend, digest)

    @pytest.mark.parametrize("good_bytes", [0, 4096, (5 << 20) - 1])
    async def test_a_source_that_fails_midway_stores_nothing(self, backend: StorageBackend, good_bytes: int) -> None:
        digest, data = _blob(6 << 20)
        source = ScriptedSource(len(data), lambda: failing_reader(data, good_bytes))
        with pytest.raises(SourceChanged):
            await backend.put(digest, source)
        await _assert_absent(backend, digest)

    async def test_a_failed_put_leaves_the_object_that_was_there(self, backend: StorageBackend) -> None:
        digest, data = _blob(BLOCK_SIZE_BYTES)
        await backend.put(digest, BytesSource(data))
        with pytest.raises(SourceChanged):
            await backend.put(digest, ScriptedSource(len(data), lambda: io.BytesIO(data[:-1])))
        assert await _whole(backend, digest, len(data)) == data

    @pytest.mark.parametrize("changed_at", [0, 5 * BLOCK_SIZE_BYTES, (6 << 20) - 1])
    async def test_a_staged_file_that_changed_is_not_stored(
        self, backend: StorageBackend, tmp_path: Path, changed_at: int
    ) -> None:
        digest, data = _blob(6 << 20)
        hasher = BlobHasher()
        hasher.update(data)
        summary = hasher.finish()
        changed = bytearray(data)
        changed[changed_at] ^= 1
        path = tmp_path / "staged"
        path.write_bytes(changed)
        with pytest.raises(SourceChanged):
            await backend.put(digest, FileSource(path, summary))
        await _assert_absent(backend, digest)
        path.write_bytes(data)
        await backend.put(digest, FileSource(path, summary))
        assert await _whole(backend, digest, len(data)) == data

    @pytest.mark.parametrize("good_bytes", [0, 4096, (5 << 20) - 1])
    async def test_a_cancelled_put_returns_and_stores_nothing(self, backend: StorageBackend, good_bytes: int) -> None:
        digest, data = _blob(6 << 20)
        source = BlockingSource(data, good_bytes)
        try:
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(backend.put, digest, source)
                    await trio.to_thread.run_sync(source.blocked.wait, abandon_on_cancel=True)
                    nursery.cancel_scope.cancel()
            await _assert_absent(backend, digest)
        finally:
            source.go_on.set()
        with trio.fail_after(PATIENCE_S):
            await trio.to_thread.run_sync(source.all_closed.wait, abandon_on_cancel=True)
        await _assert_absent(backend, digest)
        await backend.put(digest, BytesSource(data))
        assert await _whole(backend, digest, len(data)) == data

    async def test_readers_never_see_part_of_an_object(self, backend: StorageBackend) -> None:
        size = 2 << 20
        digest, data = _blob(size)
        seen = 0
        putting = 4

        async def put_some() -> None:
            nonlocal putting
            for _ in range(4):
                await backend.put(digest, BytesSource(data))
            putting -= 1

        async def read_meanwhile() -> None:
            nonlocal seen
            while putting or not seen:
                seen_before = seen
                try:
                    info = await backend.head(digest)
                    view = await backend.get(digest, offset=0, length=size)
                except ObjectMissing:
                    assert not seen_before, "an object that is put again must not be missing in between"
                    continue
                assert info.size_bytes == size
                assert view == data
                seen += 1

        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for _ in range(putting):
                    nursery.start_soon(put_some)
                    nursery.start_soon(read_meanwhile)
        assert await _whole(backend, digest, size) == data

    async def test_many_puts_and_gets_at_once(self, backend: StorageBackend) -> None:
        blobs = [_blob(1000 + seed, seed=seed) for seed in range(50)]

        async def put_and_get(digest: Digest, data: bytes) -> None:
            await backend.put(digest, BytesSource(data))
            assert await _whole(backend, digest, len(data)) == data

        async with trio.open_nursery() as nursery:
            for digest, data in blobs:
                nursery.start_soon(put_and_get, digest, data)

    async def test_delete_removes_and_may_be_repeated(self, backend: StorageBackend) -> None:
        digest, data = _blob(5000)
        other, other_data = _blob(5000, seed=1)
        await backend.put(digest, BytesSource(data))
        await backend.put(other, BytesSource(other_data))
        assert await _whole(backend, digest, len(data)) == data
        for _ in range(2):
            await backend.delete(digest)
            await _assert_absent(backend, digest)
        assert await _whole(backend, other, len(other_data)) == other_data
        await backend.put(digest, BytesSource(data))
        assert await _whole(backend, digest, len(data)) == data

    async def test_abandon_touches_no_object(self, backend: StorageBackend) -> None:
        digest, data = _blob(6 << 20)
        await backend.abandon(digest)
        await _assert_absent(backend, digest)
        await backend.put(digest, BytesSource(data))
        for _ in range(2):
            await backend.abandon(digest)
            assert await _whole(backend, digest, len(data)) == data

    async def test_abandon_after_a_put_that_was_cancelled(self, backend: StorageBackend) -> None:
        digest, data = _blob(11 << 20)
        source = BlockingSource(data, 10 << 20)
        try:
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(backend.put, digest, source)
                    await trio.to_thread.run_sync(source.blocked.wait, abandon_on_cancel=True)
                    nursery.cancel_scope.cancel()
            await backend.abandon(digest)
            await _assert_absent(backend, digest)
        finally:
            source.go_on.set()
        await backend.put(digest, BytesSource(data))
        assert await _whole(backend, digest, len(data)) == data

    async def test_abandon_while_the_digest_is_put(self, backend: StorageBackend) -> None:
        digest, data = _blob(11 << 20)
        source = BlockingSource(data, 10 << 20)
        failures: list[StorageError] = []

        async def put() -> None:
            try:
                await backend.put(digest, source)
            except StorageError as exc:
                failures.append(exc)

        try:
            with trio.fail_after(PATIENCE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(put)
                    await trio.to_thread.run_sync(source.blocked.wait, abandon_on_cancel=True)
                    await backend.abandon(digest)
                    source.go_on.set()
        finally:
            source.go_on.set()
        assert all(failure.temporary for failure in failures)
        if failures:
            await backend.put(digest, BytesSource(data))
        assert await _whole(backend, digest, len(data)) == data

    async def test_an_empty_backend_lists_nothing(self, backend: StorageBackend) -> None:
        for algorithm in (PRIMARY_ALGORITHM, MANIFEST_ALGORITHM):
            assert await _listed(backend, algorithm) == []

    async def test_list_gives_each_object_once_in_order(self, backend: StorageBackend) -> None:
        sizes = {digest: len(data) for digest, data in await _put_many(backend)}
        manifest, manifest_data = _blob(99, algorithm=MANIFEST_ALGORITHM)
        await backend.put(manifest, BytesSource(manifest_data))

        listed = await _listed(backend, PRIMARY_ALGORITHM)
        assert [info.digest for info in listed] == sorted(sizes)
        assert {info.digest: info.size_bytes for info in listed} == sizes
        assert listed[0] == await backend.head(listed[0].digest)
        assert [info.digest for info in await _listed(backend, MANIFEST_ALGORITHM)] == [manifest]

        some = sorted(sizes)[MANY // 2].hex
        for prefix in ("", some[:1], some[:2], some[:3], some[:4], some[:7], some, "0", "f"):
            expected = [digest for digest in sorted(sizes) if digest.hex.startswith(prefix)]
            assert [info.digest for info in await _listed(backend, PRIMARY_ALGORITHM, prefix)] == expected, prefix
        for prefix in ("zz", some[:-1] + "z", some.upper() + "A", "../"):
            assert await _listed(backend, PRIMARY_ALGORITHM, prefix) == []

    async def test_a_listing_may_be_left_early_and_changed_under_way(self, backend: StorageBackend) -> None:
        expected = sorted(digest for digest, _ in await _put_many(backend))
        async with backend.list(PRIMARY_ALGORITHM) as objects:
            first = await anext(objects)
        assert first.digest == expected[0]
        async with backend.list(PRIMARY_ALGORITHM):
            pass
        with pytest.raises(KeyError):
            await _stumble_over(backend.list(PRIMARY_ALGORITHM))

        listed = []
        async with backend.list(PRIMARY_ALGORITHM) as objects:
            async for info in objects:
                listed.append(info.digest)
                await backend.delete(info.digest)
        assert listed == expected
        assert await _listed(backend, PRIMARY_ALGORITHM) == []

    async def test_a_working_backend_is_healthy(self, backend: StorageBackend) -> None:
        health = await backend.health()
        assert health.status in ("pass", "warn")
        assert health.detail
        assert "\n" not in health.detail
        for algorithm in (PRIMARY_ALGORITHM, MANIFEST_ALGORITHM):
            assert await _listed(backend, algorithm) == []

    async def test_closing_twice_is_closing(self, backend: StorageBackend) -> None:
        digest, data = _blob(10)
        await backend.put(digest, BytesSource(data))
        assert await _whole(backend, digest, len(data)) == data
        await backend.aclose()
        await backend.aclose()


def _blob(size: int, *, seed: int = 0, algorithm: str = PRIMARY_ALGORITHM) -> tuple[Digest, bytes]:
    data = random.Random(seed).randbytes(size)
    return Digest.of(data, algorithm), data


async def _whole(backend: StorageBackend, digest: Digest, size: int) -> bytes:
    return bytes(await backend.get(digest, offset=0, length=size))


async def _listed(backend: StorageBackend, algorithm: str, prefix: str = "") -> list[ObjectInfo]:
    async with backend.list(algorithm, prefix=prefix) as objects:
        return [info async for info in objects]


async def _stumble_over(listing: AbstractAsyncContextManager[AsyncIterator[ObjectInfo]]) -> None:
    async with listing as objects:
        async for info in objects:
            raise KeyError(info)


async def _put_many(backend: StorageBackend) -> list[tuple[Digest, bytes]]:
    blobs = [_blob(seed, seed=seed) for seed in range(MANY)]
    async with trio.open_nursery() as nursery:
        for digest, data in blobs:
            nursery.start_soon(backend.put, digest, BytesSource(data))
    return blobs


async def _assert_absent(backend: StorageBackend, digest: Digest) -> None:
    with pytest.raises(ObjectMissing):
        await backend.head(digest)
    with pytest.raises(ObjectMissing):
        await backend.get(digest, offset=0, length=1)
    assert digest not in [info.digest for info in await _listed(backend, digest.algorithm)]
