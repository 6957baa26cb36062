"""Which S3 servers the tests run on, and those that this session has started: each when a test first needs it.

A server whose program is absent fails its tests: scripts/install brings all of them. Only those that cannot be brought
are left out where they are not: a container without an engine, and somebody's own endpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

from tests.servers import endpoint, minio_container
from tests.servers.juicefs import JuiceFSGateway
from tests.servers.rgw import Rgw
from tests.servers.s3_server import S3Server
from tests.servers.seaweedfs import SeaweedFS

ABSENT: Final[dict[str, str]] = {
    name: why
    for name, why in (
        ("minio", "" if minio_container.engine_answers() else "MinIO container (no Docker engine answers)"),
        ("endpoint", "" if endpoint.ENDPOINT in os.environ else f"other endpoint ({endpoint.ENDPOINT} is not set)"),
    )
    if why
}
"""Servers that this host cannot have, and why, in words."""

_ALL: Final = ("seaweedfs", "rgw", "rgw-https", "juicefs", "minio", "endpoint")
S3_SERVERS: Final = tuple(name for name in _ALL if name not in ABSENT)
"""Names for parameters of tests."""


class EveryServer:
    """All servers of a session by name. A context manager, which ends what was started."""

    def __init__(self, new_folder: Callable[[str], Path]) -> None:
        self._new_folder = new_folder
        self._running = ExitStack()
        self._servers: dict[str, S3Server] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._running.close()

    def __getitem__(self, name: str) -> S3Server:
        """The server of that name, started unless it is."""
        if name not in self._servers:
            self._servers[name] = self.rgw.tls if name == "rgw-https" else self._running.enter_context(self._new(name))
        return self._servers[name]

    @property
    def seaweedfs(self) -> SeaweedFS:
        server = self["seaweedfs"]
        assert isinstance(server, SeaweedFS)
        return server

    @property
    def rgw(self) -> Rgw:
        server = self["rgw"]
        assert isinstance(server, Rgw)
        return server

    def summary(self) -> str:
        """What was covered, and what was not and why, in a line; empty when no test needed a server."""
        if not self._servers:
            return ""
        covered = [f"{server.name} {server.version}".rstrip() for server in self._servers.values()]
        unused = [f"{name} (no test here needs it)" for name in S3_SERVERS if name not in self._servers]
        missed = [*unused, *ABSENT.values()]
        return f"S3 servers: {', '.join(covered)}" + (f"; not: {', '.join(missed)}" if missed else "")

    def _new(self, name: str) -> SeaweedFS | Rgw | JuiceFSGateway | minio_container.MinioContainer | endpoint.Endpoint:
        match name:
            case "seaweedfs":
                return SeaweedFS(self._new_folder(name))
            case "rgw":
                return Rgw(self._new_folder(name))
            case "juicefs":
                return JuiceFSGateway(self._new_folder(name))
            case "minio":
                return minio_container.MinioContainer()
            case "endpoint":
                return endpoint.Endpoint()
        raise KeyError(name)
