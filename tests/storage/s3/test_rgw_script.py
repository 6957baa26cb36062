"""scripts/rgw, the Ceph RGW for tests and trials: it keeps what it stores, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.mount.store import wait_until
from tests.servers.s3_server import S3Server

SCRIPT = Path(__file__).parents[3] / "scripts/rgw"


def rgw(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)


def daemons_of(folder: Path) -> list[int]:
    return [int(path.read_text().split()[0]) for path in sorted((folder / "run").glob("*.pid"))]


def runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def over_tls(answer: str) -> S3Server:
    """The server that the script tells of."""
    told = dict(line.split("=", 1) for line in answer.splitlines())
    access_key, secret_key = (Path(told[f"{kind}_key_file"]).read_text() for kind in ("access", "secret"))
    server = S3Server("trial", access_key=access_key, secret_key=secret_key, region="default")
    server.endpoint_url, server.ca_bundle = told["tls_endpoint_url"], Path(told["ca_bundle"])
    return server


def test_a_restart_serves_what_was_stored(tmp_path: Path) -> None:
    folder = tmp_path / "rgw"
    try:
        first = rgw("start", folder)
        assert first.returncode == 0, first.stderr
        client = over_tls(first.stdout).client()
        client.create_bucket(Bucket="kept")
        client.put_object(Bucket="kept", Key="key", Body=b"value")
        assert rgw("start", folder).stdout == first.stdout, "it runs already"
        assert "was made for port" in rgw("start", folder, "1").stderr
        assert rgw("status", folder).returncode == 0

        assert rgw("stop", folder).returncode == 0
        stopped = rgw("status", folder)
        assert (stopped.returncode, stopped.stdout) == (1, "mon: \nosd: \nradosgw: \n")

        assert rgw("start", folder).stdout == first.stdout
        assert client.get_object(Bucket="kept", Key="key")["Body"].read() == b"value"
        client.close()
    finally:
        rgw("stop", folder)


def test_daemons_end_with_whoever_runs_them(tmp_path: Path) -> None:
    folder = tmp_path / "rgw"
    with subprocess.Popen([SCRIPT, "run", folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        assert "tls_endpoint_url=" in script.stdout.read()
        pids = daemons_of(folder)
        assert len(pids) == 3
        assert all(map(runs, pids))
        os.kill(script.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(runs, pids)), "the daemons' end")


def test_it_leaves_alone_what_it_has_not_made(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    for verb in ("start", "run"):
        refused = rgw(verb, tmp_path)
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "precious").read_text() == "data"
