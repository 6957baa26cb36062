"""Mounts of one S3 server that are timed beside each other, and a client without a mount. Times nothing itself.

Each has one cold mount at a time: its cache folder is emptied before. What it was given to keep stays between mounts.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

from castore import __version__
from castore.mountinfo import mount_at
from tests.servers.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY

MIB: Final = 1 << 20
RANGE_BYTES: Final = 8 * MIB
AT_ONCE: Final = 8
"""Readers of small files, and ranges of the client without a mount."""
RANDOM_READS: Final = 100
RANDOM_BYTES: Final = 4096
BIG: Final = "big.bin"
"""The one large file of what is published; `small/` has the small ones, in folders of fifty."""
MOUNT_S: Final = 30.0

_ADAPTER: Final = Path(__file__).parents[2] / "scripts/bench-adapter"
_VERSION: Final = re.compile(r"\d+(\.\d+)+")


def random_offsets(size_bytes: int) -> list[int]:
    """The same ones for everybody."""
    source = random.Random(7)
    return [source.randrange(size_bytes // RANDOM_BYTES) * RANDOM_BYTES for _ in range(RANDOM_READS)]


def found(program: str) -> str | None:
    """Where a program is: of the tests' own packages, or on the PATH."""
    return shutil.which(program, path=f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH', '')}")


class Contender(ABC):
    """What is timed. `folder` is its own; the server's filer, for the one that mounts it, is at `filer`."""

    name: ClassVar[str]
    program: ClassVar[str]

    def __init__(self, folder: Path, endpoint_url: str, filer: str) -> None:
        self.folder = folder / self.name
        self.endpoint_url = endpoint_url
        self.filer = filer
        self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def version(cls) -> str | None:
        """None where its program is not installed."""
        path = found(cls.program)
        if path is None:
            return None
        said = subprocess.run([path, cls.version_argument()], capture_output=True, text=True, check=False)
        match = _VERSION.search(said.stdout + said.stderr)
        return match[0] if match else "of unknown version"

    @classmethod
    def version_argument(cls) -> str:
        return "version"

    @abstractmethod
    def load(self, source: Path) -> None:
        """Have it keep what lies in `source`."""

    @abstractmethod
    def time(self, work: str, source: Path) -> float | None:
        """Seconds for a piece of work, cold unless it is called warm; None for one that it cannot do."""


class Mount(Contender):
    """A mount, by a process that stays in the foreground."""

    def __init__(self, folder: Path, endpoint_url: str, filer: str) -> None:
        super().__init__(folder, endpoint_url, filer)
        self.mountpoint, self.cache = self.folder / "mnt", self.folder / "cache"
        self.mountpoint.mkdir(exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._serial = 0

    @abstractmethod
    def command(self) -> list[str | Path]: ...

    def environment(self) -> Mapping[str, str]:
        return {}

    @property
    def data(self) -> Path:
        """Where what was loaded is read."""
        return self.mountpoint / "data"

    def inbox(self) -> Path:
        """A new folder to copy into."""
        self._serial += 1
        box = self.mountpoint / f"in-{os.getpid()}-{self._serial}"
        box.mkdir()
        return box

    def settle(self, box: Path) -> None:
        """Return when what was copied there is on the server."""

    def mount(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir()
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.environment()},
            )
        deadline = time.monotonic() + MOUNT_S
        while mount_at(self.mountpoint) is None:
            if time.monotonic() > deadline or self._process.poll() not in (None, 0):
                raise RuntimeError(f"{self.name} does not mount: {self.folder / 'log'} says more")
            time.sleep(0.05)

    def unmount(self) -> None:
        """And wait for the end of its process: what it has not stored by then it stores before that."""
        deadline = time.monotonic() + MOUNT_S
        while mount_at(self.mountpoint) is not None and time.monotonic() < deadline:
            subprocess.run(["fusermount3", "-u", self.mountpoint], capture_output=True, check=False)
            time.sleep(0.05)
        if self._process is not None:
            try:
                self._process.wait(MOUNT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def load(self, source: Path) -> None:
        self.mount()
        try:
            self.keep(source)
        finally:
            self.unmount()

    def keep(self, source: Path) -> None:
        subprocess.run(["cp", "-r", source, self.data], check=True)

    def time(self, work: str, source: Path) -> float | None:
        self.mount()
        try:
            if work == "warm-seq":
                read_through(self.data / BIG)
            elif work == "warm-stat":
                list_sizes(self.data / "small")
            box = self.inbox() if work.startswith("put-") else self.data
            begin = time.perf_counter()
            if work.endswith("-seq"):
                read_through(self.data / BIG)
            elif work == "cold-rand":
                read_here_and_there(self.data / BIG)
            elif work == "cold-small":
                read_all(self.data / "small")
            elif work.endswith("-stat"):
                list_sizes(self.data / "small")
            else:
                subprocess.run(["cp", "-r", source / (BIG if work == "put-big" else "small"), box], check=True)
                self.settle(box)
            return time.perf_counter() - begin
        finally:
            self.unmount()


def read_through(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


def read_here_and_there(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        for offset in random_offsets(path.stat().st_size):
            if len(os.pread(file.fileno(), RANDOM_BYTES, offset)) != RANDOM_BYTES:
                raise RuntimeError(f"{path}: a short read at {offset}")


def read_all(folder: Path) -> None:
    command = 'find "$0" -type f -print0 | xargs -0 -n 64 -P "$1" cat > /dev/null'
    subprocess.run(["sh", "-c", command, folder, str(AT_ONCE)], check=True)


def list_sizes(folder: Path) -> None:
    subprocess.run(["find", folder, "-type", "f", "-printf", "%s\n"], stdout=subprocess.DEVNULL, check=True)


class Castore(Mount):
    name = "castore"
    program = "castore"

    @classmethod
    def version(cls) -> str:
        return __version__

    def command(self) -> list[str | Path]:
        return [_ADAPTER, "mount", self.endpoint_url, BUCKET, self.folder / "state", self.cache, self.mountpoint]

    def environment(self) -> Mapping[str, str]:
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}

    @property
    def data(self) -> Path:
        return self.mountpoint / "packages/bench/data"

    def inbox(self) -> Path:
        self._serial += 1
        box = self.mountpoint / f"ingest/put/{os.getpid()}-{self._serial}"
        box.mkdir(parents=True)
        return box

    def keep(self, source: Path) -> None:
        (self.mountpoint / "ingest/bench").mkdir(parents=True)
        subprocess.run(["cp", "-r", source, self.mountpoint / "ingest/bench/data"], check=True)
        self._publish("bench/data")

    def settle(self, box: Path) -> None:
        self._publish(f"put/{box.name}")

    def _publish(self, reference: str) -> None:
        subprocess.run([_ADAPTER, "publish", self.mountpoint, reference], check=True)


class Rclone(Mount):
    name = program = "rclone"

    def command(self) -> list[str | Path]:
        return [
            *("rclone", "mount", f":s3:{BUCKET}/rclone", self.mountpoint, "--config", "/dev/null"),
            *("--s3-provider", "SeaweedFS", "--s3-endpoint", self.endpoint_url, "--s3-force-path-style"),
            *("--s3-access-key-id", ACCESS_KEY, "--s3-secret-access-key", SECRET_KEY),
            *("--vfs-cache-mode", "full", "--cache-dir", self.cache, "--vfs-write-back", "0s"),
            *("--dir-cache-time", "24h", "--buffer-size", "32M"),
            *("--vfs-read-chunk-streams", "4", "--vfs-read-chunk-size", "8M"),
        ]

    def settle(self, box: Path) -> None:
        # It stores behind the writers, and says so only by ending.
        os.sync()
        self.unmount()


class S3fs(Mount):
    name = program = "s3fs"

    @classmethod
    def version_argument(cls) -> str:
        return "--version"

    def command(self) -> list[str | Path]:
        options = ("use_path_request_style", f"use_cache={self.cache}", "parallel_count=8", "multipart_size=16")
        given = [word for option in (f"url={self.endpoint_url}", *options) for word in ("-o", option)]
        return ["s3fs", f"{BUCKET}:/s3fs", self.mountpoint, "-f", *given]

    def environment(self) -> Mapping[str, str]:
        return {"AWSACCESSKEYID": ACCESS_KEY, "AWSSECRETACCESSKEY": SECRET_KEY}


class JuiceFS(Mount):
    name = program = "juicefs"

    def command(self) -> list[str | Path]:
        program, meta = found("juicefs") or "juicefs", f"sqlite3://{self.folder}/meta.db"
        if not (self.folder / "meta.db").exists():
            place = ("--storage", "s3", "--bucket", f"{self.endpoint_url}/{BUCKET}", "--trash-days", "0")
            keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
            subprocess.run(
                [program, "format", "--no-update", *place, *keys, meta, "bench"], capture_output=True, check=True
            )
        return [
            *(program, "mount", "--no-usage-report", "--backup-meta", "0", "--log", self.folder / "juicefs.log"),
            *("--cache-dir", self.cache, "--cache-size", "4096", meta, self.mountpoint),
        ]


class WeedMount(Mount):
    name = "weed"
    program = "weed"

    def command(self) -> list[str | Path]:
        place = (f"-filer={self.filer}", f"-filer.path=/buckets/{BUCKET}/weed", f"-dir={self.mountpoint}")
        return [found("weed") or "weed", "mount", *place, f"-cacheDir={self.cache}", "-cacheCapacityMB=4096"]


class Direct(Contender):
    """One aioboto3 client, with eight requests on their way, and no file system: what the server can give."""

    name = "direct"
    program = "python3"

    @classmethod
    def version(cls) -> str:
        import aioboto3

        return f"aioboto3 {aioboto3.__version__}"

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Any]:
        import aioboto3
        from aiobotocore.config import AioConfig

        config = AioConfig(max_pool_connections=64, s3={"addressing_style": "path"})
        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
        async with aioboto3.Session().client(
            "s3", endpoint_url=self.endpoint_url, region_name="us-east-1", config=config, **keys
        ) as client:
            yield client

    def load(self, source: Path) -> None:
        async def put() -> None:
            async with self._client() as client:
                for path in sorted(path for path in source.rglob("*") if path.is_file()):
                    await client.upload_file(str(path), BUCKET, f"direct/{path.relative_to(source)}")

        asyncio.run(put())

    def time(self, work: str, source: Path) -> float | None:
        return asyncio.run(self._time(work, source))

    async def _time(self, work: str, source: Path) -> float | None:
        size_bytes = (source / BIG).stat().st_size
        async with self._client() as client:
            await client.head_object(Bucket=BUCKET, Key=f"direct/{BIG}")  # its connection is there, as a mount's is
            turns = asyncio.Semaphore(AT_ONCE)

            async def get(key: str, span: tuple[int, int] | None = None) -> None:
                where = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
                async with turns:
                    answer = await client.get_object(Bucket=BUCKET, Key=key, **where)
                    await answer["Body"].read()

            begin = time.perf_counter()
            if work == "cold-seq":
                spans = [(at, min(at + RANGE_BYTES, size_bytes)) for at in range(0, size_bytes, RANGE_BYTES)]
                await asyncio.gather(*(get(f"direct/{BIG}", span) for span in spans))
            elif work == "cold-rand":
                for offset in random_offsets(size_bytes):
                    await get(f"direct/{BIG}", (offset, offset + RANDOM_BYTES))
            elif work == "cold-small":
                small = [path.relative_to(source) for path in (source / "small").rglob("*") if path.is_file()]
                await asyncio.gather(*(get(f"direct/{path}") for path in sorted(small)))
            elif work == "put-big":
                await client.upload_file(str(source / BIG), BUCKET, f"direct/in-{time.time_ns()}")
            else:
                return None
            return time.perf_counter() - begin


CONTENDERS: Final[tuple[type[Contender], ...]] = (Direct, Rclone, S3fs, JuiceFS, WeedMount, Castore)
"""In the order of the table. Those whose program is not installed are left out, and named."""


def python_version() -> str:
    return ".".join(map(str, sys.version_info[:3]))
