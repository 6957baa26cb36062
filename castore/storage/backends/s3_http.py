"""The client library's HTTP, made to send each request once and nowhere else. Neither TLS nor credentials are here.

aiohttp repeats an idempotent request by itself when a connection ends before the answer, and follows redirects;
botocore corrects the region after some answers and sends the request again. Each try of a call has to be one request:
`RetryingBackend` counts them and waits between them. A `Location` is never followed: it may lead anywhere, with the
body of a put, and a signature is for one host only.
"""

from __future__ import annotations

from typing import Any, Final

import aiohttp
from aiobotocore.httpsession import AIOHTTPSession


class OneRequestSession(AIOHTTPSession):  # type: ignore[misc]
    """The client library's session, without repetitions and redirects."""

    async def _get_session(self, proxy_url: Any) -> Any:
        return _Once(await super()._get_session(proxy_url))


class _Once:
    """A session of aiohttp, of which the client library uses `request` alone."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def request(self, method: str, **options: Any) -> aiohttp.ClientResponse:
        return await self._session.request(method, allow_redirects=False, middlewares=_MIDDLEWARES, **options)


async def _not_again(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Raises a broken connection as an error that aiohttp does not take for a reason to send the request again."""
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise  # nothing was sent, and aiohttp leaves it at that
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as exc:
        raise aiohttp.ClientPayloadError(getattr(exc, "strerror", None) or str(exc)) from exc


_MIDDLEWARES: Final = (_not_again,)


def stay_in_region(params: dict[str, Any], **_: Any) -> None:
    """A handler of the client library, before each call: makes it believe that it has corrected the region already."""
    params["context"].get("s3_redirect", {})["redirected"] = True
