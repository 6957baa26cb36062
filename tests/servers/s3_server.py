"""What all S3 servers of the tests have in common: how to reach one, how one that runs here begins and ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY: Final = "a-key-id-that-occurs-nowhere-else"
SECRET_KEY: Final = "a-secret-that-occurs-nowhere-else"
"""Of a server on loopback that lives as long as the tests: no secret of anybody."""
BUCKET: Final = "castore-tests"

START_S: Final = 60.0
"""Seconds until a server that still does not answer has failed to start; the slowest takes 10 on an idle host."""
STOP_S: Final = 2.0
"""Seconds it has to stop by itself. SeaweedFS closes its files within the first, then waits 15 for connections."""
_ATTEMPTS: Final = 3
"""Starts, in case that somebody takes a port that was free a moment before."""


class S3Server:
    """A server that answers at `endpoint_url`, and a bucket there. What tests put lies below `key_prefix`, or anywhere.

    `ca_bundle` is the file with the authorities that its certificate needs, None for those of the system.
    """

    def __init__(self, name: str, *, access_key: str, secret_key: str, region: str = "us-east-1") -> None:
        self.name = name
        self.access_key = access_key
        self.secret_key = secret_key
        self.region = region
        self.endpoint_url = ""
        self.ca_bundle: Path | None = None
        self.bucket = BUCKET
        self.key_prefix = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Whoever has something to end overrides it."""

    @property
    def version(self) -> str:
        """Of the program, as it says itself; empty where nobody knows."""
        return ""

    @property
    def is_local(self) -> bool:
        """Whether it is at a port of 127.0.0.1, so that a relay can stand before it."""
        return True

    def client(self, **config: Any) -> Any:
        """A plain boto3 client, to look at the server from outside. Whoever asks for it closes it."""
        return Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            verify=str(self.ca_bundle) if self.ca_bundle else None,
            config=Config(
                s3={"addressing_style": "path"},
                proxies={},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                **config,
            ),
        )


class LocalServer(S3Server, ABC):
    """A server of one's own, with all data below `root`. A context manager.

    It ends with this process, however that ends: so the main thread starts it, which lives as long.
    """

    def __init__(self, root: Path, name: str, *, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> None:
        super().__init__(name, access_key=access_key, secret_key=secret_key)
        self.root = root
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and return when it serves requests. Raises RuntimeError with its log's end."""
        self.root.mkdir(parents=True, exist_ok=True)
        for _ in range(_ATTEMPTS):
            self._process = self._spawn()
            if wait_for_bucket(self, self._process):
                return
            self.stop()
        raise RuntimeError(f"{self.name} did not start: ...{self._log.read_text()[-3000:]}")

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

    def kill(self) -> None:
        """End it as a crash does. `revive` serves what it stored again."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def revive(self) -> None:
        """Serve again at the same port, after `kill`."""
        self.start()

    def pause(self) -> None:
        """Let it hang: connections open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @abstractmethod
    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the process, and set `endpoint_url`."""

    @property
    def _log(self) -> Path:
        return self.root / "log"

    def _run(self, *command: str | Path, **environment: str) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log, (self.root / "lock").open("ab") as lock:
            wait_for_lock(
                lock.fileno()
            )  # the process has it until it ends; that of a program that was killed ends slowly
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.root,
                env=environment or None,
                pass_fds=(lock.fileno(),),
            )

    def _signal(self, number: int) -> None:
        if self._process is None:
            raise RuntimeError("the server does not run")
        self._process.send_signal(number)
        if number == signal.SIGSTOP:  # which its threads notice one after the other
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def wait_for_bucket(server: S3Server, process: subprocess.Popen[bytes] | None = None) -> bool:
    """Make the server's bucket as soon as it can: its port is open before that. Whether that came to be in time."""
    client = server.client(retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=5)
    try:
        end = time.monotonic() + START_S
        while time.monotonic() < end and (process is None or process.poll() is None):
            try:
                client.create_bucket(Bucket=server.bucket)
                return True
            except ClientError as exc:
                if exc.response["Error"]["Code"] in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    return True
                time.sleep(0.1)
            except BotoCoreError:
                time.sleep(0.1)
        return False
    finally:
        client.close()


def wait_for_lock(descriptor: int) -> None:
    """Lock a file that another process may have locked. Raises BlockingIOError when that keeps it for too long."""
    end = time.monotonic() + START_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def program(name: str) -> str:
    """The path of a program that a PyPI package brings. Raises RuntimeError."""
    beside_python = Path(sysconfig.get_path("scripts")) / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"no program `{name}`: pip install 'castore[test]'")
    return found


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens at, for a moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
