"""How `open_backend` puts a backend together, and what it does not do."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from castore.config import LocalSettings, S3Settings
from castore.config_values import SecretRef
from castore.digest import Digest
from castore.errors import ObjectMissing, StorageTimeout, StorageUnavailable
from castore.storage.deadline import READ_BASE_S
from castore.storage.open import create_backend, open_backend, sweep_backend, wrap
from castore.storage.retry import LAST_TRY_S
from castore.storage.source import BytesSource

from .memory_backend import MemoryBackend

ROOT = Path(__file__).parents[2]
DATA = b"some bytes"
DIGEST = Digest.of(DATA)


def s3_settings() -> S3Settings:
    return S3Settings(
        backend_id="rgw",
        endpoint_url="https://rgw.example.internal",
        region="default",
        bucket="artifacts",
        key_prefix="castore",
        access_key_ref=SecretRef("env:RGW_ACCESS_KEY", "backends.rgw.access_key_ref"),
        secret_key_ref=SecretRef("env:RGW_SECRET_KEY", "backends.rgw.secret_key_ref"),
        storage_class="STANDARD",
        sse=None,
        multipart_threshold_bytes=16 << 20,
        multipart_chunk_bytes=16 << 20,
    )


async def test_opening_touches_nothing_and_creating_is_asked_for(tmp_path: Path) -> None:
    settings = LocalSettings("objects", tmp_path / "a" / "b")
    backend = open_backend(settings)
    assert (backend.backend_id, backend.backend_type) == ("objects", "local")
    with pytest.raises(StorageUnavailable, match=r"is not there: mount it or run `castore init`"):
        await backend.put(DIGEST, BytesSource(DATA))
    assert list(tmp_path.iterdir()) == []
    await create_backend(settings)
    await create_backend(settings)
    await backend.put(DIGEST, BytesSource(DATA))
    assert await backend.get(DIGEST, offset=0, length=len(DATA)) == DATA
    assert await sweep_backend(settings) == 0
    await backend.aclose()


def test_a_backend_may_be_opened_before_trio_runs(tmp_path: Path) -> None:
    settings = LocalSettings("objects", tmp_path / "objects")
    backend = open_backend(settings)

    async def use() -> None:
        await create_backend(settings)
        with pytest.raises(ObjectMissing):
            await backend.head(DIGEST)

    trio.run(use)


def test_a_type_that_is_not_installed_says_how_to_mend_it() -> None:
    program = (
        "import sys\n"
        "sys.modules['aioboto3'] = None\n"  # as if it were not installed
        "from castore.errors import ConfigError\n"
        "from castore.storage.open import open_backend\n"
        "from tests.storage.test_open import s3_settings\n"
        "try:\n"
        "    open_backend(s3_settings())\n"
        "except ConfigError as exc:\n"
        "    print(exc)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"backend rgw: type = \"s3\" needs .*: pip install 'castore\[s3\]'\n", done.stdout)


def test_no_backend_is_imported_before_it_is_opened() -> None:
    program = (
        "import sys, castore.storage.open\n"
        "print([name for name in sys.modules if name.startswith('castore.storage.backends.') or 'boto' in name])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("transfer", "loaded"), [("native", True), ("aioboto3", False)])
def test_what_a_first_request_needs_is_loaded_on_demand(transfer: str, loaded: bool) -> None:
    """By a program that is going to read: importing it takes a third of a second."""
    program = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from castore.storage.open import load_backend\n"
        "from tests.storage.test_open import s3_settings\n"
        f"load_backend(replace(s3_settings(), transfer={transfer!r}))\n"
        "print('castore.storage.backends.s3_native' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(loaded)


async def test_a_dead_backend_is_an_error_after_a_bounded_time(autojump_clock: MockClock) -> None:
    memory = MemoryBackend()

    async def never(operation: str) -> None:
        await trio.sleep_forever()

    memory.before = never
    start = trio.current_time()
    with pytest.raises(StorageTimeout):
        await wrap(memory, reads=1, writes=1).head(DIGEST)
    assert memory.calls == ["head"] * 3
    assert LAST_TRY_S <= trio.current_time() - start <= LAST_TRY_S + READ_BASE_S


async def test_waiting_for_a_turn_is_not_waiting_for_the_backend(autojump_clock: MockClock) -> None:
    memory = MemoryBackend()
    await memory.put(DIGEST, BytesSource(DATA))

    async def slowly(operation: str) -> None:
        await trio.sleep(READ_BASE_S - 1)

    memory.before = slowly
    backend = wrap(memory, reads=1, writes=1)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(backend.head, DIGEST)
    assert memory.calls.count("head") == 5


async def test_waiting_for_another_try_takes_no_turn(autojump_clock: MockClock) -> None:
    memory = MemoryBackend()
    await memory.put(DIGEST, BytesSource(DATA))
    order = []

    async def fail_once(operation: str) -> None:
        await trio.lowlevel.checkpoint()
        order.append(operation)
        if len(order) == 1:
            raise StorageUnavailable("for now")

    memory.before = fail_once
    backend = wrap(memory, reads=1, writes=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.head, DIGEST)
        await wait_all_tasks_blocked()
        nursery.start_soon(partial(backend.get, DIGEST, offset=0, length=1))
    assert order == ["head", "get", "head"]
