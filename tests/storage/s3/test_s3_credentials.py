"""Where credentials come from and when they are looked for again: references, and the standard chain of the AWS tools.

A chain is looked for in the environment of a process, so each has one of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import pytest
import trio
from trio.abc import Stream

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import StorageDenied
from castore.storage.backends.s3 import S3Backend
from castore.storage.conformance_sources import PATIENCE_S
from castore.storage.source import BytesSource
from tests.servers.rgw import Rgw
from tests.servers.scripted_http import Request, ScriptedHTTP, answer, serving

from .conftest import but, in_file
from .test_s3_process import PRELUDE, ROOT
from .test_s3_tls import certificate

TRANSFERS: Final = ("native", "aioboto3")
LATER: Final = "2099-01-01T00:00:00Z"
LONG_AGO: Final = "2001-01-01T00:00:00Z"

# Asks, says in a line what came of it, and asks again for each line that it is given.
PROGRAM: Final = """
from castore.storage.backends.s3 import S3Backend

async def main():
    changes = {"access_key_ref": None, "secret_key_ref": None, "transfer": os.environ["TRANSFER"]}
    backend = S3Backend(settings(**changes))
    stdin = trio.wrap_file(sys.stdin)
    while await stdin.readline():
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(int(os.environ.get("AT_ONCE", "1"))):
                    nursery.start_soon(backend.delete, DIGEST)
            print("done", flush=True)
        except* Exception as group:
            print(type(group.exceptions[0]).__name__, group.exceptions[0], flush=True)
    await backend.aclose()

trio.run(main)
"""


@dataclass(slots=True)
class Chain:
    """A process whose backend has no references."""

    process: trio.Process

    async def ask(self) -> str:
        """What comes of a request, or of several at a time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        await self.process.stdin.send_all(b"\n")
        said = b""
        with trio.fail_after(PATIENCE_S):
            while not said.endswith(b"\n"):
                piece = await self.process.stdout.receive_some()
                if not piece:
                    raise EOFError(said)
                said += piece
        return said.decode().removesuffix("\n")


