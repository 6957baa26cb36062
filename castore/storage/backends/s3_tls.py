"""Which certificates an S3 client takes: the TLS context, and an HTTP session that uses it for every connection.

Runs in the asyncio loop, and imports no asyncio. Opens no connection itself.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiobotocore.config import AioConfig
from botocore.httpsession import where

from castore.errors import ConfigError
from castore.storage.backends.s3_http import OneRequestSession

_CA_VARIABLE: Final = "AWS_CA_BUNDLE"
"""What the AWS tools read for the same purpose."""


def tls_context(ca_bundle: Path | None) -> ssl.SSLContext:
    """A context that takes certificates for the very host, of an authority in `ca_bundle` (PEM) and no other.

    Without one, `AWS_CA_BUNDLE` names the file; without that the host's authorities count, as OpenSSL finds them
    (`SSL_CERT_FILE` and `SSL_CERT_DIR` too), and those that the client library brings where the host has none.
    Raises ConfigError, which names the setting or the variable, when the file cannot be used.
    """
    named = f"ca_bundle = {str(ca_bundle)!r}" if ca_bundle else f"{_CA_VARIABLE} = {os.environ.get(_CA_VARIABLE)!r}"
    file = str(ca_bundle) if ca_bundle else os.environ.get(_CA_VARIABLE)
    host = ssl.get_default_verify_paths()
    if not file and host.cafile is None and host.capath is None:
        file = where()
    try:
        return ssl.create_default_context(cafile=file or None)
    except ssl.SSLError as exc:
        raise ConfigError(f"{named}: is no file of certificates in PEM form") from exc
    except OSError as exc:
        raise ConfigError(f"{named}: cannot be read: {exc.strerror}") from exc


class TLSConfig(AioConfig):  # type: ignore[misc]
    """A configuration of the client library whose connections all use one TLS context, those through a proxy too.

    aiobotocore 2.25 takes any certificate of a known authority, for whichever host, and through a proxy any at all.
    """

    def __init__(self, tls: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._tls = tls
        self.http_session_cls = self._session

    def merge(self, other_config: Any) -> Any:
        """The client library's own gives a plain configuration, which would forget the context."""
        merged = super().merge(other_config)
        merged.http_session_cls = self._session
        return merged

    def _session(self, **options: Any) -> _HTTPSession:
        return _HTTPSession(self._tls, **options)


class _HTTPSession(OneRequestSession):
    def __init__(self, tls: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._tls = tls

    def _create_connector(self, proxy_url: str | None) -> aiohttp.TCPConnector:
        return _Connector(limit=self._max_pool_connections, ssl=self._tls, **self._connector_args)


class _Connector(aiohttp.TCPConnector):
    """Drops at once a connection that is not kept.

    aiohttp would take leave of the server, which over TLS takes a moment that nobody waits for: the loop may be gone.
    """

    def _release(self, key: Any, protocol: Any, *, should_close: bool = False) -> None:
        if should_close or protocol.should_close:
            protocol.abort()
        super()._release(key, protocol, should_close=should_close)
