"""The whole job on S3: nothing that it says, logs, stores or serves holds a key, at debug level and with wrong keys."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from castore.mountinfo import mount_at
from tests.mount.store import WAIT_SECONDS, MountedStore, fails, wait_until
from tests.servers.seaweedfs import SeaweedFS

WRONG: Final = "wrong-and-yet-somebody's-secret"
LARGE_BYTES: Final = 6 << 20
"""More than one part."""


class ByReference:
    """A place whose keys come from the environment and from a file."""

    backend_type = "s3"

    def __init__(self, root: Path, endpoint_url: str) -> None:
        self._root = root
        self._endpoint_url = endpoint_url
        self._bucket = f"castore-{uuid.uuid4().hex}"

    def section(self, backend_id: str) -> str:
        return (
            f'[backends.{backend_id}]\ntype = "s3"\nendpoint_url = "{self._endpoint_url}"\nregion = "us-east-1"\n'
            f'bucket = "{self._bucket}"\naccess_key_ref = "env:THE_ACCESS_KEY"\n'
            f'secret_key_ref = "file:{self._root}/secret"\n'
            'multipart_threshold_bytes = "5MiB"\nmultipart_chunk_bytes = "5MiB"\n'
        )

    def unreachable(self, backend_id: str) -> AbstractContextManager[None]:
        return nullcontext()


class Overheard(MountedStore):
    """A store whose every command runs at debug level, and whatever it says is kept."""

    def __init__(self, root: Path, place: ByReference, environ: dict[str, str]) -> None:
        self.heard: dict[str, str] = {}
        self.environ = environ
        super().__init__(root, place=place)

    def hear(self, what: str, text: str) -> None:
        self.heard[f"{len(self.heard)} {what}"] = text

    def init(self) -> None:
        self.castore("init")

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        done = super().run("--log-level", "debug", *arguments, **{"env": self.environ, **options})
        self.hear(" ".join(arguments), done.stdout + done.stderr)
        return done

    def hear_all(self) -> None:
        """Whatever can be asked."""
        for command in (
            ("status",),
            ("status", "--json"),
            ("package", "list", "--json"),
            ("package", "show", "demo/1"),
            ("storage", "backends"),
            ("storage", "backends", "--json"),
            ("storage", "probe", "--backend", "main"),
            ("storage", "verify"),
            ("storage", "verify", "--json"),
            ("events", "--json"),
            ("init",),
        ):
            self.run(*command)
        documents = sorted((self.mnt / ".castore").iterdir())
        assert {"status.json", "health.json"} <= {document.name for document in documents}
        for document in documents:
            self.hear(document.name, document.read_text())
        url = self.status()["http_url"]
        for path in ("", "health", "livez", "readyz", "metrics", "v1/events", "nothing"):
            try:
                with urllib.request.urlopen(f"{url}/{path}", timeout=WAIT_SECONDS) as answer:
                    self.hear(path, f"{answer.headers}{answer.read().decode()}")
            except urllib.error.HTTPError as exc:
                with exc:
                    self.hear(path, f"{exc.headers}{exc.read().decode()}")
        self.hear("arguments", Path(f"/proc/{self.pid}/cmdline").read_text())

    def hear_attributes(self, path: Path) -> None:
        for name in ("state", "error"):
            with suppress(OSError):  # files have a state, versions an error
                self.hear(f"{name} of {path.name}", os.getxattr(path, f"user.castore.{name}").decode())


@pytest.fixture
def store(tmp_path: Path, s3_server: SeaweedFS) -> Iterator[Overheard]:
    (tmp_path / "secret").write_text(s3_server.secret_key)
    environ = {**os.environ, "THE_ACCESS_KEY": s3_server.access_key, "PYTHONASYNCIODEBUG": "1"}
    made = Overheard(tmp_path, ByReference(tmp_path, s3_server.endpoint_url), environ)
    try:
        yield made
    finally:
        made.close()


def hear_foreground(store: Overheard) -> None:
    """`castore mount` in the foreground, until a signal ends it."""
    command = [sys.executable, "-m", "castore.cli", "--config", str(store.config), "--log-level", "debug"]
    with subprocess.Popen(
        [*command, "mount", str(store.mnt)], env=store.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            wait_until(lambda: mount_at(store.mnt) is not None, "it is mounted")
            (store.mnt / ".castore/health.json").read_text()
        finally:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=WAIT_SECONDS)
        store.hear("foreground", output.decode())


def test_no_key_is_seen_anywhere(store: Overheard, s3_server: SeaweedFS) -> None:
    secret_file = store.root / "secret"
    # All is well: in, published, read back after a restart, verified.
    store.mount()
    box = store.ingest("demo/1")
    (box / "small").write_bytes(b"small")
    (box / "unread").write_bytes(b"unread")
    (box / "large").write_bytes(os.urandom(LARGE_BYTES))
    store.castore("package", "publish", "demo/1")
    store.umount()
    store.mount()
    package = store.package("demo/1")
    assert (package / "small").read_bytes() == b"small"
    assert len((package / "large").read_bytes()) == LARGE_BYTES
    store.hear_all()
    assert "verified: 4, failed: 0" in "".join(store.heard.values())

    # Wrong keys, before and after the start.
    secret_file.write_text(WRONG)
    with fails(errno.EACCES):
        (package / "unread").read_bytes()
    box = store.ingest("demo/2")
    (box / "new").write_bytes(b"new")
    wait_until(lambda: store.state_of(box / "new").startswith("failed: "), "the put failed")
    with fails(errno.EACCES):
        box.rename(store.package("demo/2"))
    store.hear_attributes(box)
    store.hear_attributes(box / "new")
    store.run("package", "publish", "demo/2")
    store.hear_all()
    store.kill(signal.SIGTERM)
    hear_foreground(store)
    secret_file.write_text(s3_server.secret_key)
    store.environ["THE_ACCESS_KEY"] = WRONG
    store.mount()
    store.hear_all()
    store.kill(signal.SIGTERM)

    # It was said at debug level, and that keys are wrong; but which, nowhere.
    everything = "\n".join(store.heard.values())
    assert " DEBUG asyncio: " in store.log()
    assert "Traceback" in everything
    assert everything.count("answers 403") > 10
    assert store.log().count("answers 403") > 1
    keys = (s3_server.access_key, s3_server.secret_key, WRONG)
    assert [(what, key) for what, text in store.heard.items() for key in keys if key in text] == []
    files = [path for path in store.root.rglob("*") if path.is_file() and path != secret_file]
    assert {"catalog.db", "workspace.db", "mount.log", "castore.toml"} <= {path.name for path in files}
    assert [(path, key) for path in files for key in keys if key.encode() in path.read_bytes()] == []
