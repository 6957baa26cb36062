"""A writer's host and a host that follows it, each with a state directory of its own, for the tests of `--follow`."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from castore.replica.litestream import find_program
from tests.mount.store import MountedStore
from tests.servers.s3_server import S3Server

UNIT_CONFIG: Final = Path(__file__).parents[2] / "docs/replication/castore.litestream.yml"
"""The configuration that is shipped beside the unit."""


def environment(server: S3Server) -> dict[str, str]:
    """What the program finds its credentials in."""
    return {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}


def replica_url(server: S3Server, endpoint_url: str = "") -> str:
    """Of a replica that nobody else has, reached at the server or at another address that leads there."""
    endpoint = endpoint_url or server.endpoint_url
    place = f"{server.bucket}/{server.key_prefix}catalogs/{uuid.uuid4().hex}"
    return f"s3://{place}?endpoint={endpoint}&region={server.region}"


def at(url: str, endpoint_url: str) -> str:
    """The same replica, reached at another address."""
    before, _, after = url.partition("?endpoint=")
    return f"{before}?endpoint={endpoint_url}&{after.partition('&')[2]}"


@contextmanager
def replicating(store: MountedStore, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """`litestream replicate` of a store's catalog, with the configuration that is shipped; killed at the end."""
    text = UNIT_CONFIG.read_text()
    for name, value in (("/var/lib/castore/catalog.db", str(store.state / "catalog.db")), ("REPLICA_URL", url)):
        assert name in text
        text = text.replace(name, value)
    config = store.root / "litestream.yml"
    config.write_text(text)
    with (
        open(store.root / "litestream.log", "ab") as log,
        subprocess.Popen([find_program(), "replicate", "-config", config], stdout=log, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def newest(url: str) -> int:
    """The newest transaction of a replica; 0 while there is none."""
    done = subprocess.run(
        [find_program(), "restore", "-dry-run", "-json", "-o", "/nonexistent/db", url],
        capture_output=True,
        check=False,
        timeout=30,
    )
    return int(json.loads(done.stdout)["max_txid"], 16) if done.returncode == 0 else 0


def followed(store: MountedStore) -> dict[str, Any]:
    """What a following daemon says of its catalog."""
    found: dict[str, Any] = store.status()["followed"]
    return found


def age_check(store: MountedStore) -> dict[str, Any]:
    """What health says of a followed catalog."""
    [check] = json.loads((store.mnt / ".castore/health.json").read_text())["checks"]["catalog:followedAge"]
    return dict(check)


def make_follower(make_store: Callable[..., MountedStore], writer: MountedStore) -> MountedStore:
    """A host with the writer's backends and nothing else: no catalog, no cache."""
    follower = make_store()
    text = writer.config.read_text().replace(f'"{writer.root}/state"', f'"{follower.state}"')
    follower.config.write_text(text.replace(f'"{writer.root}/cache"', f'"{follower.root}/cache"'))
    shutil.rmtree(follower.state)
    return follower


def publish(store: MountedStore, ref: str, files: dict[str, bytes]) -> Path:
    """A package of these files."""
    for name, data in files.items():
        path = store.ingest(ref) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return store.publish(ref)


def children_of(pid: int) -> list[int]:
    """The processes that a process started and that are there."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]
