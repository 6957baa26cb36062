"""Signatures of S3 requests that this project sends itself: the client library's own signer, without its requests.

Sends nothing, and shows nobody what it signs with.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlencode, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials

from castore import __version__
from castore.config_backends import S3Settings

if TYPE_CHECKING:
    from castore.storage.backends.s3_client import S3Client

CREDENTIALS_S: Final = 30.0
"""Seconds that credentials of the AWS chain are used before they are asked for again, which takes a visit to another
thread. The chain renews them minutes before they expire, and after a refusal they are asked for at once."""

NO_BODY: Final = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""SHA-256 of nothing, which a request without a body is signed with."""
UNSIGNED: Final = "UNSIGNED-PAYLOAD"
"""Stands for the SHA-256 of a body that a Content-MD5 protects (Amazon S3 API reference, "Signature Calculations")."""

InLibrary = Callable[..., Awaitable[Any]]
"""Runs `function(client, *arguments)` in the client library's thread."""

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class Signer:
    """Requests to one bucket at one endpoint, by the addressing style of its settings."""

    def __init__(self, settings: S3Settings) -> None:
        parts = urlsplit(settings.endpoint_url)
        host = parts.hostname or ""
        self._root = ""
        if settings.addressing_style == "virtual":
            host = f"{settings.bucket}.{host}"
        else:
            self._root = f"/{settings.bucket}"
        self.host = host
        self.is_tls = parts.scheme == "https"
        self.port = parts.port or _DEFAULT_PORTS[parts.scheme]
        bracketed = f"[{host}]" if ":" in host else host
        self._authority = bracketed if self.port == _DEFAULT_PORTS[parts.scheme] else f"{bracketed}:{self.port}"
        self._scheme = parts.scheme
        self._region = settings.region

    def target(self, key: str, **query: str) -> str:
        """The target of a request for the key; the bucket itself when it is empty."""
        path = f"{self._root}/{quote(key)}" if key else self._root or "/"
        return f"{path}?{urlencode(query, quote_via=quote)}" if query else path

    def signed(
        self, credentials: Hidden, method: str, target: str, headers: Mapping[str, str], sha256: str
    ) -> dict[str, str]:
        """The headers to send: those given, and what the signature adds. `sha256` is of the body, or UNSIGNED."""
        request = AWSRequest(
            method,
            f"{self._scheme}://{self._authority}{target}",
            headers={"Host": self._authority, "User-Agent": f"castore/{__version__}", **headers},
        )
        _Auth(credentials, self._region, sha256).add_auth(request)
        return dict(request.headers.items())


class _Auth(S3SigV4Auth):  # type: ignore[misc]
    """The client library's, told the body's digest instead of the body."""

    def __init__(self, credentials: Hidden, region: str, sha256: str) -> None:
        super().__init__(credentials, "s3", region)
        self._sha256 = sha256

    def payload(self, request: Any) -> str:
        return self._sha256


class Hidden(ReadOnlyCredentials):  # type: ignore[misc]
    """Credentials that a log and a traceback with local variables do not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<credentials>"


class SigningCredentials:
    """What signs a request: references are resolved for each; what the AWS chain gives is kept for a moment."""

    def __init__(self, settings: S3Settings, run: InLibrary) -> None:
        self._settings = settings
        self._run = run
        self._kept: Hidden | None = None
        self._kept_until = 0.0

    async def current(self) -> Hidden:
        """The ones to sign with now. Raises ConfigError or StorageError."""
        access, secret, token = (
            self._settings.access_key_ref,
            self._settings.secret_key_ref,
            self._settings.session_token_ref,
        )
        if access is not None and secret is not None:
            return Hidden(access.resolve(), secret.resolve(), token.resolve() if token else None)
        if self._kept is not None and time.monotonic() < self._kept_until:
            return self._kept
        return self._keep(await self._run(_current))

    async def after(self, refused: Hidden) -> Hidden:
        """The ones to try when a server refuses these; the same when there are no others."""
        if self._settings.access_key_ref is None:
            return self._keep(await self._run(_after, refused))
        return await self.current()

    def _keep(self, credentials: Hidden) -> Hidden:
        self._kept, self._kept_until = credentials, time.monotonic() + CREDENTIALS_S
        return credentials


async def _current(client: S3Client) -> Hidden:
    return Hidden(*await client.credentials.get_frozen_credentials())


async def _after(client: S3Client, refused: Hidden) -> Hidden:
    found = await _current(client)
    if found == refused and await client.credentials.changed():
        found = await _current(client)
    return found
