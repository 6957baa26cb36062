"""A host in a network namespace that loses its link: it hears nothing at all from the network, not even a refusal."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, Self

import pytest

from tests.mount.following import age_check, at, environment, followed, newest, publish, replica_url, replicating
from tests.mount.store import WAIT_SECONDS, MountedStore, run_tool, wait_until
from tests.places import S3Place
from tests.servers.relay import Relay
from tests.servers.seaweedfs import SeaweedFS

HERE: Final = "10.213.77.1"
THERE: Final = "10.213.77.2"


class Link:
    """A network namespace, and the one link between it and this host. A context manager."""

    def __init__(self) -> None:
        self.namespace = f"castore-{os.getpid()}"
        self._device = f"castore{os.getpid()}"[:15]

    def __enter__(self) -> Self:
        run_tool("ip", "netns", "add", self.namespace)
        try:
            inside = ("ip", "-n", self.namespace)
            run_tool("ip", "link", "add", self._device, "type", "veth", "peer", "eth0", "netns", self.namespace)
            run_tool("ip", "address", "add", f"{HERE}/30", "dev", self._device)
            run_tool(*inside, "address", "add", f"{THERE}/30", "dev", "eth0")
            run_tool(*inside, "link", "set", "lo", "up")
            run_tool(*inside, "link", "set", "eth0", "up")
            self.set("up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        run_tool("ip", "netns", "delete", self.namespace)
        subprocess.run(["ip", "link", "delete", self._device], check=False, capture_output=True)

    def set(self, state: str) -> None:
        """`up` or `down`."""
        run_tool("ip", "link", "set", self._device, state)


class Elsewhere(MountedStore):
    """A host that reaches the network by a link alone. Its mount is seen from here."""

    def __init__(self, root: Path, link: Link) -> None:
        self._link = link
        super().__init__(root)

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        # Not `ip netns exec`, which has mounts of its own.
        command = ["nsenter", f"--net=/run/netns/{self._link.namespace}", sys.executable, "-m", "castore.cli"]
        command += ["--config", str(self.config), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS * 2, **options)


def test_a_host_that_loses_its_link(
    tmp_path_factory: pytest.TempPathFactory, s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(s3_server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    root, url = tmp_path_factory.mktemp("writer"), replica_url(s3_server)
    writer = MountedStore(root, place=S3Place(root, s3_server, None))
    port = int(s3_server.endpoint_url.rpartition(":")[2])
    try:
        writer.mount()
        with replicating(writer, url), Link() as link, Relay(port, host=HERE) as relay:
            publish(writer, "zlib/1.0", {"README": b"read me"})
            wait_until(lambda: newest(url), "the replica is there")
            address = f"http://{HERE}:{relay.port}"
            follower = Elsewhere(tmp_path_factory.mktemp("follower"), link)
            try:
                text = writer.config.read_text().replace(str(root / "state"), str(follower.state))
                text = text.replace(str(root / "cache"), str(follower.root / "cache"))
                follower.config.write_text(text.replace(s3_server.endpoint_url, address))
                shutil.rmtree(follower.state)
                follower.mount("--follow", at(url, address))
                old = follower.package("zlib/1.0")
                wait_until(old.exists, "the package is seen")
                assert (old / "README").read_bytes() == b"read me"

                link.set("down")
                publish(writer, "zlib/1.1", {"README": b"read me again"})
                wait_until(lambda: followed(follower)["error"], "it says that the replica is away")
                assert followed(follower)["error"].endswith("no answer within 5 s")
                check = wait_until(lambda: (found := age_check(follower))["status"] == "warn" and found, "health warns")
                assert "this is the catalog as of" in check["output"]
                # What is cached goes on, and all names.
                assert (old / "README").read_bytes() == b"read me"
                assert os.listdir(old) == ["README"]
                assert not follower.package("zlib/1.1").exists()

                link.set("up")
                new = follower.package("zlib/1.1") / "README"
                wait_until(new.exists, "it catches up")
                assert new.read_bytes() == b"read me again"
                wait_until(lambda: not followed(follower)["error"], "all is well again")
            finally:
                follower.close()
            assert "Traceback" not in follower.log()
    finally:
        writer.close()
