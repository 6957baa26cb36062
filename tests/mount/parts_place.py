"""A bucket behind a proxy that does harm, where objects are put in parts as small as servers take. Tests nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from castore.digest import Digest
from castore.storage.layout import key_of
from tests.places import S3Place
from tests.servers.fault_proxy import Answer, FaultProxy
from tests.servers.s3_server import S3Server

PART: Final = 5 << 20
UNAVAILABLE: Final = Answer(503, {"content-length": "0", "retry-after": "0"}, b"")


class InParts:
    """A place whose backends put in small parts, by way of a proxy that does harm."""

    backend_type = "s3"

    def __init__(self, root: Path, server: S3Server, proxy: FaultProxy) -> None:
        self._place = S3Place(root, server, None)
        self.bucket = server.bucket
        self.prefix = self._place.prefix("main")
        self._server = server
        self._proxy = proxy
        self.outside = server.client()

    def section(self, backend_id: str) -> str:
        text = self._place.section(backend_id).replace(self._server.endpoint_url, self._proxy.endpoint_url)
        return f"{text}multipart_threshold_bytes = {PART}\nmultipart_chunk_bytes = {PART}\n"

    def unreachable(self, backend_id: str) -> Any:
        return self._place.unreachable(backend_id)

    def uploads(self, data: bytes) -> list[str]:
        """Ids of uploads of these bytes that are begun and not ended."""
        return [upload["UploadId"] for upload in self._list(data)]

    def parts(self, data: bytes) -> list[int]:
        """Numbers of the parts that the server holds of the only upload of these bytes, if there is one."""
        for upload in self._list(data):
            names = {"Bucket": self._server.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            return [part["PartNumber"] for part in self.outside.list_parts(**names).get("Parts", ())]
        return []

    def _list(self, data: bytes) -> list[Any]:
        page = self.outside.list_multipart_uploads(Bucket=self._server.bucket, Prefix=self._server.key_prefix)
        key = key_of(Digest.of(data))
        return [upload for upload in page.get("Uploads", ()) if upload["Key"].endswith(key)]

    def close(self) -> None:
        self.outside.close()
