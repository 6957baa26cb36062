"""`castore doctor`: each thing that can be wrong, made wrong for real, and what it says of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from castore.cli.examination import CLOCK_S, LOW_BYTES, of_backends
from castore.mountinfo import mount_at
from castore.storage.spi import BackendHealth
from tests.cli.conftest import Cli
from tests.mount.store import MountedStore, run_tool
from tests.namespaces import with_mounts_of_its_own
from tests.servers.seaweedfs import SeaweedFS

CONFIG = """[store]
state_dir = "{state}"
[backends.main]
{backend}
[routing]
default = "main"
"""


@pytest.fixture
def made(cli: Cli, tmp_path: Path) -> Cli:
    """A store that is well."""
    cli("init", "--state-dir", tmp_path / "state")
    return cli


def seen(text: str) -> dict[str, dict[str, Any]]:
    """What was looked at, by name; of several of one name, the worst."""
    found: dict[str, dict[str, Any]] = {}
    for sight in json.loads(text)["seen"]:
        if sight["name"] not in found or sight["status"] == "fail":
            found[sight["name"]] = sight
    return found


def within(cli: Cli, script: str, code: int, **environ: str) -> dict[str, dict[str, Any]]:
    """What the doctor sees in namespaces of its own, where `script` has changed something first."""
    command = shlex.join([*cli.command, "doctor", "--json"])
    done = subprocess.run(
        with_mounts_of_its_own(f"{script} {command}"),
        cwd=cli.home,
        env={**cli.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return seen(done.stdout)


def test_all_is_well(made: Cli) -> None:
    text = made("doctor").stdout
    assert "mend" not in text
    found = seen(made("doctor", "--json").stdout)
    assert {"device", "fusermount3", "pyfuse3", "pysqlite3", "state", "catalog", "secrets", "mounts", "disk"} < set(
        found
    )
    assert {sight["status"] for sight in found.values()} == {"ok"}


def test_before_there_is_a_store(cli: Cli) -> None:
    found = seen(cli("doctor", "--json", code=1).stdout)
    assert found["state"]["mend"] == "castore init"
    assert found["catalog"]["status"] == "fail"


def test_a_broken_configuration(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "castore.toml").write_text("[cache]\nsize = 1\n")
    found = seen(cli("doctor", "--json", "--config", tmp_path / "castore.toml", code=1).stdout)
    assert "cache.size" in found["configuration"]["text"]


def test_the_device_is_another_one(made: Cli) -> None:
    found = within(made, "mount --bind /dev/null /dev/fuse;", 1)
    assert found["device"]["text"] == "/dev/fuse is not the device of FUSE"
    assert "mknod /dev/fuse c 10 229" in found["device"]["mend"]


def test_the_device_is_not_there(made: Cli, tmp_path: Path) -> None:
    found = within(made, f"mount -t tmpfs none /dev; exec 2>{tmp_path}/said;", 1)
    assert found["device"]["text"] == "/dev/fuse: No such file or directory"
    assert "modprobe fuse" in found["device"]["mend"]


def test_no_fusermount3(made: Cli, tmp_path: Path) -> None:
    """Root does without; others do not."""
    (tmp_path / "bin").mkdir()
    environ = {**made.environ, "PATH": str(tmp_path / "bin")}
    found = seen(made("doctor", "--json", env=environ).stdout)
    assert (found["fusermount3"]["status"], found["fusermount3"]["mend"]) == ("warn", "apt-get install fuse3")
    done = subprocess.run(
        ["/usr/bin/unshare", "--user", *made.command, "doctor", "--json"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert seen(done.stdout)["fusermount3"]["status"] == "fail"


@pytest.mark.parametrize(("line", "status"), [("user_allow_other", "ok"), ("#user_allow_other", "warn")])
def test_sharing_a_mount(made: Cli, tmp_path: Path, line: str, status: str) -> None:
    (tmp_path / "fuse.conf").write_text(f"{line}\n")
    command = shlex.join([*made.command, "doctor", "--json"])
    script = f"mount --bind {tmp_path}/fuse.conf /etc/fuse.conf; exec unshare --user {command}"
    done = subprocess.run(with_mounts_of_its_own(script), env=made.environ, capture_output=True, text=True, check=False)
    assert seen(done.stdout)["allow_other"]["status"] == status, done.stderr


def test_a_catalog_that_is_none(made: Cli, tmp_path: Path) -> None:
    (tmp_path / "state/catalog.db").write_bytes(b"not a database, by any means" * 100)
    found = seen(made("doctor", "--json", code=1).stdout)
    assert "catalog.db" in found["catalog"]["text"]


def test_a_catalog_of_a_newer_castore(made: Cli, tmp_path: Path) -> None:
    catalog = sqlite3.connect(tmp_path / "state/catalog.db")
    catalog.execute("PRAGMA user_version = 9999")
    catalog.close()
    found = seen(made("doctor", "--json", code=1).stdout)
    assert found["catalog"]["status"] == "fail"


def test_a_dead_mount(store: MountedStore) -> None:
    assert store.castore("doctor").count("answers") >= 1
    os.kill(store.pid, signal.SIGKILL)
    done = store.run("doctor", "--json")
    assert done.returncode == 1
    sight = seen(done.stdout)["mounts"]
    assert sight["text"] == f"{store.mnt}: its daemon is gone"
    store.run("umount", str(store.mnt))
    assert mount_at(store.mnt) is None
    store.pid = 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is nearly full."""
    place = tmp_path / "disk"
    place.mkdir()
    run_tool("mount", "-t", "tmpfs", "-o", "size=8m", "none", place)
    (place / "ballast").write_bytes(bytes(8_200_000))
    yield place
    run_tool("umount", place)


