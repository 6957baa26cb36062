"""What docs/OPERATOR.md has operators set on a bucket, on a real Ceph RGW: a policy of least rights, a life cycle."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from castore.config import S3Settings
from castore.digest import Digest
from castore.errors import StorageDenied
from castore.storage.conformance import BackendConformance
from castore.storage.open import open_backend
from castore.storage.source import BytesSource
from castore.storage.spi import StorageBackend
from tests.servers.every import EveryServer
from tests.servers.s3_server import S3Server

from .conftest import but, settings_on

OPERATOR = Path(__file__).parents[3] / "docs/OPERATOR.md"


def documented(key: str) -> str:
    """The one JSON document there that has this key."""
    blocks: list[str] = re.findall(r"^```json\n(\{.*?\n\})\n```$", OPERATOR.read_text(), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if key in json.loads(block)]
    return found


def policy_for(user: str, bucket: str, key_prefix: str) -> str:
    """The policy of the document, with these names in the place of its own."""
    policy = documented("Statement")
    for theirs, ours in (
        ("user/castore", f"user/{user}"),
        ("s3:::artifacts/castore/", f"s3:::{bucket}/{key_prefix}/"),
        ("s3:::artifacts", f"s3:::{bucket}"),
    ):
        assert theirs in policy
        policy = policy.replace(theirs, ours)
    json.loads(policy)
    return policy


@pytest.fixture(scope="module")
def user(every_server: EveryServer) -> S3Server:
    """Somebody without rights, over https, who is told of a bucket that belongs to somebody else."""
    name, access_key, secret_key = every_server.rgw.add_user()
    other = S3Server(name, access_key=access_key, secret_key=secret_key, region="default")
    tls = every_server["rgw-https"]
    other.endpoint_url, other.ca_bundle, other.bucket = tls.endpoint_url, tls.ca_bundle, f"policy-{uuid.uuid4().hex}"
    owner = tls.client()
    owner.create_bucket(Bucket=other.bucket)
    owner.close()
    return other


@pytest.fixture
def settings(every_server: EveryServer, user: S3Server, of_nobody: S3Settings, tmp_path: Path) -> S3Settings:
    """Of that user, who may do what the policy says below the key prefix."""
    settings = settings_on(user, of_nobody, tmp_path)
    owner = every_server["rgw-https"].client()
    owner.put_bucket_policy(Bucket=user.bucket, Policy=policy_for(user.name, user.bucket, settings.key_prefix))
    owner.close()
    return settings


class TestLeastRights(BackendConformance):
    @pytest.fixture
    async def backend(self, settings: S3Settings) -> AsyncIterator[StorageBackend]:
        backend = open_backend(settings)
        yield backend
        await backend.aclose()


async def test_nothing_else_is_allowed(settings: S3Settings, user: S3Server) -> None:
    elsewhere = open_backend(but(settings, key_prefix="other"))
    digest = Digest("sha256", bytes(32))
    try:
        with pytest.raises(StorageDenied):
            await elsewhere.put(digest, BytesSource(b"x"))
        with pytest.raises(StorageDenied):
            await elsewhere.delete(digest)
    finally:
        await elsewhere.aclose()

    client = user.client()
    bucket = {"Bucket": user.bucket}
    forbidden: dict[str, Callable[[], Any]] = {
        "delete the bucket": lambda: client.delete_bucket(**bucket),
        "see the policy": lambda: client.get_bucket_policy(**bucket),
        "change the policy": lambda: client.put_bucket_policy(**bucket, Policy="{}"),
        "change the life cycle": lambda: client.delete_bucket_lifecycle(**bucket),
        "version the bucket": lambda: client.put_bucket_versioning(
            **bucket, VersioningConfiguration={"Status": "Enabled"}
        ),
    }
    for what, act in forbidden.items():
        with pytest.raises(ClientError) as refused:
            act()
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403, what
    client.close()


def test_the_life_cycle_is_taken_and_ends_no_object(every_server: EveryServer) -> None:
    client = every_server["rgw-https"].client()
    bucket = {"Bucket": f"life-cycle-{uuid.uuid4().hex}"}
    client.create_bucket(**bucket)
    client.put_bucket_lifecycle_configuration(**bucket, LifecycleConfiguration=json.loads(documented("Rules")))
    (rule,) = client.get_bucket_lifecycle_configuration(**bucket)["Rules"]
    client.close()
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    assert rule.keys() & {"Expiration", "Transitions"} == set()
