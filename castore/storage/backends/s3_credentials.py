"""Where an S3 client's credentials come from: references of the settings, or the standard AWS credential chain.

Runs in the asyncio loop, and imports no asyncio. Signs nothing, and shows nobody what it finds.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from time import monotonic
from typing import Any, Final

from aiobotocore.credentials import create_credential_resolver
from aiobotocore.session import AioSession
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import (
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    MetadataRetrievalError,
)

from castore.config_backends import S3Settings
from castore.config_values import SecretRef
from castore.errors import ConfigError, StorageDenied, StorageError, StorageUnavailable
from castore.storage.asyncio_thread import LoopLock
from castore.storage.backends.s3_errors import FOREIGN, clear_locals, one_line, status_of
from castore.storage.backends.s3_tls import TLSConfig, tls_context

LOOK_AGAIN_S: Final = 1.0
"""Seconds between two searches of the chain after refusals: one costs a tenth of a second of work, or a request."""
_CHAIN_CALL_S: Final = 5.0
"""Seconds for a connection to a service that gives credentials, and of silence: a read waits for both."""
_TEMPORARY: Final = (HTTPClientError, MetadataRetrievalError, CredentialRetrievalError, OSError, RuntimeError)
"""What a chain raises when a service or a program that gives credentials fails; the rest is how it is set up."""
_SILENT_PROVIDERS: Final = frozenset({"custom-process"})
"""A program of the user's may print anything: what it says is not repeated."""

for _name in ("aiobotocore.credentials", "botocore.credentials"):
    # They warn of what is raised, too, and repeat what a service or a program said.
    logging.getLogger(_name).setLevel(logging.ERROR)

_signed_with: ContextVar[ReadOnlyCredentials | None] = ContextVar("_signed_with", default=None)


class Credentials(ABC):
    """What signs a request, asked for anew for each. Has the methods that the client library asks for."""

    method: Final = "castore"
    token: Final = None

    async def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """The ones to sign with now. Raises ConfigError or StorageError."""
        credentials = await self._current()
        _signed_with.set(credentials)
        return credentials

    async def changed(self) -> bool:
        """Whether there are others than this task signed with last, which the server refused: another try may do."""
        return bool(await self._current() != _signed_with.get())

    @abstractmethod
    async def _current(self) -> ReadOnlyCredentials: ...

    async def load_credentials(self) -> Credentials:
        """Itself: it takes the place of the client library's search, too."""
        return self

    async def get_account_id(self) -> None:
        return None

    def get_deferred_property(self, name: str) -> Callable[[], Any]:
        return self.get_account_id


def credentials_of(settings: S3Settings) -> Credentials:
    """The references where the settings have some, else the chain. Looks nothing up yet."""
    if settings.access_key_ref is None or settings.secret_key_ref is None:
        return _Chain(settings)
    return _Referenced(settings.access_key_ref, settings.secret_key_ref, settings.session_token_ref)


class _Referenced(Credentials):
    """Resolved anew for each signature, which costs less than a thousandth of it for files; never kept."""

    def __init__(self, access: SecretRef, secret: SecretRef, token: SecretRef | None) -> None:
        self._access = access
        self._secret = secret
        self._session_token = token

    async def _current(self) -> ReadOnlyCredentials:
        token = self._session_token.resolve() if self._session_token is not None else None
        return ReadOnlyCredentials(self._access.resolve(), self._secret.resolve(), token)


class _Chain(Credentials):
    """The client library's own search, and its own renewal of what expires.

    A search that fails is made again by the next request; one that led to credentials that a server refuses, too.
    """

    def __init__(self, settings: S3Settings) -> None:
        self._backend_id = settings.backend_id
        self._region = settings.region
        self._searching = LoopLock()
        self._found: Any = None
        self._found_at = 0.0

    async def changed(self) -> bool:
        if await super().changed():
            return True  # somebody else looked meanwhile, or they were about to expire
        await self._search(again=True)
        return await super().changed()

    async def _current(self) -> ReadOnlyCredentials:
        try:
            if self._found is None:
                await self._search()
            frozen = await self._found.get_frozen_credentials()
        except (*FOREIGN, RuntimeError) as exc:
            # `from None`: what went wrong may repeat what a service or a program answered.
            raise self._failed(exc) from None
        return ReadOnlyCredentials(frozen.access_key, frozen.secret_key, frozen.token)

    async def _search(self, *, again: bool = False) -> None:
        async with self._searching:
            if self._found is not None and not (again and monotonic() >= self._found_at + LOOK_AGAIN_S):
                return
            session = AioSession()  # a new one: it reads each file once
            session.set_default_client_config(
                TLSConfig(
                    tls_context(None),
                    connect_timeout=_CHAIN_CALL_S,
                    read_timeout=_CHAIN_CALL_S,
                    retries={"total_max_attempts": 1, "mode": "standard"},  # RetryingBackend tries again
                )
            )
            region = session.get_config_variable("region") or self._region
            found = await create_credential_resolver(session, region_name=region).load_credentials()
            if found is None:
                raise ConfigError(
                    "none found in the environment (AWS_*), profiles, container or instance; "
                    "set access_key_ref and secret_key_ref, or one of these"
                )
            self._found, self._found_at = found, monotonic()

    def _failed(self, exc: BaseException) -> StorageError:
        clear_locals(exc)
        kind: type[StorageError] = StorageUnavailable if isinstance(exc, _TEMPORARY) else StorageDenied
        if isinstance(exc, ClientError) and status_of(exc) >= 500:
            kind = StorageUnavailable
        provider = getattr(exc, "kwargs", {}).get("provider")
        reason = f"{provider} fails" if provider in _SILENT_PROVIDERS else one_line(exc) or type(exc).__name__
        return kind(f"backend {self._backend_id}: credentials of the AWS chain: {reason}")
