"""How far this host's clock is from the server's, as the health of a backend tells."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from castore.config import S3Settings
from castore.storage.backends.s3 import S3Backend
from tests.servers.scripted_http import Request, answer, serving

from .conftest import but

LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


@pytest.mark.parametrize("transfer", ["native", "aioboto3"])
@pytest.mark.parametrize("ahead_s", [0, 3600, -90])
async def test_it_is_told(of_nobody: S3Settings, transfer: str, ahead_s: int) -> None:
    async def handler(request: Request, stream: Any) -> None:
        there = datetime.now(UTC) - timedelta(seconds=ahead_s)
        await stream.send_all(answer(200, LISTING, date=format_datetime(there, usegmt=True)))

    async with serving(handler) as server:
        backend = S3Backend(but(of_nobody, endpoint_url=server.endpoint_url, transfer=transfer))
        health = await backend.health()
        await backend.aclose()
    assert health.status == "pass", health.detail
    assert health.clock_ahead_s == pytest.approx(ahead_s, abs=30)


async def test_a_server_that_does_not_say(of_nobody: S3Settings) -> None:
    async def handler(request: Request, stream: Any) -> None:
        await stream.send_all(answer(200, LISTING))

    async with serving(handler) as server:
        backend = S3Backend(but(of_nobody, endpoint_url=server.endpoint_url))
        health = await backend.health()
        await backend.aclose()
    assert (health.status, health.clock_ahead_s) == ("pass", None)
