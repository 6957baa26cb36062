"""An S3 backend that is set up wrongly, or not there: what each command says, and that a mount lives with it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from castore.mountinfo import mount_at
from tests.mount.store import WAIT_SECONDS, MountedStore, fails, wait_until
from tests.places import S3Place
from tests.servers.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY
from tests.servers.seaweedfs import SeaweedFS

CONFIG: Final = """\
[store]
state_dir = "{root}/state"
[cache]
dir = "{root}/cache"
[backends.near]
type = "local"
path = "{root}/objects"
[backends.far]
type = "s3"
endpoint_url = "{endpoint_url}"
region = "us-east-1"
bucket = "{bucket}"
access_key_ref = "env:FAR_ACCESS_KEY"
secret_key_ref = "env:FAR_SECRET_KEY"
[routing]
default = "far"
[http]
listen = "127.0.0.1:0"
"""
NOWHERE: Final = "http://127.0.0.1:9"
"""Nothing listens at the port of `discard`."""
WITHOUT_AIOBOTO3: Final = "import sys; sys.modules |= dict.fromkeys(('aioboto3', 'aiobotocore', 'aiohttp', 'botocore'))"
"""None makes an import fail like that of a module that is not installed."""


class Store:
    """A local backend `near`, and an S3 backend `far` in a bucket of its own. Commands get keys by the environment."""

    def __init__(self, root: Path, endpoint_url: str) -> None:
        self.root = root
        self.bucket = f"castore-{uuid.uuid4().hex}"
        self.environ = {**os.environ, "FAR_ACCESS_KEY": ACCESS_KEY, "FAR_SECRET_KEY": SECRET_KEY}
        self.write_config(endpoint_url)

    def write_config(self, endpoint_url: str) -> None:
        text = CONFIG.format(root=self.root, endpoint_url=endpoint_url, bucket=self.bucket)
        (self.root / "castore.toml").write_text(text)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "castore.cli", "--config", f"{self.root}/castore.toml", *arguments]
        return subprocess.run(
            command, env=self.environ, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS
        )

    def castore(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def error(self, *arguments: str) -> str:
        """The one line of error of a command that could not run."""
        done = self.run(*arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        lines = [line for line in done.stderr.splitlines() if not line.startswith("verifying ")]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("castore: error: ")
        return lines[0].removeprefix("castore: error: ")


@pytest.fixture
def store(tmp_path: Path, s3_server: SeaweedFS) -> Store:
    return Store(tmp_path, s3_server.endpoint_url)


def buckets(server: SeaweedFS) -> set[str]:
    client = server.client()
    try:
        return {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    finally:
        client.close()


def states(text: str) -> list[str]:
    """What `castore init` says of each thing: the first word of its lines."""
    return [line.split()[0] for line in text.splitlines()]


def test_init_makes_a_missing_bucket(store: Store, s3_server: SeaweedFS) -> None:
    assert store.bucket not in buckets(s3_server)
    assert states(store.castore("init")) == ["exists", "created", "created", "created", "created"]
    assert store.bucket in buckets(s3_server)
    assert states(store.castore("init")) == ["exists"] * 5
    assert "looked at 0 of 0" in store.castore("storage", "verify", "--backend", "far")


BAD: Final[dict[str, tuple[Mapping[str, str], str]]] = {
    "wrong secret": ({"FAR_SECRET_KEY": "wrong"}, "answers 403"),
    "wrong key": ({"FAR_ACCESS_KEY": "wrong"}, "answers 403"),
    "unreachable": ({}, f"{NOWHERE} cannot be reached: Connection refused; check endpoint_url and the server"),
}


@pytest.mark.parametrize("case", BAD)
def test_init_makes_the_rest(store: Store, s3_server: SeaweedFS, case: str) -> None:
    changes, said = BAD[case]
    good = store.environ
    store.environ = {**good, **changes}
    if case == "unreachable":
        store.write_config(NOWHERE)
    done = store.run("init", "--json")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("castore: error: backend far: create: ")
    assert said in line
    made = {step["what"]: step for step in json.loads(done.stdout)["steps"]}
    assert made["backend far"]["error"] == line.removeprefix("castore: error: ")
    assert made["backend near"]["created"]
    assert made["catalog"]["created"]
    assert states(store.run("init").stdout) == ["exists"] * 4 + ["failed"]
    # It is mended, and the rest is made.
    store.environ = good
    store.write_config(s3_server.endpoint_url)
    assert states(store.castore("init")) == ["exists"] * 4 + ["created"]


@pytest.mark.parametrize("case", [*BAD, "missing bucket"])
def test_verify(store: Store, case: str) -> None:
    changes, said = BAD.get(case, ({}, f'has no such bucket; check bucket = "{store.bucket}", or run `castore init`'))
    if case != "missing bucket":
        store.castore("init")
    else:
        store.write_config(NOWHERE)
        store.error("init")
    store.environ |= changes
    if case == "unreachable":
        store.write_config(NOWHERE)
    line = store.error("storage", "verify", "--backend", "s3")
    assert line.startswith("backend far is given up: ")
    if case != "missing bucket":
        assert said in line
    if "wrong" in case:
        assert "check access_key_ref = env:FAR_ACCESS_KEY and secret_key_ref = env:FAR_SECRET_KEY" in line
    assert "looked at 0 of 0" in store.castore("storage", "verify", "--backend", "near")


def test_a_reference_that_leads_nowhere(store: Store) -> None:
    store.castore("init")
    del store.environ["FAR_SECRET_KEY"]
    said = "backends.far.secret_key_ref: cannot resolve env:FAR_SECRET_KEY: the environment variable is not set"
    assert store.error("init").endswith(said)
    assert said in store.error("storage", "verify")
    mnt = store.root / "mnt"
    mnt.mkdir()
    for mode in ([], ["--background"]):
        assert said in store.error("mount", str(mnt), *mode)


def test_an_unknown_backend(store: Store) -> None:
    store.castore("init")
    assert store.error("storage", "verify", "--backend", "fra") == (
        "--backend fra: no such backend is configured; there are near (local), far (s3)"
    )


def test_without_the_client_library(store: Store) -> None:
    """As an installation without the extra `s3`: what names the backend says so, whatever does not need it goes on."""
    store.castore("init")
    modules = store.root / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(WITHOUT_AIOBOTO3)
    paths = [str(modules), *filter(None, [store.environ.get("PYTHONPATH")])]
    store.environ["PYTHONPATH"] = os.pathsep.join(paths)
    mnt = store.root / "mnt"
    mnt.mkdir()
    said = "backend far: type = \"s3\" needs aioboto3, which is not installed: pip install 'castore[s3]'"
    for command in (
        ("init",),
        ("storage", "verify"),
        ("storage", "verify", "--backend", "far"),
        ("mount", str(mnt)),
        ("mount", str(mnt), "--background"),
    ):
        assert store.error(*command) == said
    assert mount_at(mnt) is None
    assert store.castore("package", "list") == "no packages are published\n"
    assert "looked at 0 of 0" in store.castore("storage", "verify", "--backend", "near")
    listed = store.run("storage", "backends", "--json")
    assert [row["health"] for row in json.loads(listed.stdout)["backends"]] == ["pass", "fail"]


# a mount beside a backend that does not answer as it should


@pytest.fixture
def place(tmp_path: Path, s3_server: SeaweedFS) -> Iterator[S3Place]:
    with ExitStack() as relays:
        yield S3Place(tmp_path, s3_server, relays)


@contextmanager
def unreachable(store: MountedStore, place: S3Place) -> Iterator[None]:
    with place.unreachable("main"):
        yield


@contextmanager
def wrong_secret(store: MountedStore, place: S3Place) -> Iterator[None]:
    """As after a rotation whose other half did not happen."""
    path = store.root.parent / "secret-key"
    path.write_text("wrong")
    yield
    path.write_text(SECRET_KEY)


@contextmanager
def missing_bucket(store: MountedStore, place: S3Place) -> Iterator[None]:
    """A typing error in the configuration, which a daemon reads when it starts."""
    good = store.config.read_text()
    store.config.write_text(good.replace(f'bucket = "{BUCKET}"', 'bucket = "no-such-bucket"'))
    yield
    store.config.write_text(good)


Fault = Callable[[MountedStore, S3Place], AbstractContextManager[None]]
FAULTS: Final[list[tuple[Fault, int, str]]] = [
    (unreachable, errno.EIO, "cannot be reached: Connection refused"),
    (wrong_secret, errno.EACCES, "answers 403"),
    (missing_bucket, errno.EIO, "no-such-bucket"),
]
"""With what a read answers, and what is said."""


def get(store: MountedStore, path: str) -> tuple[int, Any]:
    """Status and document of the mount's HTTP API."""
    try:
        with urllib.request.urlopen(f"{store.status()['http_url']}/{path}", timeout=WAIT_SECONDS) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


