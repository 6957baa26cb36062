"""The S3 backend over TLS: which certificates it takes. In a process of its own, which trusts another authority."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from trio.abc import Stream

from tests.servers.scripted_http import Request, answer, serving

from .test_s3_process import PRELUDE, ROOT

PROGRAM = """
async def main():
    backend = open_backend(settings())
    print(await backend.health())
    await backend.aclose()

trio.run(main)
"""


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], capture_output=True, check=True)


def certificate(folder: Path, name: str) -> ssl.SSLContext:
    """A server's certificate for `name`, signed by an authority in `folder/authority.pem`."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout")
    authority, authority_key = str(folder / "authority.pem"), str(folder / "authority.key")
    openssl("req", "-x509", *key, authority_key, "-out", authority, "-subj", "/CN=authority", "-days", "2")
    (folder / "extensions").write_text(f"subjectAltName={name}\n")
    request, signed, server_key = (str(folder / part) for part in ("request.pem", "server.pem", "server.key"))
    openssl("req", "-new", *key, server_key, "-out", request, "-subj", "/CN=server")
    openssl(
        *("x509", "-req", "-in", request, "-CA", authority, "-CAkey", authority_key, "-CAcreateserial"),
        *("-out", signed, "-extfile", str(folder / "extensions"), "-days", "2"),
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(signed, server_key)
    return context


async def listing(request: Request, stream: Stream) -> None:
    body = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    await stream.send_all(answer(200, body))


async def health(endpoint_url: str, authority: Path | str) -> str:
    """What a backend says that trusts this authority, and no other."""
    environment = {
        **os.environ,
        "ENDPOINT": endpoint_url,
        "BUCKET": "a-bucket",
        "THE_ACCESS_KEY": "a",
        "THE_SECRET_KEY": "b",
        "AWS_CA_BUNDLE": str(authority),
    }
    command = [sys.executable, "-W", "error", "-c", PRELUDE + PROGRAM]
    done = await trio.run_process(command, cwd=ROOT, env=environment, capture_stdout=True, stderr=subprocess.STDOUT)
    return done.stdout.decode()


@pytest.mark.parametrize(
    ("name", "host", "expected"),
    [
        ("IP:127.0.0.1", "127.0.0.1", "status='pass'"),
        ("DNS:localhost", "localhost", "status='pass'"),
        ("DNS:elsewhere.example", "localhost", "no safe connection to https://localhost"),
        ("IP:127.0.0.2", "127.0.0.1", "no safe connection to https://127.0.0.1"),
    ],
)
async def test_the_certificate_has_to_be_for_the_host(tmp_path: Path, name: str, host: str, expected: str) -> None:
    async with serving(listing, tls=certificate(tmp_path, name)) as server:
        endpoint_url = server.endpoint_url.replace("127.0.0.1", host)
        assert expected in await health(endpoint_url, tmp_path / "authority.pem")
        assert len(server.requests) == (1 if "pass" in expected else 0)


async def test_the_certificate_has_to_be_of_a_known_authority(tmp_path: Path) -> None:
    async with serving(listing, tls=certificate(tmp_path, "IP:127.0.0.1")) as server:
        (tmp_path / "other").mkdir()
        certificate(tmp_path / "other", "IP:127.0.0.1")
        output = await health(server.endpoint_url, tmp_path / "other" / "authority.pem")
        assert "no safe connection" in output
        assert "CERTIFICATE_VERIFY_FAILED" in output
        assert server.requests == []
