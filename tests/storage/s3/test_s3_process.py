"""What is seen only from outside a process: its log, its imports, its memory, what it takes from its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from castore.storage.backends.s3_upload import PARTS_IN_FLIGHT
from tests.servers.s3_server import BUCKET, S3Server
from tests.servers.seaweedfs import SeaweedFS

from .conftest import MIB

ROOT: Final = Path(__file__).resolve().parents[3]

PRELUDE: Final = """
import os, sys, trio
from castore.config import S3Settings
from castore.config_values import SecretRef
from castore.digest import Digest
from castore.storage.open import open_backend
from castore.storage.source import BytesSource

def settings(**changes):
    values = dict(
        backend_id="remote", endpoint_url=os.environ["ENDPOINT"], region="us-east-1", bucket=os.environ["BUCKET"],
        key_prefix="process", access_key_ref=SecretRef("env:THE_ACCESS_KEY", "backends.remote.access_key_ref"),
        secret_key_ref=SecretRef("env:THE_SECRET_KEY", "backends.remote.secret_key_ref"), storage_class="STANDARD",
        sse=None, multipart_threshold_bytes=16 << 20, multipart_chunk_bytes=16 << 20,
    )
    return S3Settings(**{**values, **changes})

DATA = b"some bytes"
DIGEST = Digest.of(DATA)
"""


def run(server: S3Server, program: str, **environment: str) -> str:
    """What the program prints, on standard error too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + program],
        cwd=ROOT,
        env={
            **os.environ,
            "ENDPOINT": server.endpoint_url,
            "BUCKET": BUCKET,
            "THE_ACCESS_KEY": server.access_key,
            "THE_SECRET_KEY": server.secret_key,
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


USE_IT: Final = """
import logging, traceback
logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s", stream=sys.stdout)

async def attempt(backend, call):
    try:
        await call()
    except Exception as exc:
        print("".join(traceback.TracebackException.from_exception(exc, capture_locals=True).format()))

async def main():
    wrong, chain = SecretRef("env:WRONG", "a.key"), {"access_key_ref": None, "secret_key_ref": None}
    for changes in ({}, {"access_key_ref": wrong}, {"secret_key_ref": wrong}, {"session_token_ref": wrong}, chain,
                    {"bucket": "no-such-bucket"}, {"endpoint_url": "http://127.0.0.1:9"}):
        backend = open_backend(settings(transfer=os.environ["TRANSFER"], **changes))
        print(repr(backend), vars(backend), settings(**changes))
        await attempt(backend, lambda: backend.put(DIGEST, BytesSource(DATA)))
        await attempt(backend, lambda: backend.put(DIGEST, BytesSource(bytes(17 << 20))))
        await attempt(backend, lambda: backend.get(DIGEST, offset=0, length=len(DATA)))
        await attempt(backend, lambda: backend.head(DIGEST))
        print(await backend.health())
        await backend.aclose()

trio.run(main)
"""


@pytest.mark.parametrize("transfer", ["native", "aioboto3"])
@pytest.mark.parametrize("client_logs_too", [False, True])
def test_no_log_repr_or_traceback_shows_a_secret(server: SeaweedFS, client_logs_too: bool, transfer: str) -> None:
    """At debug level and with the local variables of tracebacks; and with the client library's own log turned on."""
    wrong = "wrong-but-secret-all-the-same"
    turn_on = "import castore.storage.backends.s3_client, logging\nlogging.getLogger('botocore').setLevel(1)\n"
    environment = {"AWS_ACCESS_KEY_ID": wrong, "AWS_SECRET_ACCESS_KEY": wrong, "AWS_SESSION_TOKEN": wrong}
    environment |= {"WRONG": wrong, "TRANSFER": transfer, "PYTHONASYNCIODEBUG": "1"}
    output = run(server, (turn_on if client_logs_too else "") + USE_IT, **environment)
    assert "check access_key_ref = env:WRONG" in output
    assert "session_token_ref = env:WRONG" in output
    assert "check what the AWS credential chain gives" in output
    assert "Traceback" in output
    assert "asyncio DEBUG" in output
    assert ("botocore.auth DEBUG" in output) == client_logs_too
    assert server.secret_key not in output
    if not client_logs_too:
        assert server.access_key not in output
        assert wrong not in output


def test_the_environment_of_amazons_own_tools_counts_for_nothing(server: SeaweedFS, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\nregion = nowhere\nendpoint_url = http://127.0.0.1:9\n")
    program = """
async def main():
    backend = open_backend(settings())
    await backend.put(DIGEST, BytesSource(DATA))
    print(bytes(await backend.get(DIGEST, offset=0, length=len(DATA))))
    await backend.aclose()

trio.run(main)
"""
    output = run(
        server,
        program,
        AWS_PROFILE="absent",
        AWS_CONFIG_FILE=str(tmp_path / "config"),
        AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "absent"),
        AWS_ACCESS_KEY_ID="wrong",
        AWS_SECRET_ACCESS_KEY="wrong",
        AWS_SESSION_TOKEN="wrong",
        AWS_REGION="nowhere",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_USE_FIPS_ENDPOINT="true",
        AWS_USE_DUALSTACK_ENDPOINT="true",
        AWS_REQUEST_CHECKSUM_CALCULATION="when_supported",
        AWS_DEFAULTS_MODE="standard",
    )
    assert output == "b'some bytes'\n"


def test_the_client_library_is_loaded_by_the_first_call(server: SeaweedFS) -> None:
    program = """
async def main():
    backend = open_backend(settings())
    print(sorted({"aioboto3", "botocore", "aiohttp"} & set(sys.modules)))
    await backend.health()
    print(sorted({"aioboto3", "botocore", "aiohttp"} & set(sys.modules)))
    await backend.aclose()

trio.run(main)
"""
    assert run(server, program) == "[]\n['aioboto3', 'aiohttp', 'botocore']\n"


def test_memory_is_bounded_by_the_parts_in_flight(server: SeaweedFS, tmp_path: Path) -> None:
    """Three files at a time of 160 MiB, in parts of 16, and back in ranges of 8."""
    with (tmp_path / "file").open("wb") as file:
        for number in range(160):
            file.write(bytes([number]) * MIB)
    program = """
from pathlib import Path

class OnDisk:
    size_bytes = 160 << 20
    def open(self):
        return Path(os.environ["FILE"]).open("rb")

def peak():
    # Not `ru_maxrss`, which begins with that of the parent.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) >> 10

async def read(backend, digest):
    buffer = bytearray(8 << 20)
    for offset in range(0, OnDisk.size_bytes, len(buffer)):
        await backend.get(digest, offset=offset, length=len(buffer), into=buffer)
        assert buffer[0] == offset >> 20 and buffer[-1] == (offset >> 20) + 7

async def main():
    backend = open_backend(settings())
    await backend.put(DIGEST, BytesSource(DATA))
    before = peak()
    digests = [Digest.of(bytes([number])) for number in range(3)]
    async with trio.open_nursery() as nursery:
        for digest in digests:
            nursery.start_soon(backend.put, digest, OnDisk())
    after_puts = peak()
    async with trio.open_nursery() as nursery:
        for digest in digests:
            nursery.start_soon(read, backend, digest)
    print(after_puts - before, peak() - before)
    await backend.aclose()

trio.run(main)
"""
    puts, gets = map(int, run(server, program, FILE=str(tmp_path / "file")).split())
    parts = PARTS_IN_FLIGHT * 16
    assert parts <= puts <= parts + 24, "MiB above what an idle backend needs"
    assert gets <= parts + 24
