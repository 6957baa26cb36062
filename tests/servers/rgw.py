"""A real Ceph RGW for the tests, started by scripts/rgw; over http and https. Knows nothing of how Ceph is set up."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import uuid
from pathlib import Path
from typing import Final

from tests.servers.s3_server import LocalServer, S3Server, wait_for_bucket

KMS_KEY_ID: Final = "castore-trial"
"""The key for `aws:kms` that scripts/rgw gives it."""
_SCRIPT: Final = Path(__file__).parents[2] / "scripts/rgw"


class Rgw(LocalServer):
    """Over http; `tls` is the same server over https. What it stores is gone when it stops.

    scripts/rgw ends its daemons and removes their data when its input ends: when this process does, however.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, "Ceph RGW over http")
        self.region = "default"
        self.tls = _OverTls()
        self._answer: dict[str, str] = {}

    @property
    def version(self) -> str:
        return _version()

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            if (self.root / "rgw").exists():
                raise RuntimeError(f"scripts/rgw has left its data in {self.root}")

    def add_user(self) -> tuple[str, str, str]:
        """Make a user who owns nothing and may do nothing: the name, its access key and its secret key."""
        name = f"user-{uuid.uuid4().hex}"
        made = self.admin("user", "create", "--uid", name, "--display-name", name)
        (keys,) = json.loads(made)["keys"]
        return name, keys["access_key"], keys["secret_key"]

    def admin(self, *command: str) -> str:
        """What `radosgw-admin` prints."""
        whole = ["radosgw-admin", "-c", self._answer["ceph_conf"], *command]
        return subprocess.run(whole, capture_output=True, text=True, check=True).stdout

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [_SCRIPT, "run", self.root / "rgw"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        assert process.stdout is not None
        with process.stdout:  # ends when the server answers, or when the script does
            answer = self._answer = dict(line.split("=", 1) for line in process.stdout.read().decode().splitlines())
        if answer:
            self.access_key, self.secret_key = (
                Path(answer[f"{kind}_key_file"]).read_text() for kind in ("access", "secret")
            )
            self.endpoint_url = answer["endpoint_url"]
            self.tls.access_key, self.tls.secret_key = self.access_key, self.secret_key
            self.tls.endpoint_url, self.tls.ca_bundle = answer["tls_endpoint_url"], Path(answer["ca_bundle"])
        return process

    def kill(self) -> None:
        """The gateway alone: what Ceph stores, its other daemons keep."""
        gateway = os.pidfd_open(self._gateway())
        self._signal(signal.SIGKILL)
        select.select([gateway], [], [])
        os.close(gateway)

    def revive(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        if not wait_for_bucket(self, self._process):
            raise RuntimeError(f"{self.name} did not start again")

    def _signal(self, number: int) -> None:
        os.kill(self._gateway(), number)

    def _gateway(self) -> int:
        pid_file = Path(self._answer["ceph_conf"]).parent / "run/radosgw.pid"
        return int(pid_file.read_text().split()[0])


class _OverTls(S3Server):
    """The same server, which lives as long as the other says."""

    def __init__(self) -> None:
        super().__init__("Ceph RGW over https", access_key="", secret_key="", region="default")

    @property
    def version(self) -> str:
        return _version()


def _version() -> str:
    said = subprocess.run(["radosgw", "--version"], capture_output=True, text=True, check=True).stdout
    return said.split()[2]
