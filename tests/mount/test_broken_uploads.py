"""A daemon that dies, or a file that goes, in the middle of a put in parts: nothing unfinished stays in the bucket."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest

from castore.digest import Digest
from castore.storage.layout import key_of
from tests.mount.crash_round import rows
from tests.mount.store import MountedStore, wait_until
from tests.places import S3Place
from tests.servers.every import S3_SERVERS, EveryServer
from tests.servers.fault_proxy import Exchange, FaultProxy
from tests.servers.s3_server import S3Server

PART: Final = 5 << 20
HERE: Final = [name for name in S3_SERVERS if name in ("seaweedfs", "rgw")]


class InParts:
    """A place whose backends put in small parts, by way of a proxy that does harm."""

    backend_type = "s3"

    def __init__(self, root: Path, server: S3Server, proxy: FaultProxy) -> None:
        self._place = S3Place(root, server, None)
        self._server = server
        self._proxy = proxy
        self._outside = server.client()

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
            return [part["PartNumber"] for part in self._outside.list_parts(**names).get("Parts", ())]
        return []

    def _list(self, data: bytes) -> list[Any]:
        page = self._outside.list_multipart_uploads(Bucket=self._server.bucket, Prefix=self._server.key_prefix)
        key = key_of(Digest.of(data))
        return [upload for upload in page.get("Uploads", ()) if upload["Key"].endswith(key)]

    def close(self) -> None:
        self._outside.close()


@pytest.fixture
def proxy(every_server: EveryServer, name: str) -> Iterator[FaultProxy]:
    port = urlsplit(every_server[name].endpoint_url).port
    assert port is not None
    with FaultProxy(port) as proxy:
        yield proxy


@pytest.fixture
def parts_place(every_server: EveryServer, name: str, proxy: FaultProxy, tmp_path: Path) -> Iterator[InParts]:
    place = InParts(tmp_path, every_server[name], proxy)
    yield place
    place.close()


@pytest.fixture
def store(make_store: Callable[..., MountedStore], parts_place: InParts) -> MountedStore:
    made = make_store(place=parts_place)
    made.mount()
    return made


def hang(exchange: Exchange) -> None:
    exchange.hang()


def begin(store: MountedStore, proxy: FaultProxy, place: InParts, path: Path) -> bytes:
    """A file of five parts whose put has sent all but the third, which hangs."""
    data = random.Random(str(path)).randbytes(4 * PART + 1)
    proxy.break_with(hang, method="PUT", value=("partNumber", "3"))
    path.write_bytes(data)
    wait_until(lambda: place.parts(data) == [1, 2, 4, 5], "all parts but one are there")
    return data


def sent_parts(proxy: FaultProxy) -> list[str]:
    return sorted(request.query["partNumber"] for request in proxy.requests if "partNumber" in request.query)


def nothing_is_left(store: MountedStore, place: InParts, data: bytes) -> None:
    wait_until(lambda: place.uploads(data) == [], "no upload is left")
    wait_until(lambda: rows(store.state / "catalog.db", "SELECT * FROM put_intents") == [], "no put is intended")


@pytest.mark.parametrize("name", HERE, scope="session")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_daemon_goes_on(
    store: MountedStore, proxy: FaultProxy, parts_place: InParts, number: signal.Signals
) -> None:
    path = store.ingest("resume/1") / "big"
    data = begin(store, proxy, parts_place, path)
    store.kill(number)
    proxy.break_with(hang, times=0)
    store.mount()
    store.wait_stored(path)
    assert sent_parts(proxy) == ["3"], "what the server had is not sent again"
    nothing_is_left(store, parts_place, data)
    assert (store.publish("resume/1") / "big").read_bytes() == data


@pytest.mark.parametrize("name", HERE, scope="session")
def test_a_file_discarded_while_it_is_put(store: MountedStore, proxy: FaultProxy, parts_place: InParts) -> None:
    path = store.ingest("discard/1") / "big"
    data = begin(store, proxy, parts_place, path)
    path.unlink()
    nothing_is_left(store, parts_place, data)
    assert not any(state["file_count"] for state in store.status()["queue"].values())
    (path.parent / "small").write_bytes(b"the next")
    store.wait_stored(path.parent / "small")


@pytest.mark.parametrize("name", HERE, scope="session")
def test_a_file_that_changes_while_it_is_put(store: MountedStore, proxy: FaultProxy, parts_place: InParts) -> None:
    path = store.ingest("change/1") / "big"
    data = begin(store, proxy, parts_place, path)
    proxy.mend()
    with open(path, "r+b") as file:
        file.write(b"other")
    store.wait_stored(path)
    nothing_is_left(store, parts_place, data)
    assert parts_place.uploads(b"other" + data[5:]) == []
    assert (store.publish("change/1") / "big").read_bytes() == b"other" + data[5:]


@pytest.mark.parametrize("name", HERE, scope="session")
def test_another_file_with_the_same_bytes_is_still_put(
    store: MountedStore, proxy: FaultProxy, parts_place: InParts
) -> None:
    path = store.ingest("twice/1") / "big"
    data = begin(store, proxy, parts_place, path)
    (path.parent / "copy").write_bytes(data)
    wait_until(lambda: store.state_of(path.parent / "copy") == "uploading", "it waits for the same put")
    path.unlink()
    proxy.break_with(hang, times=0)
    store.kill()
    store.mount()
    store.wait_stored(path.parent / "copy")
    nothing_is_left(store, parts_place, data)
    assert (store.publish("twice/1") / "copy").read_bytes() == data


@pytest.mark.parametrize("name", HERE, scope="session")
@pytest.mark.parametrize("change", [os.unlink, lambda path: os.truncate(path, 1)], ids=["discarded", "changed"])
def test_killed_before_it_could_clear_away(
    store: MountedStore, proxy: FaultProxy, parts_place: InParts, change: Callable[[Path], None]
) -> None:
    """The next daemon knows of the put by its intent, and of no file that wants it."""
    path = store.ingest("killed/1") / "big"
    data = begin(store, proxy, parts_place, path)
    proxy.break_with(hang)
    change(path)
    wait_until(lambda: proxy.met, "the daemon tries to clear away")
    store.kill()
    assert len(parts_place.uploads(data)) == 1
    proxy.mend()
    store.mount()
    nothing_is_left(store, parts_place, data)
    assert "an earlier daemon began is abandoned" in store.log()