def test_a_disk_that_is_low(cli: Cli, small_disk: Path, tmp_path: Path) -> None:
    backend = f'type = "local"\npath = "{small_disk}/objects"'
    (tmp_path / "castore.toml").write_text(CONFIG.format(state=tmp_path / "state", backend=backend))
    cli("init", "--config", tmp_path / "castore.toml")
    document = json.loads(cli("doctor", "--json", "--config", tmp_path / "castore.toml").stdout)
    [sight] = (sight for sight in document["seen"] if sight["text"].startswith("backends.main.path: "))
    assert LOW_BYTES > 8 << 20
    assert (sight["status"], sight["name"]) == ("warn", "disk")
    assert "make room" in sight["mend"]


# backends


@pytest.fixture
def on_server(cli: Cli, s3_server: SeaweedFS, tmp_path: Path) -> Path:
    """The settings of a store whose objects are on a server."""
    (tmp_path / "secret").write_text(s3_server.secret_key)
    backend = (
        f'type = "s3"\nendpoint_url = "{s3_server.endpoint_url}"\n'
        f'bucket = "{s3_server.bucket}"\nkey_prefix = "doctor"\n'
        f'access_key_ref = "env:DOCTOR_KEY"\nsecret_key_ref = "file:{tmp_path}/secret"'
    )
    config = tmp_path / "castore.toml"
    config.write_text(CONFIG.format(state=tmp_path / "state", backend=backend))
    cli.environ["DOCTOR_KEY"] = s3_server.access_key
    cli("init", "--config", config)
    return config


def test_a_server_that_is_well(cli: Cli, on_server: Path) -> None:
    found = seen(cli("doctor", "--json", "--config", on_server).stdout)
    assert found["backend main"]["status"] == "ok"
    assert "clock" not in found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('bucket = "', 'bucket = "no-', "NoSuchBucket"),
        ("http://127.0.0.1:", "http://127.0.0.2:", "127.0.0.2"),
    ],
)
def test_a_backend_that_fails(cli: Cli, on_server: Path, old: str, new: str, said: str) -> None:
    on_server.write_text(on_server.read_text().replace(old, new))
    sight = seen(cli("doctor", "--json", "--config", on_server, code=1).stdout)["backend main"]
    assert sight["status"] == "fail"
    assert said in sight["text"]
    assert "[backends.main]" in sight["mend"]


def test_wrong_credentials(cli: Cli, on_server: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("another-secret")
    done = cli("doctor", "--config", on_server, code=1)
    assert "fail  backend main: " in done.stdout
    assert "403" in done.stdout
    assert "another-secret" not in done.stdout + done.stderr


def test_a_secret_that_is_not_there(cli: Cli, on_server: Path) -> None:
    del cli.environ["DOCTOR_KEY"]
    found = seen(cli("doctor", "--json", "--config", on_server, code=1).stdout)
    assert "env:DOCTOR_KEY" in found["secrets"]["text"]


@pytest.mark.parametrize(("ahead_s", "said"), [(CLOCK_S + 1, "61 s ahead of"), (-400.0, "400 s behind"), (CLOCK_S, "")])
def test_clocks_that_differ(ahead_s: float, said: str) -> None:
    health = BackendHealth("pass", "answers", clock_ahead_s=ahead_s)
    told = [sight.text for sight in of_backends({"main": health}) if sight.name == "clock"]
    assert [said in text for text in told] == ([True] if said else [])
