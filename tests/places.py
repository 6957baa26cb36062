"""Places that can hold a test's objects: a section of the configuration each, and how to make them unreachable."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from tests.servers.relay import Relay
from tests.servers.seaweedfs import SeaweedFS

BUCKET: Final = "castore-places"


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
    """A bucket of a real server, each backend below a prefix of its own and behind a relay of its own."""

    backend_type = "s3"

    def __init__(self, root: Path, server: SeaweedFS, relays: ExitStack) -> None:
        self._root = root
        self._server = server
        self._relays = relays
        self._by_id: dict[str, Relay] = {}
        self._prefix = uuid.uuid4().hex
        (root / "access-key").write_text(server.access_key)
        (root / "secret-key").write_text(server.secret_key)

    def section(self, backend_id: str) -> str:
        relay = self._by_id.get(backend_id)
        if relay is None:
            port = urlsplit(self._server.endpoint_url).port
            assert port is not None
            relay = self._by_id[backend_id] = self._relays.enter_context(Relay(port))
        return (
            f'[backends.{backend_id}]\ntype = "s3"\nendpoint_url = "http://127.0.0.1:{relay.port}"\n'
            f'region = "us-east-1"\nbucket = "{BUCKET}"\nkey_prefix = "{self._prefix}/{backend_id}"\n'
            f'access_key_ref = "file:{self._root}/access-key"\nsecret_key_ref = "file:{self._root}/secret-key"\n'
        )

    @contextmanager
    def unreachable(self, backend_id: str) -> Iterator[None]:
        self._by_id[backend_id].cut()
        yield
        self._by_id[backend_id].restore()


PLACES: Final = ("local", "s3")
"""Names for the parameter of the fixture `place`."""