def backend_check(store: MountedStore) -> dict[str, Any]:
    (check,) = get(store, "health")[1]["checks"]["backend:responseTime"]
    found: dict[str, Any] = check
    return found


@pytest.mark.parametrize(("fault", "number", "said"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_it_is_mounted_all_the_same(
    make_store: Callable[..., MountedStore], place: S3Place, fault: Fault, number: int, said: str
) -> None:
    """Names, sizes and new files are there, reads fail with a reason, health says so, and no location is blamed."""
    store = make_store(place=place)
    store.mount()
    (store.ingest("demo/1") / "a").write_bytes(b"a" * 1000)
    path = store.publish("demo/1") / "a"
    store.umount()
    with fault(store, place):
        store.mount()
        assert path.stat().st_size == 1000
        with fails(number):
            path.read_bytes()
        (store.ingest("demo/2") / "b").write_bytes(b"b")
        assert (store.mnt / "ingest/demo/2/b").read_bytes() == b"b"
        wait_until(lambda: store.state_of(store.mnt / "ingest/demo/2/b").startswith("failed: "), "the put failed")
        assert said in store.state_of(store.mnt / "ingest/demo/2/b")
        status, document = get(store, "health")
        assert (status, document["status"]) == (503, "fail")
        assert said in backend_check(store)["output"]
        assert get(store, "readyz") == (200, {"status": "pass"})
        done = store.run("storage", "verify")
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("castore: error: ")]
        assert line.startswith("castore: error: backend main is given up: ")
        assert said in line
        assert os.getxattr(path, "user.castore.status") == b"stored"
        store.kill(signal.SIGTERM)
    store.mount()
    assert path.read_bytes() == b"a" * 1000
    assert (store.publish("demo/2") / "b").read_bytes() == b"b"
    assert get(store, "health")[1]["status"] == "pass"


@pytest.mark.parametrize(("fault", "number", "said"), FAULTS[:2], ids=[fault[0].__name__ for fault in FAULTS[:2]])
def test_it_happens_under_a_mount(
    make_store: Callable[..., MountedStore], place: S3Place, fault: Fault, number: int, said: str
) -> None:
    """What was read is still served; what was not fails; and all is well again as soon as it is mended."""
    store = make_store(place=place)
    store.mount()
    read, unread = os.urandom(300_000), os.urandom(300_000)
    box = store.ingest("demo/1")
    (box / "read").write_bytes(read)
    (box / "unread").write_bytes(unread)
    package = store.publish("demo/1")
    store.umount()
    store.mount()
    assert (package / "read").read_bytes() == read
    with fault(store, place):
        assert (package / "read").read_bytes() == read
        with fails(number):
            (package / "unread").read_bytes()
        (store.ingest("demo/2") / "b").write_bytes(b"b")
        wait_until(lambda: backend_check(store)["status"] == "fail", "the health fails")
        assert said in backend_check(store)["output"]
        target = store.package("demo/2")
        with fails(errno.EACCES if number == errno.EACCES else errno.EBUSY):
            (store.mnt / "ingest/demo/2").rename(target)
        assert said in os.getxattr(store.mnt / "ingest/demo/2", "user.castore.error").decode()
    assert (package / "unread").read_bytes() == unread
    assert (store.publish("demo/2") / "b").read_bytes() == b"b"
    wait_until(lambda: backend_check(store)["status"] == "pass", "the health is good again")
    assert failed_locations(store) == []


def failed_locations(store: MountedStore) -> list[dict[str, Any]]:
    """The events of locations that were blamed."""
    events = [json.loads(line)["data"] for line in store.castore("events", "--json").splitlines()]
    return [event for event in events if event.get("reason")]
