"""What a version declares of itself, with defaults: producer and retention class. Routing is not decided here."""

from __future__ import annotations

import pwd
from dataclasses import dataclass

import trio

from castore.catalog.workspace import WorkspaceStore
from castore.errors import NotFound
from castore.ingest.tree import PRODUCER, RETENTION_CLASS


@dataclass(frozen=True, slots=True)
class Labels:
    """Producer, retention class and the uid that created the version directory."""

    producer: str
    retention_class: str
    uid: int


class LabelReader:
    """Reads labels; login names are looked up once, in a thread, since the name service may be remote."""

    def __init__(self, store: WorkspaceStore, *, default_retention_class: str) -> None:
        self._store = store
        self._default_retention_class = default_retention_class
        self._logins: dict[int, str] = {}

    async def labels(self, version_inode: int) -> Labels:
        """The labels of a version directory. Raises NotFound when it is gone."""
        node = self._store.node(version_inode)
        if node is None:
            raise NotFound("no such version in ingest/")
        declared = self._store.attributes(version_inode)
        producer = declared.get(PRODUCER)
        retention_class = declared.get(RETENTION_CLASS)
        return Labels(
            producer=producer.decode() if producer else await self.login(node.creator_uid),
            retention_class=retention_class.decode() if retention_class else self._default_retention_class,
            uid=node.creator_uid,
        )

    async def login(self, uid: int) -> str:
        """The login name of a uid, or `uid:N`."""
        if uid not in self._logins:
            self._logins[uid] = await trio.to_thread.run_sync(_login, uid)
        return self._logins[uid]


def _login(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid:{uid}"
