"""A server that somebody else runs, named by the environment: Amazon S3, or an operator's own. It starts nothing.

CASTORE_TEST_S3_ENDPOINT      its address, https://HOST[:PORT]
CASTORE_TEST_S3_ACCESS_KEY    of a user who may do what docs/OPERATOR.md lists
CASTORE_TEST_S3_SECRET_KEY
CASTORE_TEST_S3_BUCKET        which exists; the tests put below a prefix of their own, and remove that at the end
CASTORE_TEST_S3_REGION        us-east-1 unless given
CASTORE_TEST_S3_CA_BUNDLE     a file with authorities to trust instead of the system's
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Final

from tests.servers.s3_server import S3Server

ENDPOINT: Final = "CASTORE_TEST_S3_ENDPOINT"


class Endpoint(S3Server):
    """What the environment names. Raises KeyError for a variable that is not set."""

    def __init__(self) -> None:
        region = os.environ.get("CASTORE_TEST_S3_REGION", "us-east-1")
        access_key, secret_key, bucket = (
            os.environ[f"CASTORE_TEST_S3_{name}"] for name in ("ACCESS_KEY", "SECRET_KEY", "BUCKET")
        )
        super().__init__(os.environ[ENDPOINT], access_key=access_key, secret_key=secret_key, region=region)
        self.endpoint_url = os.environ[ENDPOINT]
        self.bucket = bucket
        self.key_prefix = f"castore-tests-{uuid.uuid4().hex}/"
        ca_bundle = os.environ.get("CASTORE_TEST_S3_CA_BUNDLE")
        self.ca_bundle = Path(ca_bundle) if ca_bundle else None

    def __exit__(self, *exc: object) -> None:
        client = self.client()
        try:
            below = {"Bucket": self.bucket, "Prefix": self.key_prefix}
            for page in client.get_paginator("list_multipart_uploads").paginate(**below):
                for upload in page.get("Uploads", ()):
                    client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            for page in client.get_paginator("list_objects_v2").paginate(**below):
                for found in page.get("Contents", ()):
                    client.delete_object(Bucket=self.bucket, Key=found["Key"])
        finally:
            client.close()

    @property
    def is_local(self) -> bool:
        return False
