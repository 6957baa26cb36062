"""The S3 backend over TLS: which certificates it takes. In a process of its own, which trusts other authorities."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.abc import Stream

from castore.digest import Digest
from tests.servers.scripted_http import Request, answer, serving

from .test_s3_process import PRELUDE, ROOT

DIGEST = Digest.of(b"some bytes")

PROGRAM = """
from pathlib import Path

async def main():
    ca_bundle = os.environ.get("CA_BUNDLE")
    backend = open_backend(settings(ca_bundle=Path(ca_bundle) if ca_bundle else None))
    print(await backend.health())
    try:
        print(await backend.head(DIGEST))
    except Exception as exc:
        print(type(exc).__name__, exc)
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
    if request.method == "HEAD":
        await stream.send_all(answer(200, content_length="10", last_modified="Sat, 03 Feb 2001 12:00:00 GMT"))
    else:
        await stream.send_all(answer(200, body))


async def health(endpoint_url: str, authority: Path | str, **changes: str) -> str:
    """What a backend says, by the client library and by the native path, whose AWS tools trust this authority."""
    environment = {
        **os.environ,
        "ENDPOINT": endpoint_url,
        "BUCKET": "a-bucket",
        "THE_ACCESS_KEY": "a",
        "THE_SECRET_KEY": "b",
        "AWS_CA_BUNDLE": str(authority),
        "no_proxy": "*",
        **changes,
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
        output = await health(endpoint_url, tmp_path / "authority.pem")
        assert expected in output
        if "pass" in expected:
            assert "ObjectInfo(" in output
            assert len(server.requests) == 2
        else:
            assert f"StorageUnavailable backend remote: head {DIGEST}: {expected}" in output
            assert server.requests == []


async def test_the_certificate_has_to_be_of_a_known_authority(tmp_path: Path) -> None:
    async with serving(listing, tls=certificate(tmp_path, "IP:127.0.0.1")) as server:
        (tmp_path / "other").mkdir()
        certificate(tmp_path / "other", "IP:127.0.0.1")
        output = await health(server.endpoint_url, tmp_path / "other" / "authority.pem")
        assert "no safe connection" in output
        assert "CERTIFICATE_VERIFY_FAILED" in output
        assert server.requests == []


@pytest.fixture
def other_authority(tmp_path: Path) -> Path:
    """One that no server here has a certificate of."""
    (tmp_path / "other").mkdir()
    certificate(tmp_path / "other", "IP:127.0.0.1")
    return tmp_path / "other/authority.pem"


async def test_the_setting_decides_whom_to_trust(tmp_path: Path, other_authority: Path) -> None:
    """`ca_bundle` comes before AWS_CA_BUNDLE, for better and for worse."""
    async with serving(listing, tls=certificate(tmp_path, "IP:127.0.0.1")) as server:
        authority = tmp_path / "authority.pem"
        output = await health(server.endpoint_url, other_authority, CA_BUNDLE=str(authority))
        assert "status='pass'" in output
        assert "ObjectInfo(" in output
        output = await health(server.endpoint_url, authority, CA_BUNDLE=str(other_authority))
        assert output.count("CERTIFICATE_VERIFY_FAILED") == 2
        assert len(server.requests) == 2


async def test_without_a_setting_the_host_decides(tmp_path: Path, other_authority: Path) -> None:
    """OpenSSL's own places, which SSL_CERT_FILE replaces; and no authorities of the client library beside them."""
    async with serving(listing, tls=certificate(tmp_path, "IP:127.0.0.1")) as server:
        for authority, expected in ((tmp_path / "authority.pem", "pass"), (other_authority, "fail")):
            output = await health(server.endpoint_url, "", SSL_CERT_FILE=str(authority), SSL_CERT_DIR=str(tmp_path))
            assert f"status='{expected}'" in output
        assert len(server.requests) == 2


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
async def test_authorities_that_cannot_be_used(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "authorities.pem"
    if content is not None:
        file.write_bytes(content)
    why = "No such file or directory" if content is None else "is no file of certificates in PEM form"
    output = await health("https://127.0.0.1:9", "", CA_BUNDLE=str(file))
    assert output.count(f"ca_bundle = '{file}': ") == 2
    assert output.count(why) == 2
    assert output.startswith("BackendHealth(status='fail'")
    assert "\nStorageRejected backend remote: " in output


@asynccontextmanager
async def proxy(port: int) -> AsyncIterator[str]:
    """Answers CONNECT, whatever it names, with the way to one port of this host."""

    async def pass_on(source: Stream, sink: Stream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                await sink.send_all(data)
        await sink.aclose()

    async def serve(caller: trio.SocketStream) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += await caller.receive_some()
        assert asked.startswith(b"CONNECT ")
        async with caller, await trio.open_tcp_stream("127.0.0.1", port) as server, trio.open_nursery() as ways:
            await caller.send_all(b"HTTP/1.1 200 Connected\r\n\r\n")
            ways.start_soon(pass_on, caller, server)
            ways.start_soon(pass_on, server, caller)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("name", "passes"), [("DNS:s3.test", True), ("DNS:elsewhere.test", False)])
async def test_a_proxy_does_not_make_a_certificate_good(tmp_path: Path, name: str, passes: bool) -> None:
    async with serving(listing, tls=certificate(tmp_path, name)) as server:
        async with proxy(int(server.endpoint_url.rpartition(":")[2])) as url:
            authority = str(tmp_path / "authority.pem")
            output = await health("https://s3.test", "", CA_BUNDLE=authority, no_proxy="", https_proxy=url)
        assert ("status='pass'" in output) == passes
        assert ("no safe connection to https://s3.test" in output) == (not passes)
        assert len(server.requests) == (2 if passes else 0)
