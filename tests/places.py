"""Places that can hold a test's objects: a section of the configuration each, and how to make them unreachable."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from tests.servers.every import S3_SERVERS
from tests.servers.relay import Relay
from tests.servers.s3_server import S3Server


class Place(Protocol):
    """One type of backend, for one test."""

    @property
    def backend_type(self) -> str:
        """As the configuration calls it."""

    def section(self, backend_id: str) -> str:
        """The table [backends.ID] of the configuration, as text. Backends of different ids share no object."""

    def unreachable(self, backend_id: str) -> AbstractContextManager[None]:
        """Nobody can reach that backend inside the `with` block. Its objects are there again afterwards."""


class LocalPlace:
    """Folders of the test's own folder."""

    backend_type = "local"

    def __init__(self, root: Path) -> None:
        self._root = root

    def section(self, backend_id: str) -> str:
        return f'[backends.{backend_id}]\ntype = "local"\npath = "{self._path(backend_id)}"\n'

    @contextmanager
    def unreachable(self, backend_id: str) -> Iterator[None]:
        path = self._path(backend_id)
        hidden = path.with_name(f"{path.name}.away")
        path.rename(hidden)
        yield
        hidden.rename(path)

    def _path(self, backend_id: str) -> Path:
        return self._root / f"objects-{backend_id}"


class S3Place:
    """A bucket of a real server, each backend below a prefix of its own and behind a relay of its own.

    Without `relays` there is none, nor before a server that somebody else runs: the certificate is for its own name.
    """

    backend_type = "s3"

    def __init__(self, root: Path, server: S3Server, relays: ExitStack | None) -> None:
        self._root = root
        self._server = server
        self._relays = relays
        self._by_id: dict[str, Relay] = {}
        self._prefix = uuid.uuid4().hex
        (root / "access-key").write_text(server.access_key)
        (root / "secret-key").write_text(server.secret_key)

    def prefix(self, backend_id: str) -> str:
        """Below it lies all that a backend puts."""
        return f"{self._server.key_prefix}{self._prefix}/{backend_id}"

    def section(self, backend_id: str) -> str:
        server = self._server
        return (
            f'[backends.{backend_id}]\ntype = "s3"\nendpoint_url = "{self._endpoint_url(backend_id)}"\n'
            f'region = "{server.region}"\nbucket = "{server.bucket}"\nkey_prefix = "{self.prefix(backend_id)}"\n'
            f'access_key_ref = "file:{self._root}/access-key"\nsecret_key_ref = "file:{self._root}/secret-key"\n'
            + (f'ca_bundle = "{server.ca_bundle}"\n' if server.ca_bundle else "")
        )

    @contextmanager
    def unreachable(self, backend_id: str) -> Iterator[None]:
        self._by_id[backend_id].cut()
        yield
        self._by_id[backend_id].restore()

    def _endpoint_url(self, backend_id: str) -> str:
        there = urlsplit(self._server.endpoint_url)
        if self._relays is None or not self._server.is_local:
            return self._server.endpoint_url
        if backend_id not in self._by_id:
            assert there.port is not None
            self._by_id[backend_id] = self._relays.enter_context(Relay(there.port))
        return f"{there.scheme}://127.0.0.1:{self._by_id[backend_id].port}"


PLACES: Final = ("local", "s3")
"""Names for the parameter of the fixture `place`: a backend of each type."""
EVERY_PLACE: Final = (*PLACES, *(name for name in S3_SERVERS if name != "seaweedfs"))
"""The same, with every S3 server: for the few tests that go the whole way."""