@asynccontextmanager
async def chain(endpoint_url: str, home: Path, bucket: str = "a-bucket", **environment: str) -> AsyncIterator[Chain]:
    """In an environment that gives no credentials but for these variables, and no files but below `home`."""
    command = [sys.executable, "-W", "error", "-c", PRELUDE + PROGRAM]
    given = {"HOME": str(home), "ENDPOINT": endpoint_url, "BUCKET": bucket, "TRANSFER": "native", "no_proxy": "*"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    variables = {**others, **given, "AWS_EC2_METADATA_DISABLED": "true", **environment}
    async with trio.open_nursery() as nursery:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = await nursery.start(partial(trio.run_process, command, cwd=ROOT, env=variables, **pipes))
        yield Chain(process)
        await process.stdin.aclose()


@dataclass(slots=True)
class Service:
    """Gives credentials, one after the other, as the services of AWS do; and is an S3 server that takes some keys."""

    answers: list[tuple[str, bytes]] = field(default_factory=list)
    """Parts of targets, and what a request of such a one is answered; the last one for ever."""
    refused: set[str] = field(default_factory=set)
    """Ids of keys, or session tokens, that the S3 server does not take."""
    refusal: bytes = answer(403, b"<Error><Code>InvalidAccessKeyId</Code></Error>")

    async def __call__(self, request: Request, stream: Stream) -> None:
        if "/a-bucket" in request.target:
            shown = {key_of(request), request.headers.get("x-amz-security-token", "")}
            await stream.send_all(self.refusal if shown & self.refused else answer(204))
            return
        for number, (part, data) in enumerate(self.answers):
            if part in f"{request.target} {request.body.decode()}":
                if any(other == part for other, _ in self.answers[number + 1 :]):
                    del self.answers[number]
                await stream.send_all(data)
                return
        await stream.send_all(answer(404))


def key_of(request: Request) -> str:
    """The id of the key that a request is signed with."""
    return request.headers["authorization"].partition("Credential=")[2].partition("/")[0]


def signed(server: ScriptedHTTP) -> list[tuple[str, str | None]]:
    """Id and session token that each request to the bucket was signed with."""
    requests = [request for request in server.requests if "/a-bucket" in request.target]
    return [(key_of(request), request.headers.get("x-amz-security-token")) for request in requests]


def given(name: str, expiration: str = LATER) -> bytes:
    """What a container's and an instance's service answer."""
    names = {"AccessKeyId": name, "SecretAccessKey": "s", "Token": f"token-of-{name}", "Expiration": expiration}
    return answer(200, json.dumps({"Code": "Success", **names}).encode())


def assumed(name: str, expiration: str = LATER) -> bytes:
    """What the service for roles answers (AWS STS API reference, "AssumeRoleWithWebIdentity")."""
    body = (
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
        f"<AccessKeyId>{name}</AccessKeyId><SecretAccessKey>s</SecretAccessKey>"
        f"<SessionToken>token-of-{name}</SessionToken><Expiration>{expiration}</Expiration>"
        "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
    )
    return answer(200, body.encode())


def write_profile(path: Path, key: str, profile: str = "default") -> None:
    """As the AWS tools have it; replaced at once."""
    new = path.with_suffix(".new")
    new.write_text(f"[{profile}]\naws_access_key_id = {key}\naws_secret_access_key = s\n")
    new.replace(path)


# the chain


@pytest.mark.parametrize("transfer", TRANSFERS)
async def test_the_environment(tmp_path: Path, transfer: str) -> None:
    environment = {"AWS_ACCESS_KEY_ID": "of-env", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "token-of-env"}
    async with (
        serving(Service()) as server,
        chain(server.endpoint_url, tmp_path, TRANSFER=transfer, **environment) as asked,
    ):
        assert await asked.ask() == "done"
        assert signed(server) == [("of-env", "token-of-env")]


async def test_a_profile_and_nothing_else_of_it(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    write_profile(tmp_path / ".aws/credentials", "of-profile", "site")
    (tmp_path / ".aws/config").write_text(
        "[profile site]\nregion = nowhere\nendpoint_url = http://127.0.0.1:9\ns3 =\n  addressing_style = virtual\n"
    )
    async with serving(Service()) as server, chain(server.endpoint_url, tmp_path, AWS_PROFILE="site") as asked:
        assert await asked.ask() == "done"
        assert signed(server) == [("of-profile", None)]
        assert "/us-east-1/s3/" in server.requests[0].headers["authorization"]


async def test_a_program(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {sys.executable} {tmp_path}/program\n")
    said = {"Version": 1, "AccessKeyId": "of-program", "SecretAccessKey": "s", "SessionToken": "t"}
    (tmp_path / "program").write_text(f"print({json.dumps(json.dumps(said))})")
    environment = {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    async with serving(Service()) as server, chain(server.endpoint_url, tmp_path, **environment) as asked:
        assert await asked.ask() == "done"
        assert signed(server) == [("of-program", "t")]


async def test_a_program_that_fails_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {sys.executable} {tmp_path}/program\n")
    (tmp_path / "program").write_text("import sys; sys.exit('it says a secret')")
    environment = {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    async with serving(Service()) as server, chain(server.endpoint_url, tmp_path, **environment) as asked:
        said = await asked.ask()
        assert said == "StorageUnavailable backend remote: credentials of the AWS chain: custom-process fails"
        assert server.requests == []


@pytest.mark.parametrize("transfer", TRANSFERS)
async def test_a_container_whose_credentials_expire(tmp_path: Path, transfer: str) -> None:
    service = Service([("/for-container", given("first", LONG_AGO)), ("/for-container", given("second"))])
    async with serving(service) as server:
        environment = {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{server.endpoint_url}/for-container",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": "of-pod",
        }
        async with chain(server.endpoint_url, tmp_path, TRANSFER=transfer, **environment) as asked:
            assert [await asked.ask() for _ in range(3)] == ["done"] * 3
        assert signed(server) == [("second", "token-of-second")] * 3, "what has expired signs nothing"
        services = [request for request in server.requests if request.target == "/for-container"]
        assert [request.headers["authorization"] for request in services] == ["of-pod"] * 2


async def test_an_instance(tmp_path: Path) -> None:
    service = Service(
        [
            ("/latest/api/token", answer(200, b"a-token")),
            ("/security-credentials/role", given("of-instance")),
            ("/security-credentials/", answer(200, b"role")),
        ]
    )
    async with serving(service) as server:
        environment = {"AWS_EC2_METADATA_DISABLED": "", "AWS_EC2_METADATA_SERVICE_ENDPOINT": server.endpoint_url}
        async with chain(server.endpoint_url, tmp_path, **environment) as asked:
            assert await asked.ask() == "done"
        assert signed(server) == [("of-instance", "token-of-of-instance")]


async def test_a_web_identity(tmp_path: Path) -> None:
    (tmp_path / "identity").write_text("signed-by-somebody")
    service = Service([("AssumeRoleWithWebIdentity", assumed("of-role"))])
    async with serving(service) as server:
        environment = {
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "identity"),
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/castore",
            "AWS_ENDPOINT_URL_STS": server.endpoint_url,
        }
        async with chain(server.endpoint_url, tmp_path, AT_ONCE="8", **environment) as asked:
            assert await asked.ask() == "done"
        assert signed(server) == [("of-role", "token-of-of-role")] * 8
        (request,) = [request for request in server.requests if "/a-bucket" not in request.target]
        assert b"WebIdentityToken=signed-by-somebody" in request.body


async def test_a_service_that_fails_is_asked_again_by_the_next_request(tmp_path: Path) -> None:
    service = Service([("/for-container", answer(500, b"no")), ("/for-container", answer(500, b"no"))])
    async with serving(service) as server:
        environment = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{server.endpoint_url}/for-container"}
        async with chain(server.endpoint_url, tmp_path, **environment) as asked:
            said = await asked.ask()
            assert said.startswith("StorageUnavailable backend remote: credentials of the AWS chain: ")
            service.answers = [("/for-container", given("at-last"))]
            assert await asked.ask() == "done"
        assert signed(server) == [("at-last", "token-of-at-last")]


async def test_none_at_all_until_there_are_some(tmp_path: Path) -> None:
    async with serving(Service()) as server, chain(server.endpoint_url, tmp_path) as asked:
        assert await asked.ask() == (
            "StorageDenied backend remote: credentials of the AWS chain: none found in the environment (AWS_*), "
            "profiles, container or instance; set access_key_ref and secret_key_ref, or one of these"
        )
        (tmp_path / ".aws").mkdir()
        write_profile(tmp_path / ".aws/credentials", "new")
        assert await asked.ask() == "done"
        assert signed(server) == [("new", None)]


@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.parametrize(
    "refusal",
    [
        answer(403, b"<Error><Code>InvalidAccessKeyId</Code></Error>"),
        answer(400, b"<Error><Code>ExpiredToken</Code></Error>"),
        answer(401),
    ],
    ids=["403", "400 ExpiredToken", "401"],
)
async def test_what_a_server_refuses_is_looked_for_again(tmp_path: Path, refusal: bytes, transfer: str) -> None:
    (tmp_path / ".aws").mkdir()
    write_profile(tmp_path / ".aws/credentials", "old")
    service = Service(refusal=refusal)
    async with (
        serving(service) as server,
        chain(server.endpoint_url, tmp_path, TRANSFER=transfer, AT_ONCE="4") as asked,
    ):
        assert await asked.ask() == "done"
        write_profile(tmp_path / ".aws/credentials", "new")
        assert await asked.ask() == "done"
        assert {key for key, _ in signed(server)} == {"old"}, "nobody refused the old ones yet"
        service.refused.add("old")
        said = await asked.ask()
        with trio.fail_after(PATIENCE_S):
            while said != "done":  # not looked for again within a second of the time before
                assert "StorageDenied" in said
                said = await asked.ask()
        assert signed(server)[-1] == ("new", None)


async def test_a_refusal_that_stays_says_where_to_look(tmp_path: Path) -> None:
    service = Service(refused={"of-env"})
    environment = {"AWS_ACCESS_KEY_ID": "of-env", "AWS_SECRET_ACCESS_KEY": "s"}
    async with serving(service) as server, chain(server.endpoint_url, tmp_path, **environment) as asked:
        said = await asked.ask()
        assert said.startswith("StorageDenied ")
        assert said.endswith("check what the AWS credential chain gives, and what it may do")
        assert len(signed(server)) == 1


# references


@pytest.mark.parametrize("transfer", TRANSFERS)
async def test_a_session_token_by_reference(of_nobody: S3Settings, tmp_path: Path, transfer: str) -> None:
    (tmp_path / "token").write_text("a-session-token\n")
    settings = but(of_nobody, transfer=transfer, session_token_ref=in_file(tmp_path / "token", "session_token_ref"))
    async with serving(Service(refused={"no"})) as server:
        backend = S3Backend(but(settings, endpoint_url=server.endpoint_url, bucket="a-bucket"))
        await backend.delete(Digest.of(b"a"))
        (tmp_path / "token").write_text("no")
        with pytest.raises(StorageDenied, match=r"session_token_ref = file:.*/token"):
            await backend.delete(Digest.of(b"a"))
        await backend.aclose()
    access = (tmp_path / "access").read_text().strip()
    assert signed(server) == [(access, "a-session-token"), (access, "no")]


class Rotating:
    """A user of Ceph whose keys are changed while requests go on."""

    def __init__(self, server: Rgw) -> None:
        self._server = server
        self.name, self.access_key, self.secret_key = server.add_user()

    def rotate(self) -> Self:
        """Make a second key, and take the first away."""
        made = json.loads(self._ask("key", "create", "--gen-access-key", "--gen-secret"))
        (new,) = [key for key in made["keys"] if key["access_key"] != self.access_key]
        self._ask("key", "rm", "--access-key", self.access_key)
        self.access_key, self.secret_key = new["access_key"], new["secret_key"]
        return self

    def write_files(self, folder: Path) -> Self:
        for name, text in (("access", self.access_key), ("secret", self.secret_key)):
            (folder / "new").write_text(text)
            (folder / "new").replace(folder / name)
        return self

    def write_profile(self, path: Path) -> None:
        path.write_text(
            f"[default]\naws_access_key_id = {self.access_key}\naws_secret_access_key = {self.secret_key}\n"
        )

    def _ask(self, *command: str) -> str:
        return self._server.admin(*command, "--uid", self.name)


@pytest.mark.parametrize("transfer", TRANSFERS)
async def test_keys_are_changed_at_a_real_server(
    every_server: Any, of_nobody: S3Settings, tmp_path: Path, transfer: str
) -> None:
    server = every_server.rgw
    user = Rotating(server).write_files(tmp_path)
    bucket = f"of-{user.name}"
    settings = but(of_nobody, transfer=transfer, endpoint_url=server.endpoint_url, region="default", bucket=bucket)
    data = b"some bytes"
    backend = S3Backend(settings)
    await backend.create()
    await backend.put(Digest.of(data), BytesSource(data))
    reads: list[Callable[[], Awaitable[object]]] = [
        lambda: backend.get(Digest.of(data), offset=0, length=len(data)),
        lambda: backend.head(Digest.of(data)),
        lambda: backend.put(Digest.of(data), BytesSource(data)),
    ]
    for _ in range(2):
        user.rotate()
        for read in reads:
            with pytest.raises(StorageDenied):
                await read()
        user.write_files(tmp_path)
        for read in reads:
            await read()
    await backend.delete(Digest.of(data))
    (tmp_path / ".aws").mkdir()
    user.write_profile(tmp_path / ".aws/credentials")
    async with chain(server.endpoint_url, tmp_path, bucket, TRANSFER=transfer) as asked:
        assert await asked.ask() == "done"
        user.rotate().write_profile(tmp_path / ".aws/credentials")
        with trio.fail_after(PATIENCE_S):
            while await asked.ask() != "done":
                pass
    user.write_files(tmp_path)
    await backend.aclose()


@pytest.mark.parametrize(("name", "expected"), [("IP:127.0.0.1", "done"), ("IP:127.0.0.2", "StorageUnavailable")])
async def test_a_service_over_tls_has_to_be_who_it_says(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "identity").write_text("signed-by-somebody")
    service = Service([("AssumeRoleWithWebIdentity", assumed("of-role"))])
    async with serving(service, tls=certificate(tmp_path, name)) as sts, serving(service) as server:
        environment = {
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "identity"),
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/castore",
            "AWS_ENDPOINT_URL_STS": sts.endpoint_url,
            "AWS_CA_BUNDLE": str(tmp_path / "authority.pem"),
        }
        async with chain(server.endpoint_url, tmp_path, **environment) as asked:
            assert (await asked.ask()).partition(" ")[0] == expected
        assert len(sts.requests) == (expected == "done")
