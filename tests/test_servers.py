"""Which S3 servers a run of the tests covers, and that it says so. Not what the tests find out about them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

from tests.mount.store import wait_until
from tests.servers.relay import Relay
from tests.servers.seaweedfs import SeaweedFS

ROOT = Path(__file__).resolve().parents[1]
CONFORMANCE = "tests/storage/s3/test_s3_conformance.py"


def run_tests(*arguments: str, **environ: str) -> str:
    """What pytest says of the conformance suite; it must succeed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CASTORE_TEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", CONFORMANCE, *arguments],
        cwd=ROOT,
        env=kept | environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def servers_of(listing: str) -> set[str]:
    """The names of servers in the ids of tests that pytest collected."""
    return set(re.findall(r"[-\[](seaweedfs|rgw-https|rgw|juicefs|minio|endpoint)[-\]]", listing))


def test_what_is_not_here_is_not_collected_and_said(s3_server: SeaweedFS, tmp_path: Path) -> None:
    """And an endpoint of somebody else's, which the environment names, is tested and left as it was."""
    nobody = f"unix://{tmp_path}/nobody"
    listing = run_tests("-q", "--collect-only", DOCKER_HOST=nobody)
    assert servers_of(listing) == {"seaweedfs", "rgw", "rgw-https", "juicefs"}

    said = run_tests(
        *("-k", "TestS3AsConfigured and endpoint and what_was_put"),
        DOCKER_HOST=nobody,
        CASTORE_TEST_S3_ENDPOINT=s3_server.endpoint_url,
        CASTORE_TEST_S3_ACCESS_KEY=s3_server.access_key,
        CASTORE_TEST_S3_SECRET_KEY=s3_server.secret_key,
        CASTORE_TEST_S3_BUCKET=s3_server.bucket,
    )
    (line,) = [line for line in said.splitlines() if line.startswith("S3 servers: ")]
    covered, _, missed = line.removeprefix("S3 servers: ").partition("; not: ")
    assert covered == s3_server.endpoint_url
    assert "MinIO container (no Docker engine answers)" in missed
    assert re.search(r"\b[1-9]\d* passed", said)
    client = s3_server.client()
    left = client.list_objects_v2(Bucket=s3_server.bucket, Prefix="castore-tests-")
    client.close()
    assert left["KeyCount"] == 0


class _Engine(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"ApiVersion": "1.47", "MinAPIVersion": "1.24"}' if self.path.endswith("/version") else b"OK"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def engine() -> Iterator[str]:
    """The address of something that answers as a Docker engine does, and has no containers."""
    with HTTPServer(("127.0.0.1", 0), _Engine) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_where_a_docker_engine_answers_a_container_is_collected() -> None:
    with engine() as address:
        assert "minio" in servers_of(run_tests("-q", "--collect-only", DOCKER_HOST=address))


def test_a_relay_keeps_nothing_of_connections_that_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Relay(server.getsockname()[1]) as relay:

        def carry(*, caller_ends_first: bool) -> None:
            with socket.create_connection(("127.0.0.1", relay.port)) as caller:
                caller.sendall(b"asked")
                answering = server.accept()[0]
                with answering:
                    assert answering.recv(5) == b"asked"
                    answering.sendall(b"answered")
                    (caller if caller_ends_first else answering).shutdown(socket.SHUT_WR)
                    assert caller.recv(8) == b"answered"

        before = open_descriptors()
        for number in range(20):
            carry(caller_ends_first=bool(number % 2))
        wait_until(lambda: open_descriptors() <= before, "the relay has closed what ended")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
