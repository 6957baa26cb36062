"""MinIO in a container, by testcontainers, where a Docker engine answers. The engine fetches the image.

CASTORE_TEST_MINIO_IMAGE names another image than the one here. A container of testcontainers' own removes this one when
the tests end, however they do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.servers.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, wait_for_bucket

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

IMAGE: Final = "minio/minio:RELEASE.2025-04-22T22-12-26Z"
PORT: Final = 9000


class MinioContainer(S3Server):
    """One container, gone with all that it stores when it stops."""

    def __init__(self) -> None:
        super().__init__("MinIO container", access_key=ACCESS_KEY, secret_key=SECRET_KEY)
        self._image = os.environ.get("CASTORE_TEST_MINIO_IMAGE", IMAGE)
        self._container: DockerContainer | None = None

    def __enter__(self) -> MinioContainer:
        from testcontainers.core.container import DockerContainer

        container = DockerContainer(self._image)
        container.with_command("server /data").with_exposed_ports(PORT)
        container.with_env("MINIO_ROOT_USER", self.access_key).with_env("MINIO_ROOT_PASSWORD", self.secret_key)
        self._container = container.start()
        try:
            self.endpoint_url = f"http://{container.get_container_host_ip()}:{container.get_exposed_port(PORT)}"
            if not wait_for_bucket(self):
                raise RuntimeError(f"{self._image} does not answer: ...{container.get_logs()[1][-3000:]!r}")
        except BaseException:
            container.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._container is not None:
            self._container.stop()

    @property
    def version(self) -> str:
        return self._image.rpartition(":")[2]

    @property
    def is_local(self) -> bool:
        return False  # the engine may run elsewhere


def engine_answers() -> bool:
    """Whether there is a Docker engine. Takes milliseconds where there is none."""
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").exists():
        return False
    import docker  # type: ignore[import-untyped]
    from docker.errors import DockerException  # type: ignore[import-untyped]

    try:
        client = docker.from_env(timeout=10)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except DockerException:
        return False
